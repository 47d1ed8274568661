"""What every figure shares: the style, the colours and the axes.

A colour means the same in every figure (the palette of Okabe & Ito 2008, which colour-blind
readers can tell apart): grey is full precision or the baseline, orange round to nearest,
blue the technique that the figure is about.

matplotlib takes half a second to import, so it is imported where a figure is drawn and not
at the top of a module: an experiment can be imported for its numbers alone.

Left out: ``pyplot`` and its global state. Every function returns a ``Figure``, which a
notebook shows as it is (after ``%matplotlib inline``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

from refllm.errors import InputError
from refllm.measure.records import Values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FULL = "#6b6b6b"  # full precision, or the baseline
NEAREST = "#e69f00"  # round to nearest
TECHNIQUE = "#0072b2"
MORE = ("#009e73", "#cc79a7", "#56b4e9", "#d55e00")  # further series, in this order
SERIES = (TECHNIQUE, NEAREST, FULL, *MORE)
STYLE: Any = {  # Any, since matplotlib types its settings one by one
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
WIDTH = 7.2  # inches, of every committed figure

Draw = Callable[[Values], "Figure"]  # the values of a record → its figure
T = TypeVar("T")


def styled(draw: Draw) -> Draw:
    """Run ``draw`` under the project's style, whatever style the caller has set."""

    @wraps(draw)
    def wrapper(values: Values) -> Figure:
        import matplotlib

        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(STYLE)
            return draw(values)

    return wrapper


def new_figure(height: float = 4.2, width: float = WIDTH) -> Figure:
    """An empty figure of ``height`` × ``width`` inches that arranges its panels by itself."""
    from matplotlib.figure import Figure

    return Figure(layout="constrained", figsize=(width, height))


def axes(
    title: str, x: str, y: str, figsize: tuple[float, float] = (WIDTH, 4.2)
) -> tuple[Figure, Axes]:
    """A figure with one panel; the labels of its axes name the unit."""
    fig = new_figure(figsize[1], figsize[0])
    ax = fig.add_subplot()
    ax.set(title=title, xlabel=x, ylabel=y)
    return fig, ax


def annotate_right(ax: Axes, text: str, x: float, y: float, gap: float = 6) -> None:
    """Write ``text`` to the right of the point (x, y) of ``ax``, ``gap`` points away from it."""
    ax.annotate(
        text, (x, y), xytext=(gap, 0), textcoords="offset points", va="center", fontsize=8.5
    )


def end_labels(
    ax: Axes,
    ends: Iterable[tuple[float, float, str, str]],
    gap: float,
    fontsize: float = 8.5,
) -> None:
    """Label lines at their right end, instead of a legend.

    ``ends`` holds (x, y, name, colour) of each line's last point. The name stands to the
    right of the axes, after a stroke in the line's colour, and at least ``gap`` of the axes'
    height below the name above it. Set the limits of the axes before.
    """
    ax.get_ylim()  # computes the limits, which the transforms below need
    place = ax.transScale + ax.transLimits
    lowest = 2.0
    known = [(float(place.transform((x, y))[1]), name, colour) for x, y, name, colour in ends]
    for height, name, colour in sorted(known, reverse=True):
        lowest = min(height, lowest - gap)
        # the name is black: letters in a light colour are hard to read
        for offset, text, ink in ((4, "━", colour), (17, name, "black")):
            ax.annotate(
                text,
                (1, lowest),
                xycoords="axes fraction",
                xytext=(offset, 0),
                textcoords="offset points",
                va="center",
                color=ink,
                fontsize=fontsize,
            )


def coloured(colours: Sequence[str], items: Iterable[T]) -> list[tuple[str, T]]:
    """Pair each item with its colour.

    Raises
    ------
    ValueError
        for more items than colours: a figure must not leave out the last series.
    """
    drawn = list(items)
    if len(drawn) > len(colours):
        raise InputError(f"a figure tells {len(colours)} series apart, got {len(drawn)}")
    return list(zip(colours, drawn, strict=False))
