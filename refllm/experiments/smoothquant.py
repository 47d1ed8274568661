"""What SmoothQuant gains: 8-bit weights and activations with injected outliers, over α, and
where it does not help.

The bundled model has no outlier channels, so some are injected (``outlier_injection``:
exact, the same function bit for bit), ``FACTOR`` times their size, where large networks have
them: behind the norms. Then every product rounds its inputs.

    python -m refllm.experiments.smoothquant  # writes figures/data/smoothquant.json
    refllm figures                            # draws it

| outliers in | α          | levels     | kept in floating point | question                 |
|-------------|------------|------------|------------------------|--------------------------|
| nothing     | none       | O1, O2, O3 | nothing                | what do 8 bits cost?     |
| norms       | none       | O1, O2, O3 | nothing; o and down    | what do outliers break?  |
| norms       | 0 … 1      | O1, O2, O3 | nothing                | what does smoothing fix? |
| norms       | ½          | O1, O2, O3 | o and down             | what is left, and where? |
| MLP hidden  | none and ½ | O1         | nothing; down          | where does it not help?  |

Smoothing undoes an injection behind a norm (s is ``FACTOR`` times as large there), so the
curves over α are also those of the network without outliers.

Text, calibration and intervals are those of ``held_out_bench``; finished cases are kept in
``--cache``. Left out: q, k, v rounded for the attention's own products.
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

from refllm.api import Model
from refllm.array_types import Json
from refllm.experiments.held_out_bench import (
    EXCERPTS,
    LENGTH,
    HeldOutBench,
    computed_once,
    digest_of,
    ends,
    increase,
    open_bench,
)
from refllm.experiments.outlier_injection import NORM_INPUTS, choose_channels, inject_outliers
from refllm.measure.device import one_thread, versions
from refllm.measure.plotting import (
    FULL,
    MORE,
    TECHNIQUE,
    annotate_right,
    coloured,
    end_labels,
    new_figure,
    styled,
)
from refllm.measure.records import Record, Values, write
from refllm.model.llama import Weights
from refllm.quant.recipe import quantize_model
from refllm.quant.smoothquant import LEVELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FACTOR = 128.0
SHARE = 1 / 64  # of the channels are outliers: 4 of 256
ALPHAS = (0.0, 0.15, 0.3, 0.5, 0.7, 0.85, 1.0)
# where outliers are injected → the inputs of ``inject_outliers``
OUTLIERS: dict[str, Sequence[str]] = {
    "nothing": (),
    "norms": NORM_INPUTS,
    "MLP hidden": ("MLP hidden",),
}
UNSMOOTHED = ("o_proj", "down_proj")


@dataclass(frozen=True)
class Case:
    """One network: where its outliers are, how its inputs are rounded, α (None: not
    smoothed), and which projections stay in floating point.
    """

    outliers: str
    level: str
    alpha: float | None
    keep: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """For a line of progress.

        >>> Case("norms", "O1", 0.5, ("down_proj",)).name
        'outliers in norms, O1, alpha 0.5, down_proj kept'
        """
        smoothed = "not smoothed" if self.alpha is None else f"alpha {self.alpha}"
        kept = [f"{name} kept" for name in self.keep]
        return ", ".join([f"outliers in {self.outliers}", self.level, smoothed, *kept])


def cases(alphas: Sequence[float] = ALPHAS) -> list[Case]:
    """All cases of the table above."""
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
    """A bench, and the networks with injected outliers, made once each."""

    def __init__(
        self, bench: HeldOutBench, factor: float = FACTOR, share: float = SHARE, seed: int = 0
    ):
        self.bench = bench
        self.factor = factor
        self.share = share
        self.seed = seed
        self._made: dict[str, Weights] = {}

    def channels(self, outliers: str) -> list[int]:
        """The channels that become outliers."""
        config = self.bench.model.config
        if outliers == "MLP hidden":
            width = config.intermediate_size
        else:
            width = config.hidden_size
        rng = np.random.default_rng(self.seed)
        return choose_channels(width, max(1, round(self.share * width)), rng)

    def injected(self, outliers: str) -> Weights:
        """The weights with their outliers."""
        if outliers not in self._made:
            self._made[outliers] = inject_outliers(
                self.bench.model.weights,
                self.channels(outliers),
                self.factor,
                OUTLIERS[outliers],
            )
        return self._made[outliers]

    def measure(self, case: Case) -> Json:
        """A row of the table."""
        model = self.bench.model
        quantised, _ = quantize_model(
            Model(model.config, self.injected(case.outliers), model.tokenizer),
            "smoothquant",
            calibration=self.bench.calibration(self.seed),
            alpha=case.alpha,
            level=case.level,
            keep=case.keep,
        )
        found = self.bench.compare(quantised)
        return asdict(case) | {
            "bits per byte": found.model.bits_per_byte,
            "full precision": found.reference.bits_per_byte,
            "increase": ends(increase(found)),
            "kl": ends(found.kl),
        }

    def table(self, wanted: Sequence[Case], cache: Path) -> Iterator[Json]:
        """The rows of ``wanted``, each computed or taken from ``cache``."""
        for case in wanted:
            key = digest_of(self.bench.settings, asdict(case), self.factor, self.share, self.seed)
            yield computed_once(cache / f"{key}.json", partial(self.measure, case))


# --- the figure ---------------------------------------------------------------------------

SCALES = {"O1": "scale per token", "O2": "scale per tensor", "O3": "static scale"}


@styled
def draw(values: Values) -> Figure:
    """{"rows": [{"outliers", "level", "alpha", "keep", "kl", "bits per byte", "full
    precision"}]} → above, KL over α; below, where it helps and where not.

    KL tells networks apart whose bits per byte differ by less than chance; the latter stand
    beside it, in per cent.
    """
    fig = new_figure(6.2)
    # apart, so that the long names below do not make the upper plot narrow
    grid = fig.add_gridspec(2, 1)
    _draw_alpha(fig.add_subfigure(grid[0]).subplots(), values)
    _draw_cases(fig.add_subfigure(grid[1]).subplots(), values["rows"])
    return fig


def _draw_alpha(ax: Axes, values: Values) -> None:
    """KL over α for each level, and without smoothing dashed."""
    rows = values["rows"]
    names = []
    for at, (colour, level) in enumerate(
        coloured((TECHNIQUE, MORE[0], MORE[1]), _distinct(rows, "level"))
    ):
        smooth = [
            r for r in rows if (r["outliers"], r["level"], list(r["keep"])) == ("norms", level, [])
        ]
        curve = sorted((r["alpha"], r["kl"][0]) for r in smooth if r["alpha"] is not None)
        ax.plot(*zip(*curve, strict=True), color=colour, marker="o", ms=4)
        names.append((*curve[-1], f"{level}, smoothed ({SCALES[level]})", colour))
        plain = _row(rows, "norms", level, None)
        # dashes in turn: where two levels are equally bad, both are visible
        ax.axhline(plain["kl"][0], color=colour, ls=(6 * at, (5, 7)), lw=1.6)
        names.append(
            (1, plain["kl"][0], f"{level}, not smoothed: {_loss(plain)} bits per byte", colour)
        )
    ax.set(
        title=f"W8A8 with outliers of {values['factor']:g}×: smoothing removes their cost",
        xlabel="α",
        ylabel="KL (nats per token, log)",
        yscale="log",
    )
    end_labels(ax, names, gap=0.1, fontsize=8)


def _draw_cases(ax: Axes, rows: Sequence[Json]) -> None:
    """KL at O1, one dot per case: smoothed or not, with o_proj and down_proj kept or not."""
    keep = ["o_proj", "down_proj"]
    drawn = [
        ("no outliers, not smoothed", "nothing", None, []),
        ("behind norms, not smoothed", "norms", None, []),
        ("behind norms, not smoothed, o and down kept", "norms", None, keep),
        ("behind norms, smoothed", "norms", 0.5, []),
        ("behind norms, smoothed, o and down kept", "norms", 0.5, keep),
        ("MLP hidden, not smoothed", "MLP hidden", None, []),
        ("MLP hidden, smoothed", "MLP hidden", 0.5, []),
        ("MLP hidden, smoothed, down kept", "MLP hidden", 0.5, ["down_proj"]),
    ]
    found = [_row(rows, outliers, "O1", alpha, kept) for _, outliers, alpha, kept in drawn]
    kl = [max(r["kl"][0], 1e-9) for r in found]
    for y, r in enumerate(found):
        ax.plot(kl[y], y, "o", color=FULL if r["alpha"] is None else TECHNIQUE, ms=7)
        annotate_right(ax, f"{_loss(r)} bits per byte", kl[y], y, 8)
    ax.set_yticks(range(len(drawn)), [name for name, *_ in drawn], fontsize=9)
    ax.set(
        title="It helps behind norms, not in the MLP",
        xscale="log",
        xlabel="KL at O1 (nats per token, log)",
    )
    ax.set_xlim(min(kl) / 2, 400 * max(kl))
    ax.set_ylim(len(drawn) - 0.5, -0.5)


def _row(
    rows: Sequence[Json], outliers: str, level: str, alpha: float | None, keep: Sequence[str] = ()
) -> Json:
    """The row of one case."""
    wanted = (outliers, level, alpha, list(keep))
    return next(
        r for r in rows if (r["outliers"], r["level"], r["alpha"], list(r["keep"])) == wanted
    )


def _loss(row: Json) -> str:
    """By how much the bits per byte rise."""
    percent = 100 * (row["bits per byte"] / row["full precision"] - 1)
    if abs(percent) < 0.1:
        return "under 0.1 %"
    digits = 0 if abs(percent) >= 10 else 1
    return f"{percent:+.{digits}f} %".replace("-", "−")


def _distinct(rows: Sequence[Json], key: str) -> list[str]:
    """The values of a column, in the order in which they occur."""
    return list(dict.fromkeys(row[key] for row in rows))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every case, or what is missing of them, and write the record that the figure
    is drawn from.
    """
    parser = argparse.ArgumentParser(
        prog="python -m refllm.experiments.smoothquant", description=main.__doc__
    )
    add = parser.add_argument
    add("--model", default="stdlib", help="a bundled model's name, or a checkpoint's folder")
    add("--output", type=Path, default=Path("figures/data/smoothquant.json"))
    add("--cache", type=Path, default=Path("build/smoothing"), help="where finished cases are kept")
    add("--alphas", nargs="+", type=float, default=ALPHAS)
    add("--excerpts", type=int, default=EXCERPTS, help=f"held-out excerpts of {LENGTH} tokens")
    chosen = parser.parse_args(arguments)
    with threadpool_limits(limits=1, user_api="blas"):
        experiment = Experiment(open_bench(chosen.model, chosen.excerpts))
        wanted = cases(chosen.alphas)
        rows = []
        for case, row in zip(wanted, experiment.table(wanted, chosen.cache), strict=True):
            rows.append(row)
            worse = row["increase"][0] / row["full precision"]
            print(
                f"[{len(rows)}/{len(wanted)}] {case.name}: "
                f"{row['bits per byte']:.4f} bits per byte, {worse:+.1%}",
                file=sys.stderr,
            )
    values = {
        "model": Path(chosen.model).name,
        "factor": FACTOR,
        "settings": experiment.bench.settings,
        "channels": {
            name: experiment.channels(name) for name, inputs in OUTLIERS.items() if inputs
        },
        "rows": rows,
        "versions": versions(),
    }
    command = "python -m refllm.experiments.smoothquant"
    write(chosen.output, Record(command, "A", one_thread(), values))


if __name__ == "__main__":
    main()
