"""What quantisation costs: KL to full precision, top-1 agreement and bits per byte, methods
× bits × granularity.

Every cell of the table is a model that was quantised once and compared with the original on
the same held-out text, token by token (``held_out_bench``). ``against rtn`` is paired in the
same way: the KL of a method minus that of round to nearest at the same bits and granularity.

    python -m refllm.experiments.quantization_quality  # writes figures/data/quantization.json
    refllm figures                                     # draws it

A finished cell is kept in ``--cache``: a command that was interrupted continues there.

| symbol    | name                                                               | unit           |
|-----------|--------------------------------------------------------------------|----------------|
| KL        | mean of KL(full precision ‖ quantised) over tokens                 | nats per token |
| agreement | share of tokens at which both have the same most likely token      |                |
| bits/byte | loss of the quantised model; ``increase`` is its paired difference | bits per byte  |
| bits      | stored bits per quantised weight, with scales and zero points      |                |

Left out: the whole held-out text (``refllm eval`` scores it), speed.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from threadpoolctl import threadpool_limits

from refllm.array_types import Json
from refllm.checkpoints.tensor_files import tensor_shapes
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
from refllm.formats.uniform import Scheme
from refllm.measure.device import one_thread, versions
from refllm.measure.plotting import MORE, NEAREST, TECHNIQUE, axes, styled
from refllm.measure.records import Record, Values, write
from refllm.quant.recipe import METHODS, quantize_model

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BITS = (8, 4, 3, 2)
GROUPS = (0, 128, 64, 32)  # weights that share a scale; 0 is a whole row ("channel")
SEEDS = (0, 1, 2)
BY_ROW_8 = ("smoothquant", "int8")  # weights and activations in 8 bits: one cell each
ALL_METHODS = ("rtn", "gptq", "awq", *BY_ROW_8)


@dataclass(frozen=True)
class Cell:
    """One quantised model. ``group`` 0 is one scale per row; ``seed`` draws the calibration
    text, None for methods that need none.
    """

    method: str
    bits: int
    group: int
    rule: str
    seed: int | None

    @property
    def scheme(self) -> Scheme:
        """The number format of its weights."""
        if self.group:
            return Scheme(self.bits, self.rule, "group", self.group)
        return Scheme(self.bits, self.rule, "channel")

    @property
    def name(self) -> str:
        """For a line of progress.

        >>> Cell("gptq", 4, 64, "half_integer", 7).name
        'gptq, 4 bits, groups of 64, seed 7'
        """
        parts = [self.method, f"{self.bits} bits"]
        parts.append(f"groups of {self.group}" if self.group else "one scale per row")
        if self.seed is not None:
            parts.append(f"seed {self.seed}")
        return ", ".join(parts)


def cells(
    methods: Iterable[str] = ALL_METHODS,
    bits: Sequence[int] = BITS,
    groups: Sequence[int] = GROUPS,
    seeds: Sequence[int] = SEEDS,
    rule: str = "half_integer",
) -> list[Cell]:
    """The table, round to nearest first; a method that needs no calibration has one cell
    where others have one per seed.
    """
    found = []
    for method in sorted(methods, key=lambda name: name != "rtn"):
        drawn = list(seeds) if METHODS[method].calibrates else [None]
        if method in BY_ROW_8:
            found += [Cell(method, 8, 0, "restricted", seed) for seed in drawn if 8 in bits]
            continue
        found += [Cell(method, b, g, rule, seed) for b in bits for g in groups for seed in drawn]
    return found


def cell_key(bench: HeldOutBench, cell: Cell) -> str:
    """The name of a cell's file in the cache."""
    return digest_of(bench.settings, asdict(cell))


def measure(bench: HeldOutBench, cell: Cell) -> Json:
    """Quantise and compare: {"row": a row of the table, "kl": the KL of each token}."""
    began = time.perf_counter()
    calibration = None if cell.seed is None else bench.calibration(cell.seed)
    quantised, report = quantize_model(bench.model, cell.method, cell.scheme, calibration)
    seconds = time.perf_counter() - began
    found = bench.compare(quantised)
    row = {
        "method": cell.method,
        "bits": cell.bits,
        "group": cell.group,
        "rule": cell.rule,
        "seed": cell.seed,
        "bits per weight": report.bits_per_weight,
        "bytes": report.nbytes,
        "kl": ends(found.kl),
        "agreement": ends(found.agreement),
        "bits per byte": found.model.bits_per_byte,
        "increase": ends(increase(found)),
        "quantising seconds": round(seconds, 3),
    }
    return {"row": row, "kl": found.token_kl.tolist()}


def table(bench: HeldOutBench, wanted: Sequence[Cell], cache: Path) -> Iterator[Json]:
    """The rows of ``wanted``, each computed or taken from ``cache``, with its difference
    from round to nearest.
    """
    nearest: dict[tuple[int, int, str], np.ndarray] = {}  # KL of each token [T]
    for cell in wanted:
        file = cache / f"{cell_key(bench, cell)}.json"
        found = computed_once(file, partial(measure, bench, cell))
        row: Json = found["row"]
        kl = np.asarray(found["kl"])
        place = (cell.bits, cell.group, cell.rule)
        if cell.method == "rtn":
            nearest[place] = kl
        elif place in nearest:
            row["against rtn"] = ends(bench.paired(kl, nearest[place]))
        yield row


def values(bench: HeldOutBench, name: str, rows: Sequence[Json]) -> Json:
    """What the record holds: the rows, and what they were measured on."""
    config = bench.model.config
    shapes = [shape for name, shape in tensor_shapes(config) if name.endswith("_proj.weight")]
    reference = bench.compare(bench.model).reference
    return {
        "model": name,
        "parameters": config.num_parameters,
        "quantised": sum(math.prod(shape) for shape in shapes),
        "full precision": {
            "bits per byte": reference.bits_per_byte,
            "tokens": reference.tokens,
            "bytes": reference.bytes,
        },
        "settings": bench.settings,
        "versions": versions(),
        "rows": list(rows),
    }


# --- the figure ---------------------------------------------------------------------------

# method → colour, marker and name; W8A8 rounds activations too, which the others do not
LINES = {
    "rtn": (NEAREST, "o", "RTN (round to nearest)"),
    "awq": (MORE[0], "s", "AWQ"),
    "gptq": (TECHNIQUE, "o", "GPTQ"),
    "int8": (MORE[3], "D", "LLM.int8(), W8A8"),
    "smoothquant": (MORE[1], "^", "SmoothQuant, W8A8"),
}


@styled
def draw(values: Values) -> Figure:
    """{"rows": [{"method", "bits", "group", "kl": [mean, low, high], "bits per weight"}]} →
    KL against stored bits per weight.

    A line joins the group sizes of one bit width. Rows that differ in the seed alone are one
    point: their mean, and whiskers around all of their intervals.
    """
    rows = values["rows"]
    fig, ax = axes(
        "From 3 bits upwards GPTQ is closest to full precision",
        "stored bits per weight, scales included (log)",
        "KL from full precision (nats per token, log)",
        figsize=(7.2, 4.8),
    )
    ax.set_xscale("log")
    ax.set_yscale("log")
    for method in LINES:
        for bits in dict.fromkeys(row["bits"] for row in rows):
            _line(ax, method, [r for r in rows if (r["method"], r["bits"]) == (method, bits)])
    for bits in dict.fromkeys(row["bits"] for row in rows):
        cluster = [row for row in rows if row["bits"] == bits]
        left = min(row["bits per weight"] for row in cluster)
        top = max(row["kl"][0] for row in cluster)
        ax.annotate(
            f"{bits} bits", (left, top), xytext=(-2, 9), textcoords="offset points", fontsize=9
        )
    sizes = sorted({round(row["bits per weight"], 1) for row in rows})
    ticks = [s for s in (2, 2.5, 3, 3.5, 4, 4.5, 8, 8.5) if sizes[0] - 0.2 <= s <= sizes[-1] + 0.2]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.minorticks_off()
    ax.margins(x=0.05, y=0.08)
    groups = sorted({row["group"] for row in rows if row["group"]}, reverse=True)
    lines = ", ".join(map(str, groups))
    ax.legend(
        loc="lower left", fontsize=9, title_fontsize=8.5, alignment="left",
        title=f"left to right: one scale per row, groups of {lines}",
    )  # fmt: skip
    return fig


def _line(ax: Axes, method: str, rows: Sequence[Json]) -> None:
    """A method's line at one bit width, if it has any rows there."""
    colour, marker, name = LINES[method]
    points = []
    for size in sorted({row["bits per weight"] for row in rows}):
        kl = [row["kl"] for row in rows if row["bits per weight"] == size]
        mean = sum(k[0] for k in kl) / len(kl)
        points.append((size, mean, mean - min(k[1] for k in kl), max(k[2] for k in kl) - mean))
    if not points:
        return
    x, y, below, above = zip(*points, strict=True)
    label = "_" if name in ax.get_legend_handles_labels()[1] else name
    size = 7 if method == "rtn" else 4.5  # AWQ's markers lie on RTN's where both are equal
    ax.errorbar(
        x, y, yerr=(below, above), color=colour, marker=marker, ms=size, lw=1.4, label=label
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the table, or what is missing of it, and write the record that the figure is
    drawn from.
    """
    parser = argparse.ArgumentParser(
        prog="python -m refllm.experiments.quantization_quality", description=main.__doc__
    )
    add = parser.add_argument
    add("--model", default="stdlib", help="a bundled model's name, or a checkpoint's folder")
    add("--output", type=Path, default=Path("figures/data/quantization.json"))
    add("--cache", type=Path, default=Path("build/quality"), help="where finished cells are kept")
    add("--methods", nargs="+", default=ALL_METHODS, choices=METHODS)
    add("--bits", nargs="+", type=int, default=BITS)
    add("--groups", nargs="+", type=int, default=GROUPS, help="weights per scale; 0 is a row")
    add("--seeds", nargs="+", type=int, default=SEEDS, help="of the calibration text")
    add("--excerpts", type=int, default=EXCERPTS, help=f"held-out excerpts of {LENGTH} tokens")
    chosen = parser.parse_args(arguments)
    with threadpool_limits(limits=1, user_api="blas"):
        bench = open_bench(chosen.model, chosen.excerpts)
        wanted = cells(chosen.methods, chosen.bits, chosen.groups, chosen.seeds)
        rows = []
        for cell, row in zip(wanted, table(bench, wanted, chosen.cache), strict=True):
            rows.append(row)
            mean, low, high = row["kl"]
            print(
                f"[{len(rows)}/{len(wanted)}] {cell.name}: KL {mean:.5f} [{low:.5f}, {high:.5f}]",
                file=sys.stderr,
            )
        made = values(bench, Path(chosen.model).name, rows)
    command = "python -m refllm.experiments.quantization_quality"
    write(chosen.output, Record(command, "A, B", one_thread(), made))


if __name__ == "__main__":
    main()
