"""The experiment that AWQ starts from, on a whole network: a few input channels of every
weight are left in floating point.

    python -m refllm.experiments.salience  # writes figures/data/salience.json
    refllm figures                         # draws it

Every projection is rounded to nearest in ``BITS`` bits, groups of ``GROUP``; a share of its
input channels keeps its weights unrounded, chosen by the size of the activations, by the
size of the weights or at random (``SEEDS``). What is measured is KL to full precision over
held-out text (``held_out_bench``).

| network   | what the experiment shows there                                              |
|-----------|------------------------------------------------------------------------------|
| as it is  | a small network: its channels are nearly alike, so choosing them well gains  |
|           | less than in the paper                                                       |
| with      | with injected outlier channels (``outlier_injection``, ``FACTOR`` times),    |
| outliers  | whose small weights RTN rounds to zero: activations tell which they are, the |
|           | size of the weights tells the opposite                                       |

Finished rows are kept in ``--cache``. Left out: mixed rows in a real layout; what scaling
(AWQ) makes of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from threadpoolctl import threadpool_limits

from refllm.array_types import Json
from refllm.backend import Array
from refllm.experiments.held_out_bench import (
    EXCERPTS,
    LENGTH,
    HeldOutBench,
    computed_once,
    digest_of,
    ends,
    open_bench,
)
from refllm.experiments.outlier_injection import choose_channels, inject_outliers
from refllm.formats.uniform import Scheme
from refllm.measure.device import one_thread, versions
from refllm.measure.plotting import FULL, MORE, NEAREST, TECHNIQUE, new_figure, styled
from refllm.measure.records import Record, Values, write
from refllm.model.llama import Weights
from refllm.quant.layer_inputs import walk
from refllm.quant.layer_io import ModelSource
from refllm.quant.salience import BY, Protected, salient_channels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BITS = 3
GROUP = 128
RULE = "half_integer"
FRACTIONS = (0.01, 0.03, 0.1)
SEEDS = (0, 1, 2)
FACTOR = 8.0
CHANNELS = 3  # of 256: what one per cent, rounded up, can keep
TOKENS = 2048  # of calibration text that the channels are chosen by


@dataclass(frozen=True)
class Choice:
    """Which channels keep their weights; ``by`` None: none."""

    network: str  # as in the record: without or with injected outliers
    by: str | None
    fraction: float
    seed: int | None = None

    @property
    def name(self) -> str:
        """For a line of progress.

        >>> Choice("as it is", "activation", 0.01).name
        'as it is, 1% by activation'
        """
        kept = f"{self.fraction:.0%} by {self.by}" if self.by else "none kept"
        seed = "" if self.seed is None else f", seed {self.seed}"
        return f"{self.network}, {kept}{seed}"


def choices(fractions: Sequence[float] = FRACTIONS, seeds: Sequence[int] = SEEDS) -> list[Choice]:
    """All rows; the network with injected outliers has the smallest fraction alone."""
    found = []
    for network, some in (("as it is", fractions), ("planted", fractions[:1])):
        found.append(Choice(network, None, 0.0))
        for by in BY:
            drawn = seeds if by == "random" else [None]
            found += [Choice(network, by, fraction, seed) for fraction in some for seed in drawn]
    return found


class Experiment:
    """A bench, and for each network the inputs of all its projections, made once."""

    def __init__(self, bench: HeldOutBench, scheme: Scheme):
        self.bench = bench
        self.scheme = scheme
        self._made: dict[str, tuple[Weights, list[dict[str, Array]]]] = {}

    def network(self, name: str) -> tuple[Weights, list[dict[str, Array]]]:
        """The weights, and inputs x[T, N] of each projection from the calibration text, layer
        by layer.
        """
        if name not in self._made:
            config = self.bench.model.config
            weights = self.bench.model.weights
            if name == "planted":
                rng = np.random.default_rng(0)
                channels = choose_channels(config.hidden_size, CHANNELS, rng)
                weights = inject_outliers(weights, channels, FACTOR)
            text = self.bench.calibration(0)
            some = text[: max(1, TOKENS // text.shape[1])]
            inputs = []
            for layer in walk(ModelSource(config, weights), some):
                seen: dict[str, Array] = {}
                for names in layer.stages():  # projections that read the same input
                    seen |= dict.fromkeys(names, next(layer.inputs()))
                inputs.append(seen)
            self._made[name] = weights, inputs
        return self._made[name]

    def protected(self, choice: Choice) -> tuple[Weights, int]:
        """The network with all projections rounded except for the chosen channels, and the
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

    def measure(self, choice: Choice) -> Json:
        """A row of the table."""
        weights, total = self.protected(choice)
        found = self.bench.compare_weights(weights)
        return asdict(choice) | {
            "kl": ends(found.kl),
            "bits per byte": found.model.bits_per_byte,
            "full precision": found.reference.bits_per_byte,
            "bytes": total,
        }

    def table(self, wanted: Sequence[Choice], cache: Path) -> Iterator[Json]:
        """The rows of ``wanted``, each computed or taken from ``cache``."""
        for choice in wanted:
            settings = [asdict(choice), asdict(self.scheme), FACTOR, CHANNELS, TOKENS]
            key = digest_of(self.bench.settings, *settings)
            yield computed_once(cache / f"{key}.json", partial(self.measure, choice))


# --- the figure ---------------------------------------------------------------------------

COLOURS = {"activation": TECHNIQUE, "weight": MORE[3], "random": FULL}


@styled
def draw(values: Values) -> Figure:
    """{"bits", "factor", "rows": [{"network", "by", "fraction", "seed", "kl": [mean, low,
    high]}]} → KL, a panel for each network.
    """
    rows = values["rows"]
    fig = new_figure(3.6)
    titles = {
        "as it is": "The network as it is",
        "planted": f"With {values['factor']:g}× outlier channels",
    }
    panels = fig.subplots(1, len(titles))
    for panel, (network, title) in zip(panels, titles.items(), strict=True):
        _draw_network(panel, [row for row in rows if row["network"] == network])
        panel.set(
            title=title,
            xlabel=f"input channels kept; others in {values['bits']} bits",
            ylabel="KL (nats per token)",
            ylim=(0, None),
        )
    panels[0].set_ylabel("KL from full precision (nats per token)")
    labels = panels[0].get_legend_handles_labels()
    fig.legend(*labels, loc="outside upper left", ncols=4, fontsize=8.5)
    return fig


def _draw_network(panel: Axes, rows: Sequence[Json]) -> None:
    """KL by the share of channels kept, a line for each way to choose them."""
    fractions = sorted({row["fraction"] for row in rows if row["by"]})
    nearest = next(row["kl"][0] for row in rows if row["by"] is None)
    panel.axhline(nearest, color=NEAREST, label="none kept: round to nearest")
    for at, (by, colour) in enumerate(COLOURS.items()):
        points = []
        for place, fraction in enumerate(fractions):
            kl = [row["kl"] for row in rows if (row["by"], row["fraction"]) == (by, fraction)]
            mean = sum(k[0] for k in kl) / len(kl)
            low = mean - min(k[1] for k in kl)
            high = max(k[2] for k in kl) - mean
            points.append((place + 0.08 * (at - 1), mean, low, high))
        x, y, below, above = zip(*points, strict=True)
        label = "at random" if by == "random" else f"by {by}"
        panel.errorbar(
            x, y, yerr=(below, above), color=colour, marker="o", ms=4, lw=1.4, label=label
        )
    panel.set_xticks(range(len(fractions)), [f"{fraction:.0%}" for fraction in fractions])
    panel.set_xlim(-0.5, len(fractions) - 0.5)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every row, or what is missing of them, and write the record that the figure
    is drawn from.
    """
    parser = argparse.ArgumentParser(
        prog="python -m refllm.experiments.salience", description=main.__doc__
    )
    add = parser.add_argument
    add("--model", default="stdlib", help="a bundled model's name, or a checkpoint's folder")
    add("--output", type=Path, default=Path("figures/data/salience.json"))
    add("--cache", type=Path, default=Path("build/salience"), help="where finished rows are kept")
    add("--excerpts", type=int, default=EXCERPTS, help=f"held-out excerpts of {LENGTH} tokens")
    add("--group", type=int, default=GROUP, help="weights that share a scale")
    chosen = parser.parse_args(arguments)
    with threadpool_limits(limits=1, user_api="blas"):
        bench = open_bench(chosen.model, chosen.excerpts)
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
        "versions": versions(),
    }
    command = "python -m refllm.experiments.salience"
    write(chosen.output, Record(command, "A", one_thread(), values))


if __name__ == "__main__":
    main()
