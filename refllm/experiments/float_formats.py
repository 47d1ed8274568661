"""What number formats cost, on one weight matrix and on data of four kinds; and why FP8 sums
are promoted.

    python -m refllm.experiments.float_formats  # writes figures/data/float_formats.json
    refllm figures                              # draws it

| part        | what is counted                                                            |
|-------------|----------------------------------------------------------------------------|
| data        | ‖x̂ − x‖ / ‖x‖ of INT8, E4M3 and E5M2, one scale per token                 |
| accumulator | error of a sum of K products relative to its size, in 14 bits, promoted or |
|             | not                                                                        |
| delayed     | share of elements beyond a scale from the past, while the range grows      |

``FORMATS`` lists every format of a weight; ``rows`` gives bits and error of each on a matrix
of the reader's choice.

Left out: speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from refllm.array_types import Array, Json
from refllm.formats.block_float import MXFP4, MXFP8, NVFP4, FloatScheme
from refllm.formats.block_float import quantize as to_floats
from refllm.formats.fp8_linear import Accumulator
from refllm.formats.gguf.codec import quantize as to_blocks
from refllm.formats.gguf.linear import GGUFLinear
from refllm.formats.quantized_linear import QuantizedLinear, quantize
from refllm.formats.uniform import Scheme
from refllm.measure.plotting import FULL, MORE, NEAREST, TECHNIQUE, new_figure, styled
from refllm.measure.records import Record, Values, write
from refllm.model.weights import Linear
from refllm.quant.fp8 import DelayedScale, integers_or_floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
GROWTHS = (1.0, 1.02, 1.05, 1.1, 1.2, 1.5, 2.0)  # of the range, per step


def _gguf(type: str, weight: Array) -> GGUFLinear:
    """W[M, N] in blocks of a GGUF type."""
    return GGUFLinear(to_blocks(weight, type), type)


def _integers(bits: int, group: int, weight: Array) -> QuantizedLinear:
    """W[M, N] in integer codes, one scale per group."""
    return quantize(weight, Scheme(bits, "half_integer", "group", group), scale_dtype="float16")


# Name → a weight [M, N] in that format; further formats add a line.
FORMATS: dict[str, Callable[[Array], Linear]] = {
    "INT8, one scale per row": lambda w: quantize(
        w, Scheme(8, "restricted", "channel"), scale_dtype="float16"
    ),
    "FP8 E4M3, blocks of 128 × 128": lambda w: to_floats(w, FloatScheme("e4m3", "block", 128)),
    "FP8 E5M2, blocks of 128 × 128": lambda w: to_floats(w, FloatScheme("e5m2", "block", 128)),
    "MXFP8": lambda w: to_floats(w, MXFP8),
    "INT4, groups of 128": partial(_integers, 4, 128),
    "INT4, groups of 32": partial(_integers, 4, 32),
    "NVFP4": lambda w: to_floats(w, NVFP4),
    "MXFP4": lambda w: to_floats(w, MXFP4),
    **{
        f"GGUF {t}": partial(_gguf, t)
        for t in ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "Q3_K", "Q2_K")
    },
}


def rows(
    weight: np.ndarray, formats: Sequence[str] = tuple(FORMATS)
) -> list[tuple[str, float, float, np.ndarray]]:
    """(name, stored bits per weight, ‖Ŵ − W‖ / ‖W‖, Ŵ) of W[M, N] in each format whose
    groups divide its rows.
    """
    found = []
    for name in formats:
        try:
            made = FORMATS[name](weight)
        except ValueError:  # groups that do not divide a row
            continue
        back = np.asarray(made.dequantize())
        error = float(np.linalg.norm(back - weight) / np.linalg.norm(weight))
        found.append((name, float(made.bits_per_weight), error, back))
    return found


def data(rng: np.random.Generator, tokens: int = 64, channels: int = 1024) -> dict[str, np.ndarray]:
    """x[T, N] of four kinds, from even to heavy-tailed."""
    normal = rng.standard_normal((tokens, channels))
    outlier = np.where(np.arange(channels) == 5, 60.0, 1.0)  # as large models have
    kinds = {
        "uniform": rng.uniform(-1, 1, (tokens, channels)),
        "normal": normal,
        "heavy tail (t, 2 d.o.f.)": rng.standard_t(2, (tokens, channels)),
        "one outlier channel": normal * outlier,
    }
    return {name: x.astype(np.float32) for name, x in kinds.items()}


def accumulator_errors(
    rng: np.random.Generator, lengths: Sequence[int] = LENGTHS
) -> dict[str, list[float]]:
    """Root mean square error of 256 sums of K products, relative to that of the sums."""
    kinds = {
        "14 bits, never promoted": Accumulator(14, 16, None),
        "14 bits, promoted every 128": Accumulator(14, 16),
        "float32": Accumulator(24, 16, None),
    }
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for k in lengths:
        x, w = (rng.standard_normal((16, k)).astype(np.float32) for _ in range(2))
        exact = x.astype(np.float64) @ w.astype(np.float64).T
        for name, accumulator in kinds.items():
            off = np.asarray(accumulator.product(x, w)) - exact
            found[name].append(math.sqrt(float(np.mean(off**2)) / float(np.mean(exact**2))))
    return found


def delayed_shares(rng: np.random.Generator, steps: int = 40) -> list[float]:
    """Share of elements that a delayed scale saturates, for each growth of the range per step."""
    shares = []
    for growth in GROWTHS:
        scale = DelayedScale()
        x = rng.uniform(-1, 1, (32, 256)).astype(np.float32)
        for step in range(steps):
            scale.quantize(x * np.float32(growth**step))
        shares.append(scale.saturated / scale.seen)
    return shares


def values() -> Json:
    """What the figure draws: counted, the same on every machine except for the last digit."""
    rng = np.random.default_rng(0)
    return {
        "data": {
            name: {f: math.sqrt(e) for f, e in integers_or_floats(x).items()}
            for name, x in data(rng).items()
        },
        "lengths": list(LENGTHS),
        "accumulator": accumulator_errors(rng),
        "growths": list(GROWTHS),
        "delayed": delayed_shares(rng),
    }


# --- the figure ---------------------------------------------------------------------------


@styled
def draw(values: Values) -> Figure:
    """{"data": {kind: {format: error}}, "lengths", "accumulator": {name: errors},
    "growths", "delayed"} → 3 panels.
    """
    fig = new_figure(6.2)
    grid = fig.add_gridspec(2, 2)
    _draw_data(fig.add_subplot(grid[0, :]), values["data"])
    _draw_accumulators(fig.add_subplot(grid[1, 0]), values)
    _draw_delayed(fig.add_subplot(grid[1, 1]), values)
    return fig


def _draw_data(ax: Axes, kinds: Json) -> None:
    """Bars: the error of each format on each kind of data."""
    for at, (name, colour) in enumerate(
        {"int8": NEAREST, "e4m3": TECHNIQUE, "e5m2": MORE[0]}.items()
    ):
        places = np.arange(len(kinds)) + 0.26 * (at - 1)
        heights = [100 * errors[name] for errors in kinds.values()]
        bars = ax.bar(places, heights, 0.24, color=colour, label=name.upper())
        ax.bar_label(bars, fmt="%.2g", fontsize=8)
    ax.set_xticks(range(len(kinds)), list(kinds))
    ax.set(
        title="INT8 wins on even ranges, E4M3 where few elements are large",
        ylabel="error (% of ‖x‖)",
    )
    ax.margins(y=0.12)  # room for the label of the highest bar
    ax.grid(False, axis="x")
    ax.legend(loc="upper left", ncols=3)


def _draw_accumulators(ax: Axes, values: Values) -> None:
    """Error of a sum of K products by K, a line for each accumulator."""
    for colour, (name, errors) in zip(
        (NEAREST, TECHNIQUE, FULL), values["accumulator"].items(), strict=True
    ):
        ax.plot(values["lengths"], errors, marker="o", ms=3.5, color=colour, label=name)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_ylim(top=2)
    ax.set(title="14-bit sums drift unless promoted", xlabel="K, products in a sum (log)")
    ax.set_ylabel("relative error (rms, log)")
    ax.legend(loc="upper left", fontsize=8)


def _draw_delayed(ax: Axes, values: Values) -> None:
    """Share of elements that saturate, by the growth of the range."""
    growth = [100 * (g - 1) for g in values["growths"]]
    shares = [100 * share for share in values["delayed"]]
    ax.plot(growth, shares, marker="o", ms=3.5, color=NEAREST, label="delayed scaling")
    ax.plot(growth, [0.0] * len(growth), color=TECHNIQUE, label="current scaling")
    ax.set(
        title="Delayed scaling saturates",
        xlabel="growth of the range (% per step)",
        ylabel="saturated (% of elements)",
    )
    ax.legend(loc="upper left", fontsize=8)


def main(path: str = "figures/data/float_formats.json") -> None:
    """Write the record that the figure is drawn from."""
    write(path, Record("python -m refllm.experiments.float_formats", "A", "none", values()))


if __name__ == "__main__":
    main()
