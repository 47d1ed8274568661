"""One run of the scheduler, drawn: batch and memory over time, which request holds which
block, and the radix tree at the end.

The data come from the simulator (``simulate.timeline``); the committed ones are written by

    refllm simulate --traffic tree --requests 3 --slots 1280 --max-batch-tokens 256
    --prefix-cache radix --policy lpm --trace figures/data/serving_trace.json --json

| figure            | from                     | shows                                           |
|-------------------|--------------------------|-------------------------------------------------|
| serving_occupancy | "occupancy": columns     | requests that run and wait, slots, over time    |
| serving_blocks    | "blocks": owners by step | which request holds which block after each step |
| serving_tree      | "tree": nested nodes     | the prefixes in the radix tree                  |

Left out: what the steps computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from refllm.measure.plotting import FULL, MORE, NEAREST, TECHNIQUE, axes, new_figure, styled
from refllm.measure.records import Values
from refllm.simulate.timeline import CACHED, FREE, SHARED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# taken in turn
HOLDERS = (TECHNIQUE, NEAREST, MORE[0], MORE[1], MORE[2], MORE[3], "#f0e442", "#8c6bb1")


FOUND = "found again"


NEVER = "never found again"


LOCKED = "locked: somebody runs in it"


STATES = {FOUND: TECHNIQUE, NEVER: FULL, LOCKED: NEAREST}  # of a node of the tree


@styled
def draw_occupancy(values: Values) -> Figure:
    """{"occupancy": columns of ``simulate.timeline``} → who runs and waits, and the slots
    they hold, over time.
    """
    steps = values["occupancy"]
    time = 1e3 * np.asarray(steps["time"])
    fig = new_figure(4.8)
    upper, lower = fig.subplots(2, 1, sharex=True)
    upper.step(time, steps["running"], color=TECHNIQUE, label="run", where="pre")
    upper.step(time, steps["waiting"], color=NEAREST, label="wait", where="pre")
    upper.set(title="Batch and memory over time", ylabel="requests")
    upper.legend(loc="upper right")
    lower.fill_between(
        time, steps["allocated"], step="pre", color=FULL, alpha=0.35, label="held by who runs"
    )
    lower.axhline(steps["slots"], color="black", lw=0.9, ls="--")
    lower.annotate(
        f"{steps['slots']:,}\nslots",
        (1, steps["slots"]),
        xycoords=("axes fraction", "data"),
        xytext=(3, 0),
        textcoords="offset points",
        va="center",
        fontsize=8.5,
    )
    lower.step(
        time, steps["used"], color=TECHNIQUE, where="pre", label="tokens, if nothing were shared"
    )
    lower.set(xlabel="time (ms)", ylabel="slots")
    lower.set_ylim(0, 1.2 * max(steps["slots"], *steps["used"]))
    lower.legend(loc="upper left", fontsize=8.5, ncols=2)
    return fig


@styled
def draw_blocks(values: Values) -> Figure:
    """{"blocks": {"times", "owners": [step][block]}} → the pool, step by step: a colour is
    a request.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.patches import Patch

    owners = np.asarray(values["blocks"]["owners"])
    special = {FREE: "white", CACHED: "#d9d9d9", SHARED: "black"}
    picture = np.zeros(owners.shape, dtype=np.int64)
    for index, code in enumerate(special):
        picture[owners == code] = index
    held = owners >= 0
    picture[held] = len(special) + owners[held] % len(HOLDERS)
    fig, ax = axes("Who holds which block", "step", "block")
    colours = ListedColormap([*special.values(), *HOLDERS])
    ax.imshow(
        picture.T, aspect="auto", interpolation="nearest", cmap=colours, vmin=0, vmax=colours.N - 1
    )
    ax.grid(visible=False)
    names = {FREE: "free", CACHED: "cached, nobody runs in it", SHARED: "shared by several"}
    patches: list[Any] = [Patch(facecolor=special[code], edgecolor="#999999") for code in names]
    patches.append(tuple(Patch(facecolor=colour) for colour in HOLDERS[:4]))
    fig.legend(
        patches,
        [*names.values(), "one request's own: a colour each, in turn"],
        loc="outside upper left",
        ncols=4,
        fontsize=8,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
    )
    return fig


@styled
def draw_tree(values: Values) -> Figure:
    """{"tree": nodes of ``simulate.timeline.tree``} → the radix tree from above down, a
    node as long as its tokens.
    """
    from matplotlib.patches import Patch

    fig, ax = axes("The radix tree", "", "tokens from the beginning", figsize=(7.2, 4.6))
    width = sum(_leaves(node) for node in values["tree"])
    _hang(ax, values["tree"], 0.0, 0, max(1, width))
    ax.set_xlim(0, max(1, width))
    ax.set_ylim(_depth(values["tree"]), 0)
    ax.set_xticks([])
    ax.grid(visible=False)
    # which of the states occur: no colour is explained that the picture does not have
    present = {_state(node) for node in _every(values["tree"])}
    found = [
        Patch(facecolor=STATES[name], edgecolor="white", label=name)
        for name in STATES
        if name in present
    ]
    fig.legend(handles=found, loc="outside upper left", ncols=3, fontsize=8.5)
    about = "number: the node's tokens, where there is room; width: how many branches end below it"
    ax.set_xlabel(about, fontsize=9)
    return fig


def _state(node: Values) -> str:
    if node["locks"]:
        return LOCKED
    if node["hits"]:
        return FOUND
    return NEVER


def _every(nodes: Sequence[Any]) -> list[Any]:
    return [*nodes, *(below for node in nodes for below in _every(node["children"]))]


def _hang(ax: Axes, nodes: Sequence[Any], x: float, y: int, width: int) -> None:
    """Draw nodes beside each other from (x, y) on, each as wide as its leaves, their
    children below them.
    """
    from matplotlib.patches import Rectangle

    for node in nodes:
        leaves = _leaves(node)
        tokens = node["tokens"]
        ax.add_patch(
            Rectangle(
                (x, y), leaves, tokens, facecolor=STATES[_state(node)], edgecolor="white", lw=1
            )
        )
        if leaves / width > 0.05:
            ax.annotate(
                str(tokens),
                (x + leaves / 2, y + tokens / 2),
                ha="center",
                va="center",
                color="white",
                fontsize=8,
            )
        _hang(ax, node["children"], x, y + tokens, width)
        x += leaves


def _leaves(node: Values) -> int:
    return sum(_leaves(child) for child in node["children"]) or 1


def _depth(nodes: Sequence[Any]) -> int:
    return max((node["tokens"] + _depth(node["children"]) for node in nodes), default=0)
