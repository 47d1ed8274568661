"""What SmoothQuant buys: 8-bit weights and activations with outliers planted, over α, and
where it does not help.

The bundled model has no outlier channels, so some are planted (``planting``: exact, the
same function bit for bit), ``FACTOR`` times their size, where large networks have them:
behind the norms. Then every product rounds its inputs.

    python -m refllm.experiments.smoothquant          # writes
    figures/data/smoothquant.json; `refllm figures` draws it

| outliers in | α          | levels     | kept in floating point        | question                                  |
|-------------|------------|------------|-------------------------------|-------------------------------------------|
| nothing     | none       | O1, O2, O3 | nothing                       | what 8 bits cost without outliers         |
| norms       | none       | O1, O2, O3 | nothing; o_proj and down_proj | what outliers break                       |
| norms       | 0 … 1      | O1, O2, O3 | nothing                       | what smoothing repairs                    |
| norms       | ½          | O1, O2, O3 | o_proj and down_proj          | what the inputs that it leaves alone cost |
| MLP hidden  | none and ½ | O1         | nothing; down_proj            | where it does not help                    |

Smoothing does not see what was planted behind a norm (s is ``FACTOR`` times as large
there), so the curves over α are also those of the network without outliers.

Text, calibration and intervals are those of ``quality``; finished cases are kept in
``--cache`` as there. Left out: q, k, v rounded for the attention's own products.
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
from refllm.checkpoints.loading import locate
from refllm.checkpoints.writer import write_whole
from refllm.experiments.outlier_injection import NORMS, choose, plant
from refllm.experiments.quantization_quality import (
    BLOCK,
    LENGTH,
    RESAMPLES,
    WINDOW,
    WINDOWS,
    Bench,
    increase,
)
from refllm.measure.comparison import compare
from refllm.measure.device import processor
from refllm.measure.plotting import FULL, MORE, TECHNIQUE, coloured, end_labels, new_figure, styled
from refllm.measure.records import Record, Values, write
from refllm.model.llama import Weights
from refllm.quant.layer_io import ModelSource
from refllm.quant.smoothquant import LEVELS, activation_absmax, smoothquant

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FACTOR = 128.0
SHARE = 1 / 64  # of the channels are outliers: 4 of 256
ALPHAS = (0.0, 0.15, 0.3, 0.5, 0.7, 0.85, 1.0)
PLANTED: dict[str, Sequence[str]] = {"nothing": (), "norms": NORMS, "MLP hidden": ("MLP hidden",)}
UNSMOOTHED = ("o_proj", "down_proj")


@dataclass(frozen=True)
class Case:
    """One network: where its outliers are, how its inputs are rounded, α (None: not
    smoothed), what is kept.
    """

    outliers: str
    level: str
    alpha: float | None
    keep: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As a line of progress says it."""
        if self.alpha is None:
            smoothed = "not smoothed"
        else:
            smoothed = f"alpha {self.alpha}"
        return f"outliers in {self.outliers}, {self.level}, {smoothed}" + "".join(
            f", {n} kept" for n in self.keep
        )


def cases(alphas: Sequence[float] = ALPHAS) -> list[Case]:
    """All that the module's table names."""
    found = [Case("nothing", level, None) for level in LEVELS]
    for level in LEVELS:
        found += [
            Case("norms", level, alpha, keep) for alpha in (None, 0.5) for keep in ((), UNSMOOTHED)
        ]
        found += [Case("norms", level, alpha) for alpha in alphas if alpha != 0.5]
    return found + [
        Case("MLP hidden", "O1", alpha, keep)
        for alpha in (None, 0.5)
        for keep in ((), ("down_proj",))
    ]


class Experiment:
    """A bench, and the planted networks with their calibration, made once each."""

    def __init__(self, bench: Bench, factor: float = FACTOR, share: float = SHARE, seed: int = 0):
        self.bench = bench
        self.factor = factor
        self.share = share
        self.seed = seed
        self._made: dict[str, tuple[Weights, Any]] = {}

    def channels(self, outliers: str) -> list[int]:
        """The channels that are planted."""
        config = self.bench.model.config
        rng = np.random.default_rng(self.seed)
        if outliers == "MLP hidden":
            width = config.intermediate_size
        else:
            width = config.hidden_size
        return choose(width, max(1, round(self.share * width)), rng)

    def planted(self, outliers: str) -> tuple[Weights, Any]:
        """The weights with their outliers, and the absmax of all inputs over the
        calibration text.
        """
        if outliers not in self._made:
            model = self.bench.model
            weights = plant(model.weights, self.channels(outliers), self.factor, PLANTED[outliers])
            seen = activation_absmax(
                ModelSource(model.config, weights), self.bench.calibration(self.seed)
            )
            self._made[outliers] = weights, seen
        return self._made[outliers]

    def measure(self, case: Case) -> dict[str, Any]:
        """A row of the table."""
        weights, absmax = self.planted(case.outliers)
        model = self.bench.model
        made = smoothquant(weights, absmax, alpha=case.alpha, level=case.level, keep=case.keep)
        found = compare(
            Model(model.config, made, model.tokenizer),
            self.bench.reference,
            self.bench.text,
            rng=np.random.default_rng(0),
            block=BLOCK,
            resamples=RESAMPLES,
        )
        more = increase(found)
        return asdict(case) | {
            "bits per byte": found.model.bits_per_byte,
            "full precision": found.reference.bits_per_byte,
            "increase": [more.mean, more.low, more.high],
            "kl": [found.kl.mean, found.kl.low, found.kl.high],
        }

    def key(self, case: Case) -> str:
        """The name of a case's file in the cache."""
        settings = [self.bench.settings, asdict(case), self.factor, self.share, self.seed]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:20]

    def table(self, wanted: Sequence[Case], cache: Path) -> Iterator[dict[str, Any]]:
        """The rows of ``wanted``, each computed or taken from ``cache``."""
        for case in wanted:
            file = cache / f"{self.key(case)}.json"
            if not file.is_file():
                cache.mkdir(parents=True, exist_ok=True)
                write_whole(file, json.dumps(self.measure(case)))
            yield json.loads(file.read_text("utf-8"))


# --- the figure ----------------------------------------------------------------------


# activations are rounded so
ROUNDING = {"O1": "a step a token", "O2": "a step a batch", "O3": "a step from calibration"}


@styled
def draw(values: Values) -> Figure:
    """{"rows": [{"outliers", "level", "alpha", "keep", "kl", "bits per byte", "full
    precision"}]}.

    Above, KL over α; below, where it helps and where not. KL tells networks apart whose
    bits per byte differ by less than chance; those stand beside it, in per cent.
    """
    fig = new_figure(6.2)
    # apart, so that the long names below do not make the upper plot narrow
    parts: Any = fig.subfigures(2, 1)
    _over_alpha(parts[0].subplots(), values)
    _where_it_helps(parts[1].subplots(), values["rows"])
    return fig


def _over_alpha(ax: Axes, values: Values) -> None:
    """KL over α for each level, and without smoothing dashed."""
    rows = values["rows"]
    ends = []
    for at, (colour, level) in enumerate(
        coloured((TECHNIQUE, MORE[0], MORE[1]), _distinct(rows, "level"))
    ):
        smooth = [
            r for r in rows if (r["outliers"], r["level"], list(r["keep"])) == ("norms", level, [])
        ]
        curve = sorted((r["alpha"], r["kl"][0]) for r in smooth if r["alpha"] is not None)
        ax.plot(*zip(*curve, strict=True), color=colour, marker="o", ms=4)
        ends.append((*curve[-1], f"{level}, smoothed:\n{ROUNDING[level]}", colour))
        plain = _network(rows, "norms", level, None)
        # dashes in turn: where two levels are as bad as each other, both are seen
        ax.axhline(plain["kl"][0], color=colour, ls=(6 * at, (5, 7)), lw=1.6)
        ends.append((1, plain["kl"][0], f"{level}, not smoothed:\n{_loss(plain)}", colour))
    ax.set(
        title=f"W8A8, outliers of {values['factor']:g}× behind the norms", xlabel="α", yscale="log"
    )
    ax.set_ylabel("KL (nats per token)")
    end_labels(ax, ends, gap=0.13, fontsize=8)


def _where_it_helps(ax: Axes, rows: Sequence[Any]) -> None:
    """KL of what is planted, smoothed and kept in floating point, a dot each."""
    keep = ["o_proj", "down_proj"]
    cases = [
        ("no outliers, not smoothed", "nothing", None, []),
        ("norms, not smoothed", "norms", None, []),
        ("norms, not smoothed, o and down kept", "norms", None, keep),
        ("norms, smoothed", "norms", 0.5, []),
        ("norms, smoothed, o and down kept", "norms", 0.5, keep),
        ("MLP hidden, not smoothed", "MLP hidden", None, []),
        ("MLP hidden, smoothed", "MLP hidden", 0.5, []),
        ("MLP hidden, smoothed, down kept", "MLP hidden", 0.5, ["down_proj"]),
    ]
    found = [_network(rows, outliers, "O1", alpha, kept) for _, outliers, alpha, kept in cases]
    length = [max(r["kl"][0], 1e-9) for r in found]
    for y, r in enumerate(found):
        _dot(ax, length[y], y, FULL if r["alpha"] is None else TECHNIQUE, _loss(r))
    ax.set_yticks(range(len(cases)), [case[0] for case in cases], fontsize=9)
    ax.set(title="O1: where it helps, and where not", xscale="log", xlabel="KL (nats per token)")
    ax.set_xlim(min(length) / 2, 60 * max(length))
    ax.set_ylim(len(cases) - 0.5, -0.5)


def _network(
    rows: Sequence[Any], outliers: str, level: str, alpha: float | None, keep: Sequence[str] = ()
) -> Any:
    wanted = (outliers, level, alpha, list(keep))
    return next(
        r for r in rows if (r["outliers"], r["level"], r["alpha"], list(r["keep"])) == wanted
    )


def _loss(row: Any) -> str:
    """By how much the bits per byte rise, in two significant digits."""
    percent = float(f"{100 * (row['bits per byte'] / row['full precision'] - 1):.2g}")
    return f"{np.format_float_positional(percent, trim='-', sign=True)} % bits per byte".replace(
        "-", "−"
    )


def _distinct(rows: Sequence[Any], key: str) -> list[Any]:
    """The values of a column, in the order in which they occur."""
    return list(dict.fromkeys(row[key] for row in rows))


def _dot(ax: Axes, x: float, y: float, colour: str, said: str) -> None:
    """A value on a logarithmic axis: a dot, since a bar's length would depend on where the
    axis begins.
    """
    ax.plot(x, y, "o", color=colour, ms=7)
    ax.annotate(
        said,
        (x, y),
        xytext=(8, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every case, or what is missing of them, and write the record that the figure
    is drawn from.
    """
    parser = argparse.ArgumentParser(
        prog="python -m refllm.experiments.smoothquant", description=main.__doc__
    )
    parser.add_argument(
        "--model", default="stdlib", help="a bundled model's name, or a checkpoint's folder"
    )
    parser.add_argument("--output", type=Path, default=Path("figures/data/smoothquant.json"))
    parser.add_argument(
        "--cache", type=Path, default=Path("build/smoothing"), help="where finished cases are kept"
    )
    parser.add_argument("--alphas", nargs="+", type=float, default=ALPHAS)
    parser.add_argument(
        "--excerpts", type=int, default=16, help=f"held-out excerpts of {LENGTH} tokens"
    )
    chosen = parser.parse_args(arguments)
    from threadpoolctl import threadpool_limits

    weights = sorted(locate(chosen.model).glob("*.safetensors"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()
    with threadpool_limits(limits=1, user_api="blas"):
        model = load(chosen.model, backend="numpy")
        experiment = Experiment(Bench(model, digest, chosen.excerpts, LENGTH, WINDOWS, WINDOW))
        wanted = cases(chosen.alphas)
        rows = []
        for case, row in zip(wanted, experiment.table(wanted, chosen.cache), strict=True):
            rows.append(row)
            worse = row["increase"][0] / row["full precision"]
            print(
                f"[{len(rows)}/{len(wanted)}] {case.name}: {row['bits per byte']:.4f} bits "
                f"per byte, {worse:+.1%}",
                file=sys.stderr,
            )
    values = {
        "model": Path(chosen.model).name,
        "factor": FACTOR,
        "settings": experiment.bench.settings,
        "channels": {name: experiment.channels(name) for name, inputs in PLANTED.items() if inputs},
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
    write(chosen.output, Record("python -m refllm.experiments.smoothquant", "A", hardware, values))


if __name__ == "__main__":
    main()
