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

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from refllm.array_types import Json
from refllm.measure.plotting import FULL, MORE, NEAREST, TECHNIQUE, axes, new_figure, styled
from refllm.measure.records import Values
from refllm.simulate.timeline import CACHED, FREE, SHARED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# colours of requests, taken in turn
REQUESTS = (TECHNIQUE, NEAREST, MORE[0], MORE[1], MORE[2], MORE[3], "#f0e442", "#8c6bb1")
HIT = "hit by a later request"
NO_HIT = "never hit"
LOCKED = "locked by a running request"
STATES = {HIT: TECHNIQUE, NO_HIT: FULL, LOCKED: NEAREST}  # of a node of the tree


@styled
def draw_occupancy(values: Values) -> Figure:
    """{"occupancy": columns of ``simulate.timeline``} → requests that run and wait, and the
    slots they hold, over time.
    """
    steps = values["occupancy"]
    time = 1e3 * np.asarray(steps["time"])
    fig = new_figure(4.8)
    upper, lower = fig.subplots(2, 1, sharex=True)
    upper.step(time, steps["running"], color=TECHNIQUE, label="running", where="pre")
    upper.step(time, steps["waiting"], color=NEAREST, label="waiting", where="pre")
    upper.set(title="Sharing prefixes: far more tokens than slots", ylabel="requests")
    upper.legend(loc="upper right")
    label = "slots of running requests"
    lower.fill_between(time, steps["allocated"], step="pre", color=FULL, alpha=0.35, label=label)
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
    label = "their tokens, if nothing were shared"
    lower.step(time, steps["used"], color=TECHNIQUE, where="pre", label=label)
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

    owners = np.asarray(values["blocks"]["owners"])  # [steps, blocks]
    special = {FREE: "white", CACHED: "#d9d9d9", SHARED: "black"}
    picture = np.zeros(owners.shape, dtype=np.int64)
    for index, code in enumerate(special):
        picture[owners == code] = index
    held = owners >= 0
    picture[held] = len(special) + owners[held] % len(REQUESTS)
    shared = np.mean(owners == SHARED) / max(1e-9, np.mean((owners == SHARED) | held))
    fig, ax = axes(
        f"{shared:.0%} of the blocks in use are shared by several requests", "step", "block"
    )
    colours = ListedColormap([*special.values(), *REQUESTS])
    ax.imshow(
        picture.T, aspect="auto", interpolation="nearest", cmap=colours, vmin=0, vmax=colours.N - 1
    )
    ax.grid(visible=False)
    names = {FREE: "free", CACHED: "cached, not in use", SHARED: "shared by several requests"}
    patches: list[object] = [Patch(facecolor=special[code], edgecolor="#999999") for code in names]
    patches.append(tuple(Patch(facecolor=colour) for colour in REQUESTS[:4]))
    fig.legend(  # type: ignore[call-overload]  # handles may be tuples, which the stubs omit
        patches,
        [*names.values(), "one request's own (colours in turn)"],
        loc="outside upper left",
        ncols=4,
        fontsize=8,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
    )
    return fig


@styled
def draw_tree(values: Values) -> Figure:
    """{"tree": nodes of ``simulate.timeline.tree``} → the radix tree, root at the top, a node
    as high as its tokens.
    """
    from matplotlib.patches import Patch

    nodes = values["tree"]
    every = list(_walk(nodes))
    hit = sum(node["tokens"] for node in every if node["hits"])
    total = sum(node["tokens"] for node in every)
    fig, ax = axes(
        f"{hit:,} of {total:,} tokens in the radix tree were hit by later requests",
        "",
        "tokens from the beginning",
        figsize=(7.2, 4.6),
    )
    width = max(1, sum(_leaves(node) for node in nodes))
    _draw_nodes(ax, nodes, 0.0, 0, width)
    ax.set_xlim(0, width)
    ax.set_ylim(_depth(nodes), 0)
    ax.set_xticks([])
    ax.grid(visible=False)
    # only the states that occur are explained
    present = {_state(node) for node in every}
    patches = [
        Patch(facecolor=STATES[name], edgecolor="white", label=name)
        for name in STATES
        if name in present
    ]
    fig.legend(handles=patches, loc="outside upper left", ncols=3, fontsize=8.5)
    ax.set_xlabel("number: tokens of the node; width: sequences that end below it", fontsize=9)
    return fig


def _state(node: Json) -> str:
    """Locked, hit, or neither."""
    if node["locks"]:
        return LOCKED
    if node["hits"]:
        return HIT
    return NO_HIT


def _walk(nodes: Sequence[Json]) -> Iterator[Json]:
    """All nodes below and including ``nodes``."""
    for node in nodes:
        yield node
        yield from _walk(node["children"])


def _draw_nodes(ax: Axes, nodes: Sequence[Json], x: float, y: int, width: int) -> None:
    """Draw nodes beside each other from (x, y) on, each as wide as its leaves, their
    children below them.
    """
    from matplotlib.patches import Rectangle

    for node in nodes:
        leaves = _leaves(node)
        tokens = node["tokens"]
        colour = STATES[_state(node)]
        ax.add_patch(Rectangle((x, y), leaves, tokens, facecolor=colour, edgecolor="white", lw=1))
        if leaves / width > 0.05:  # else there is no room for the number
            ax.annotate(
                str(tokens),
                (x + leaves / 2, y + tokens / 2),
                ha="center",
                va="center",
                color="white",
                fontsize=8,
            )
        _draw_nodes(ax, node["children"], x, y + tokens, width)
        x += leaves


def _leaves(node: Json) -> int:
    """Leaves below a node, itself if it is one."""
    return sum(_leaves(child) for child in node["children"]) or 1


def _depth(nodes: Sequence[Json]) -> int:
    """Tokens of the longest path."""
    return max((node["tokens"] + _depth(node["children"]) for node in nodes), default=0)
