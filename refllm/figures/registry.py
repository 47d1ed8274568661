"""The registry of the committed figures: which data each is drawn from, and by which function.

``figures/data/NAME.json`` is a record (see ``measure.records``): values with the command
that made them, whether they were counted, measured or projected, and the hardware.
``redraw`` turns each into ``figures/NAME.png``; ``check`` reports which pictures are stale.
A picture carries a digest of its data and of the code that drew it (``source_digest``), so
staleness does not depend on the version of matplotlib. The same record gives the same PNG,
byte for byte.

What a figure shows is decided in the experiment whose data it draws (``refllm.experiments``);
the style lies in ``measure.plotting``.
"""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from refllm.atomic import replacing
from refllm.errors import InputError
from refllm.experiments import (
    batching,
    float_formats,
    fp8_training_figure,
    gguf_layouts,
    gguf_mixes,
    kv_memory,
    kv_quantization,
    kv_sparsity_figure,
    language_programs,
    observer_ranges,
    paging,
    prefix_caching_figure,
    quantization_quality,
    roofline,
    salience,
    serving_timeline,
    smoothquant,
    speculative_decoding,
    structured_output,
    training_curves,
    unpadding,
)
from refllm.figures.source_digest import SourceReader
from refllm.measure.plotting import FULL, SERIES, STYLE, Draw
from refllm.measure.records import Record, read

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KEY = "refllm-digest"
_DPI = 160  # 1,152 pixels wide: sharp where a repository page shows 800

# name of the picture → (its record in figures/data, the function that draws it)
FIGURES: dict[str, tuple[str, Draw]] = {
    "training_curve": ("training_curve.json", training_curves.draw_curve),
    "bits_by_position": ("bits_by_position.json", training_curves.draw_positions),
    "roofline": ("roofline.json", roofline.draw_roofline),
    "decode_cost": ("decode_cost.json", roofline.draw_decode_cost),
    "kv_memory": ("kv_memory.json", kv_memory.draw),
    "kv_quantization": ("kv_quantization.json", kv_quantization.draw),
    "kv_sparsity": ("kv_sparsity.json", kv_sparsity_figure.draw),
    "speculative": ("speculative.json", speculative_decoding.draw),
    "speculative_batch": ("speculative.json", speculative_decoding.draw_batches),
    "quantization": ("quantization.json", quantization_quality.draw),
    "observers": ("observers.json", observer_ranges.draw),
    "smoothquant": ("smoothquant.json", smoothquant.draw),
    "salience": ("salience.json", salience.draw),
    "gguf_layouts": ("gguf_layouts.json", gguf_layouts.draw),
    "gguf_kquants": ("gguf_kquants.json", gguf_layouts.draw),
    "gguf_mixes": ("gguf_mixes.json", gguf_mixes.draw),
    "float_formats": ("float_formats.json", float_formats.draw),
    "fp8_training": ("fp8_training.json", fp8_training_figure.draw),
    "paging": ("paging.json", paging.draw),
    "batching": ("batching.json", batching.draw),
    "unpadding": ("unpadding.json", unpadding.draw),
    "prefixes": ("prefixes.json", prefix_caching_figure.draw),
    "structured_output": ("structured_output.json", structured_output.draw),
    "language_programs": ("language_programs.json", language_programs.draw),
    "serving_occupancy": ("serving_trace.json", serving_timeline.draw_occupancy),
    "serving_blocks": ("serving_trace.json", serving_timeline.draw_blocks),
    "serving_tree": ("serving_trace.json", serving_timeline.draw_tree),
}


def save(figure: Figure, path: str | Path, digest: str = "") -> Path:
    """Write a PNG about 1,152 pixels wide; the same figure gives the same bytes (no date, no
    version).

    ``digest`` is stored in the file for ``check``.
    """
    import matplotlib

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata: dict[str, str | None] = {"Software": None}
    if digest:
        metadata[_KEY] = digest
    # some settings are read when the figure is written, not when it is made
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        with replacing(path) as partial:
            figure.savefig(partial, format="png", dpi=_DPI, metadata=metadata)
    return path


def redraw(names: Iterable[str] | None = None, folder: str | Path = "figures") -> list[Path]:
    """Draw the named figures (default: all that have data) from ``folder/data`` and return
    the paths written.

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
    if isinstance(names, str):
        wanted: Iterable[str] = [names]
    elif names is None:
        wanted = [name for name, (file, _) in FIGURES.items() if (folder / "data" / file).exists()]
    else:
        wanted = names
    written = []
    reader = SourceReader()
    for name in wanted:
        file, draw = FIGURES[name]
        source = folder / "data" / file
        record = read(source)
        try:
            figure = draw(record.values)
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{source} holds other values than {name} is drawn from: {error!r}"
            ) from error
        _caption(figure, record)
        written.append(save(figure, folder / f"{name}.png", _digest(source, draw, reader)))
    return written


def check(folder: str | Path = "figures") -> list[str]:
    """What is wrong with the committed figures, one sentence each; an empty list if they
    are up to date.
    """
    folder = Path(folder)
    complaints = []
    reader = SourceReader()
    for name, (file, draw) in FIGURES.items():
        source = folder / "data" / file
        picture = folder / f"{name}.png"
        if not source.exists():
            complaints.append(f"{source} is missing: the figure {name} has no data")
        elif not picture.exists():
            complaints.append(f"{picture} is missing: run `make figures`")
        elif f"{_KEY}\0{_digest(source, draw, reader)}".encode() not in picture.read_bytes():
            complaints.append(
                f"{picture} is stale: its data or its code changed; run `make figures`"
            )
    known = {f"{name}.png" for name in FIGURES}
    stray = sorted(p for p in folder.glob("*.png") if p.name not in known)
    return complaints + [f"{p} is drawn from no data: register it or remove it" for p in stray]


def _digest(source: Path, draw: Draw, reader: SourceReader) -> str:
    """SHA-256 of the data and of all code that decides what the picture looks like."""
    code = reader.sources(draw, save, _caption, Record)
    content = source.read_bytes() + repr((code, STYLE, SERIES, _DPI)).encode()
    return hashlib.sha256(content).hexdigest()


def _caption(figure: Figure, record: Record) -> None:
    """Where the values come from, in small letters below the axes."""
    text = textwrap.fill(record.provenance(), 135)
    figure.supxlabel(text, x=0.01, ha="left", fontsize=6.5, color=FULL)
