"""The experiment that AWQ starts from, on a whole network: a few input channels of every
weight are left in floats.

    python -m refllm.experiments.salience            # writes figures/data/salience.json;
    `refllm figures` draws it

Every projection is rounded to nearest in ``BITS`` bits, groups of ``GROUP``; a share of its
input channels keeps its weights as they were, chosen by the size of the activations, by the
size of the weights or at random (``SEEDS``). What is measured is KL to full precision over
held-out text, paired as in ``quality``.

| network  | what the experiment shows there                                                                    |
|----------|----------------------------------------------------------------------------------------------------|
| as it is | a small network: its channels are nearly alike, so choosing them well gains less than in the paper |
| planted  | with outlier channels (``planting``, ``FACTOR`` times), whose small weights rounding to nearest    |
|          | takes for zero: activations say which they are, the size of the weights says the opposite          |

Finished rows are kept in ``--cache``. Left out: mixed rows in a real layout; what scaling
(AWQ) makes of it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import refllm
from refllm.api import Model, load
from refllm.backend import Array
from refllm.checkpoints.loading import locate
from refllm.checkpoints.writer import write_whole
from refllm.experiments.outlier_injection import choose, plant
from refllm.experiments.quantization_quality import BLOCK, LENGTH, RESAMPLES, WINDOW, WINDOWS, Bench
from refllm.formats.uniform import Scheme
from refllm.measure.comparison import compare
from refllm.measure.device import processor
from refllm.measure.plotting import FULL, MORE, NEAREST, TECHNIQUE, new_figure, styled
from refllm.measure.records import Record, Values, write
from refllm.model.llama import Weights
from refllm.quant.layer_inputs import walk
from refllm.quant.layer_io import ModelSource
from refllm.quant.salience import BY, Protected, salient_channels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BITS = 3
GROUP = 128
RULE = "half_integer"
FRACTIONS = (0.01, 0.03, 0.1)
SEEDS = (0, 1, 2)
FACTOR = 8.0  # 3 of 256 channels are what one per cent, rounded up, may keep
CHANNELS = 3
TOKENS = 2048  # of calibration text that the channels are chosen by


@dataclass(frozen=True)
class Choice:
    """Which channels keep their weights; ``by`` None: none."""

    network: str  # "as it is" or "planted"
    by: str | None
    fraction: float
    seed: int | None = None

    @property
    def name(self) -> str:
        """As a line of progress says it."""
        kept = f"{self.fraction:.0%} by {self.by}" if self.by else "none kept"
        return f"{self.network}, {kept}" + ("" if self.seed is None else f", seed {self.seed}")


def choices(fractions: Sequence[float] = FRACTIONS, seeds: Sequence[int] = SEEDS) -> list[Choice]:
    """All rows; the planted network has the smallest fraction alone."""
    found = []
    for network, some in (("as it is", fractions), ("planted", fractions[:1])):
        found.append(Choice(network, None, 0.0))
        for by in BY:
            drawn = seeds if by == "random" else [None]
            found += [Choice(network, by, fraction, seed) for fraction in some for seed in drawn]
    return found


class Experiment:
    """A bench, and for each network the inputs of all its projections, made once."""

    def __init__(self, bench: Bench, scheme: Scheme):
        self.bench = bench
        self.scheme = scheme
        self._made: dict[str, tuple[Weights, list[dict[str, Array]]]] = {}

    def network(self, name: str) -> tuple[Weights, list[dict[str, Array]]]:
        """The weights, and a few inputs x[T, N] of each projection, layer by layer."""
        if name not in self._made:
            model = self.bench.model
            weights = self.bench.model.weights
            if name == "planted":
                channels = choose(model.config.hidden_size, CHANNELS, np.random.default_rng(0))
                weights = plant(weights, channels, FACTOR)
            text = self.bench.calibration(0)
            assert text is not None
            inputs = []
            for run in walk(
                ModelSource(model.config, weights), text[: max(1, TOKENS // text.shape[1])]
            ):
                inputs.append(
                    {
                        name: x
                        for names in run.stages()
                        for x in [next(run.inputs())]
                        for name in names
                    }
                )
            self._made[name] = weights, inputs
        return self._made[name]

    def protected(self, choice: Choice) -> tuple[Weights, int]:
        """The network with all projections rounded but for the chosen channels, and the
        bytes of its projections.
        """
        weights, inputs = self.network(choice.network)
        rng = np.random.default_rng(choice.seed)
        layers = []
        total = 0
        for layer, seen in zip(weights["layers"], inputs, strict=True):
            made = dict(layer)
            for name, x in seen.items():
                weight = layer[name].dequantize()
                kept = salient_channels(
                    x, weight, choice.by or "weight", fraction=choice.fraction, rng=rng
                )
                made[name] = Protected(weight, self.scheme, kept)
                total += made[name].nbytes
            layers.append(made)
        return weights | {"layers": layers}, total

    def measure(self, choice: Choice) -> dict[str, Any]:
        """A row of the table."""
        model = self.bench.model
        weights, total = self.protected(choice)
        found = compare(
            Model(model.config, weights, model.tokenizer),
            self.bench.reference,
            self.bench.text,
            rng=np.random.default_rng(0),
            block=BLOCK,
            resamples=RESAMPLES,
        )
        return asdict(choice) | {
            "kl": [found.kl.mean, found.kl.low, found.kl.high],
            "bits per byte": found.model.bits_per_byte,
            "full precision": found.reference.bits_per_byte,
            "bytes": total,
        }

    def table(self, wanted: Sequence[Choice], cache: Path) -> Iterator[dict[str, Any]]:
        """The rows of ``wanted``, each computed or taken from ``cache``."""
        for choice in wanted:
            decides = [
                self.bench.settings,
                asdict(choice),
                asdict(self.scheme),
                FACTOR,
                CHANNELS,
                TOKENS,
            ]
            file = cache / f"{hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:20]}.json"
            if not file.is_file():
                cache.mkdir(parents=True, exist_ok=True)
                write_whole(file, json.dumps(self.measure(choice)))
            yield json.loads(file.read_text("utf-8"))


# --- the figure ----------------------------------------------------------------------


@styled
def draw(values: Values) -> Figure:
    """{"bits", "factor", "rows": [{"network", "by", "fraction", "seed", "kl": [mean, low,
    high]}]} → KL, two panels.
    """
    rows: Sequence[Any] = values["rows"]
    colours = {"activation": TECHNIQUE, "weight": MORE[3], "random": FULL}
    fig = new_figure(3.6)
    titles = {
        "as it is": "The network as it is",
        "planted": f"With {values['factor']:g}× outlier channels",
    }
    for i, (network, title) in enumerate(titles.items()):
        panel = fig.add_subplot(1, 2, i + 1)
        inside = [row for row in rows if row["network"] == network]
        fractions = sorted({row["fraction"] for row in inside if row["by"]})
        nearest = next(row["kl"][0] for row in inside if row["by"] is None)
        panel.axhline(nearest, color=NEAREST, label="none kept: round to nearest")
        for at, (by, colour) in enumerate(colours.items()):
            points = []
            for place, fraction in enumerate(fractions):
                kl = [row["kl"] for row in inside if (row["by"], row["fraction"]) == (by, fraction)]
                mean = sum(k[0] for k in kl) / len(kl)
                low = mean - min(k[1] for k in kl)
                high = max(k[2] for k in kl) - mean
                points.append((place + 0.08 * (at - 1), mean, low, high))
            x, y, below, above = zip(*points, strict=True)
            panel.errorbar(
                x,
                y,
                yerr=(below, above),
                color=colour,
                marker="o",
                ms=4,
                lw=1.4,
                label="at random" if by == "random" else f"by {by}",
            )
        panel.set(
            title=title,
            xlabel=f"input channels kept; others in {values['bits']} bits",
            ylim=(0, None),
        )
        panel.set_ylabel(
            "KL from full precision (nats per token)" if i == 0 else "KL (nats per token)"
        )
        panel.set_xticks(range(len(fractions)), [f"{fraction:.0%}" for fraction in fractions])
        panel.set_xlim(-0.5, len(fractions) - 0.5)
        if i == 0:
            labels = panel.get_legend_handles_labels()
    fig.legend(*labels, loc="outside upper left", ncols=4, fontsize=8.5)
    return fig


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every row, or what is missing of them, and write the record that the figure
    is drawn from.
    """
    parser = argparse.ArgumentParser(
        prog="python -m refllm.experiments.salience", description=main.__doc__
    )
    parser.add_argument(
        "--model", default="stdlib", help="a bundled model's name, or a checkpoint's folder"
    )
    parser.add_argument("--output", type=Path, default=Path("figures/data/salience.json"))
    parser.add_argument(
        "--cache", type=Path, default=Path("build/salience"), help="where finished rows are kept"
    )
    parser.add_argument(
        "--excerpts", type=int, default=16, help=f"held-out excerpts of {LENGTH} tokens"
    )
    parser.add_argument("--group", type=int, default=GROUP, help="weights that share a scale")
    chosen = parser.parse_args(arguments)
    from threadpoolctl import threadpool_limits

    weights = sorted(locate(chosen.model).glob("*.safetensors"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()
    with threadpool_limits(limits=1, user_api="blas"):
        bench = Bench(
            load(chosen.model, backend="numpy"), digest, chosen.excerpts, LENGTH, WINDOWS, WINDOW
        )
        experiment = Experiment(bench, Scheme(BITS, RULE, "group", chosen.group))
        wanted = choices()
        rows = []
        for choice, row in zip(wanted, experiment.table(wanted, chosen.cache), strict=True):
            rows.append(row)
            print(
                f"[{len(rows)}/{len(wanted)}] {choice.name}: KL {row['kl'][0]:.5f}", file=sys.stderr
            )
    values = {
        "model": Path(chosen.model).name,
        "bits": BITS,
        "group": chosen.group,
        "factor": FACTOR,
        "settings": bench.settings,
        "rows": rows,
        "versions": {
            "refllm": refllm.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
        },
    }
    hardware = (
        f"{processor()}, one thread, NumPy {np.__version__}, Python {platform.python_version()}"
    )
    write(chosen.output, Record("python -m refllm.experiments.salience", "A", hardware, values))


if __name__ == "__main__":
    main()
