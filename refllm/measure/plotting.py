"""What every figure shares: the style, the colours and the axes.

Colours mean the same everywhere (the palette of Okabe & Ito 2008, told apart by the
colour-blind): grey is full precision or the baseline, orange round-to-nearest, blue the
technique that the figure is about.

Left out: ``pyplot`` and its global state. Every function returns a ``Figure``, which a
notebook shows as it is (after ``%matplotlib inline``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import wraps
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

FULL = "#6b6b6b"
NEAREST = "#e69f00"
TECHNIQUE = "#0072b2"
MORE = ("#009e73", "#cc79a7", "#56b4e9", "#d55e00")  # further series, in this order
SERIES = (TECHNIQUE, NEAREST, FULL, *MORE)
STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters on every machine
    "font.size": 10,
    "axes.titlesize": 11.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "lines.linewidth": 2,
    "legend.frameon": True,  # a white ground without an edge: text stays readable over lines
    "legend.framealpha": 0.9,
    "legend.edgecolor": "none",
    "legend.fancybox": False,
    "figure.figsize": (7.2, 4.2),
    "figure.dpi": 100,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",  # readable on a dark page too
}

Values = Mapping[str, Any]
Draw = Callable[[Values], Figure]


def styled(draw: Draw) -> Draw:
    """Run ``draw`` under the project's style, whatever the caller's own is."""

    @wraps(draw)
    def wrapper(values: Values) -> Figure:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(STYLE)
            return draw(values)

    return wrapper


def axes(title: str, x: str, y: str, **figure: Any) -> tuple[Figure, Axes]:
    """A figure with one pair of axes; labels name the unit."""
    fig = Figure(layout="constrained", **figure)
    ax = fig.add_subplot()
    ax.set(title=title, xlabel=x, ylabel=y)
    return fig, ax


def end_labels(
    ax: Axes, ends: Iterable[tuple[float, float, str, str]], gap: float, **text: Any
) -> None:
    """(x, y, name, colour) of each line's end → the name to the right of the axes, after a
    dot in the line's colour.

    Names stand at least ``gap`` of the axes' height apart, the higher end's above; limits
    are to be set before.
    """
    ax.get_ylim()  # from here on the limits are known
    place = ax.transScale + ax.transLimits
    lowest = 2.0
    known = [(float(place.transform((x, y))[1]), name, colour) for x, y, name, colour in ends]
    for height, name, colour in sorted(known, reverse=True):
        lowest = min(height, lowest - gap)
        # letters in a light colour are hard to read
        for at, part, ink in ((4, "●", colour), (15, name, "black")):
            ax.annotate(
                part,
                (1, lowest),
                xycoords="axes fraction",
                xytext=(at, 0),
                textcoords="offset points",
                va="center",
                color=ink,
                **{"fontsize": 8.5} | text,
            )


def coloured(colours: Sequence[str], items: Iterable[Any]) -> list[tuple[str, Any]]:
    """Each item with its colour; ValueError rather than a figure that leaves the last ones
    out.
    """
    drawn = list(items)
    if len(drawn) > len(colours):
        raise ValueError(f"a figure tells {len(colours)} series apart, got {len(drawn)}")
    return list(zip(colours, drawn, strict=False))
