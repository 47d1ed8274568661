"""The project's figures: one style, drawn from committed data, byte for byte the same each
time.

``figures/data/NAME.json`` is a record (see ``records``): numbers with the command that made
them, their kind and the hardware. ``redraw`` turns each into ``figures/NAME.png``;
``check`` tells which are stale. A picture carries a digest of its data and of the code that
drew it, so staleness does not depend on the version of matplotlib.

The figures of the network stand here, those of other rooms in ``figures_*.py``; what they
share is in ``drawing``.
"""

from __future__ import annotations

import hashlib
import inspect
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from refllm.figures.costs import decode_cost, kv_memory, roofline
from refllm.figures.floats import float_formats, fp8_training
from refllm.figures.formats import gguf_layouts, gguf_mixes
from refllm.figures.kv import kv_quantization, kv_sparsity
from refllm.figures.quant import observers, quantization, salience, smoothquant
from refllm.figures.serve import batching, paging, prefixes, unpadding
from refllm.figures.speculative import speculative
from refllm.figures.timeline import serving_blocks, serving_occupancy, serving_tree
from refllm.measure import plotting
from refllm.measure.plotting import (  # noqa: F401 (the notebooks take their colours from here)
    FULL,
    MORE,
    NEAREST,
    SERIES,
    STYLE,
    TECHNIQUE,
    Draw,
    Values,
    axes,
    coloured,
    styled,
)
from refllm.measure.records import Record, read

_KEY = "refllm-digest"
_DPI = 160  # 1,152 pixels wide: sharp where a repository page shows 800


@styled
def training_curve(values: Values) -> Figure:
    """{"runs": {name: [record of curve.json, …]}, "phases": [[tokens, label], …],
    "bytes_per_token"} → loss by tokens.

    With ``bytes_per_token`` of the held-out text a second scale gives bits per byte.
    """
    fig, ax = axes(
        "Training: loss of the batch (thin) and on held-out modules",
        "tokens read (millions)",
        "loss (nats per token)",
    )
    for colour, (name, curve) in coloured(SERIES, values["runs"].items()):
        ax.plot(
            [1e-6 * r["tokens"] for r in curve],
            [r["loss"] for r in curve],
            color=colour,
            lw=0.8,
            alpha=0.45,
        )
        held = [(1e-6 * r["tokens"], r["held_out"]) for r in curve if "held_out" in r]
        if held:
            ax.plot(
                *zip(*held, strict=True),
                color=colour,
                label=f"{name}: {held[-1][1]:.2f} at the end (a few held-out windows)",
            )
    phases = values.get("phases", [])
    end = 1e-6 * max(r["tokens"] for c in values["runs"].values() for r in c)
    ax.set_xlim(0, 1.05 * end)
    _phases(ax, phases, end)
    if size := values.get("bytes_per_token"):
        factor = 1 / (np.log(2) * size)
        right = ax.secondary_yaxis("right", functions=(lambda y: y * factor, lambda y: y / factor))
        right.set_ylabel("bits per byte")
        right.spines["right"].set_visible(True)
    late = [1e-6 * tokens / ax.get_xlim()[1] for tokens, _ in phases if 1e-6 * tokens > 0.8 * end]
    # under the names of the phases, and to the left of the last ones' lines
    ax.legend(
        loc="upper right",
        bbox_to_anchor=(min(late, default=1), 0.96 - 0.06 * len(phases)),
        fontsize=9,
    )
    return fig


def _phases(ax: Axes, phases: Sequence[Any], end: float) -> None:
    """A line where each phase ends, and its name to the left; a strip too narrow for that
    has an arrow to it.
    """
    begin = 0.0
    wide = 0.0
    for i, (tokens, label) in enumerate(phases):
        till = 1e-6 * tokens
        height = 0.96 - 0.06 * i
        arrow = None
        if till - begin > 0.1 * end:
            wide = till
        else:  # the name stands before the last wide strip's end, where no line strikes it
            arrow = {"arrowstyle": "->", "color": FULL, "lw": 0.8, "shrinkA": 1, "shrinkB": 0}
        ax.axvline(till, color=FULL, lw=0.8, ls=":")
        ax.annotate(
            label,
            ((begin + till) / 2, height),
            (wide - 0.005 * end, height),
            ("data", "axes fraction"),
            arrowprops=arrow,
            ha="right",
            va="center",
            fontsize=8,
            color=FULL,
        )
        begin = till


@styled
def bits_by_position(values: Values) -> Figure:
    """{"lines": {name: [bin of ``score.bits_by_position`` as [low, high, tokens, nats,
    bits], …]}}.
    """
    fig, ax = axes("What context buys", "tokens of context", "bits per byte of held-out text")
    ticks: set[int] = set()
    for colour, (name, bins) in coloured(SERIES, values["lines"].items()):
        # a bin from 5 to 8 is drawn above 8: "up to 8 tokens of context"
        ax.plot(
            [b[1] for b in bins], [b[4] for b in bins], color=colour, marker="o", ms=4, label=name
        )
        ticks |= {b[1] for b in bins}
    ax.set_xscale("log", base=2)
    ax.set_xticks(sorted(ticks), [str(t) if t == 1 else f"≤{t}" for t in sorted(ticks)])
    ax.minorticks_off()
    ax.set_ylim(bottom=0)
    ax.legend()
    return fig


FIGURES: dict[str, tuple[str, Draw]] = {
    "training_curve": ("training_curve.json", training_curve),
    "bits_by_position": ("bits_by_position.json", bits_by_position),
    "roofline": ("roofline.json", roofline),
    "decode_cost": ("decode_cost.json", decode_cost),
    "kv_memory": ("kv_memory.json", kv_memory),
    "kv_quantization": ("kv_quantization.json", kv_quantization),
    "kv_sparsity": ("kv_sparsity.json", kv_sparsity),
    "speculative": ("speculative.json", speculative),
    "quantization": ("quantization.json", quantization),
    "observers": ("observers.json", observers),
    "smoothquant": ("smoothquant.json", smoothquant),
    "salience": ("salience.json", salience),
    "gguf_layouts": ("gguf_layouts.json", gguf_layouts),
    "gguf_kquants": ("gguf_kquants.json", gguf_layouts),
    "gguf_mixes": ("gguf_mixes.json", gguf_mixes),
    "float_formats": ("float_formats.json", float_formats),
    "fp8_training": ("fp8_training.json", fp8_training),
    "paging": ("paging.json", paging),
    "batching": ("batching.json", batching),
    "unpadding": ("unpadding.json", unpadding),
    "prefixes": ("prefixes.json", prefixes),
    "serving_occupancy": ("serving_trace.json", serving_occupancy),
    "serving_blocks": ("serving_trace.json", serving_blocks),
    "serving_tree": ("serving_trace.json", serving_tree),
}


def save(figure: Figure, path: str | Path, digest: str = "") -> Path:
    """Write a PNG of 1,152 or so pixels' width; the same figure gives the same bytes (no
    date, no version).

    ``digest`` is stored in the file for ``check``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Software": None} | ({_KEY: digest} if digest else {})
    # some settings are read when the figure is drawn, not when it is made
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure.savefig(path, format="png", dpi=_DPI, metadata=metadata)
    return path


def redraw(names: Iterable[str] | None = None, folder: str | Path = "figures") -> list[Path]:
    """Draw the named figures (default: all that have data) from ``folder/data`` and return
    what was written.

    Raises
    ------
    KeyError
        for a name that is not registered.
    FileNotFoundError
        if a figure asked for by name has no data.
    ValueError
        for data that is not what the figure is drawn from; the old picture stays.
    """
    folder = Path(folder)
    written = []
    for name in FIGURES if names is None else [names] if isinstance(names, str) else names:
        file, draw = FIGURES[name]
        source = folder / "data" / file
        if names is None and not source.exists():
            continue
        record = read(source)
        try:
            figure = draw(record.values)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{source} holds other values than {name} is drawn from: {error!r}"
            ) from error
        _caption(figure, record)
        written.append(save(figure, folder / f"{name}.png", _digest(source, draw)))
    return written


def check(folder: str | Path = "figures") -> list[str]:
    """What is wrong with the committed figures, one sentence each; an empty list if they
    are up to date.
    """
    folder = Path(folder)
    complaints = []
    for name, (file, draw) in FIGURES.items():
        source = folder / "data" / file
        picture = folder / f"{name}.png"
        if not source.exists():
            complaints.append(f"{source} is missing: the figure {name} has no data")
        elif not picture.exists():
            complaints.append(f"{picture} is missing: run `make figures`")
        elif f"{_KEY}\0{_digest(source, draw)}".encode() not in picture.read_bytes():
            complaints.append(
                f"{picture} is stale: its data or its code changed; run `make figures`"
            )
    known = {f"{name}.png" for name in FIGURES}
    stray = sorted(p for p in folder.glob("*.png") if p.name not in known)
    return complaints + [f"{p} is drawn from no data: register it or remove it" for p in stray]


def _digest(source: Path, draw: Draw) -> str:
    """Of the data and of all code that decides what the picture looks like: with the
    figure, its helpers beside it.
    """
    module = inspect.getmodule(draw)
    assert module is not None
    code = "".join(inspect.getsource(part) for part in (module, plotting, draw, save, _caption))
    content = source.read_bytes() + repr((code, STYLE, SERIES, _DPI)).encode()
    return hashlib.sha256(content).hexdigest()


def _caption(figure: Figure, record: Record) -> None:
    """The provenance of the numbers, small, below the axes."""
    text = textwrap.fill(record.provenance(), 135)
    figure.supxlabel(text, x=0.01, ha="left", fontsize=6.5, color=FULL)
