"""Execution of a plan: copies, one ragged batch through the network, the rows of logits
that are sampled.

| symbol | name                                                     | shape     |
|--------|----------------------------------------------------------|-----------|
| T      | tokens of the step: those of all items, then padding     |           |
| R      | rows that are sampled from, Σ ``item.samples``           |           |
| z      | logits, item by item in the order of ``plan.sampling``   | [R, V]    |

Nothing is decided here: blocks, counts and copies are the plan's, and what the tokens are
is the engine's. A padded batch is computed with its padding: the padded positions of a
prompt as a sequence of their own, a row that has ended as the one token it still costs.
(Only the attention of the others to their padding is saved.)

Left out: overlapping a step with the planning of the next one; capturing it in a CUDA
graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from refllm.backend import Array, asarray_like
from refllm.decode.fast.captured_step import Stepper
from refllm.kv.paged import PagedKVCache
from refllm.model.config import ModelConfig
from refllm.model.llama import Weights, forward, logits
from refllm.serve.plan import Name, Plan, place


class Placed(NamedTuple):
    """A sequence where a plan says that it lies: what ``PagedKVCache.view`` reads of a
    block table.
    """

    blocks: tuple[int, ...]
    block_size: int
    length: int

    def slots(self, start: int, stop: int) -> list[int]:
        """The slots of positions [start, stop), in order."""
        return place(self.blocks, self.block_size, start, stop)


def execute(
    plan: Plan,
    tokens: Mapping[Name, Sequence[int]],
    weights: Weights,
    config: ModelConfig,
    cache: PagedKVCache,
    step: Stepper,
) -> Array | None:
    """``tokens[name]``: a sequence's tokens and drafts, to the end of its item at least →
    z[R, V]; None if R = 0.

    ``step``, of ``captured.stepper``, computes a step that samples from all its tokens; z
    is then valid until the next.
    """
    cache.copy(plan.copies)
    if not plan.items:
        return None
    tables: list[Placed] = []
    counts: list[int] = []
    ids: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    for name, start, count, blocks, samples, _ in plan.items:
        end = start + count
        tables.append(Placed(blocks, plan.block_size, start))
        counts.append(count)
        if count == 1:  # nearly all of a step
            ids.append(tokens[name][start])
            positions.append(start)
        else:
            ids += tokens[name][start:end]
            positions += range(start, end)
        rows += range(len(ids) - samples, len(ids))
    for first, start, count in _padding(plan):
        tables.append(Placed((first,), 0, start))
        counts.append(count)
        ids += [0] * count
        positions += range(start, start + count)
    view = cache.view(tables, counts)
    if len(rows) == len(ids):
        return step(ids, positions, view)
    placed = asarray_like([ids, positions], cache.keys, "int64")  # one transfer for both
    hidden = forward(
        weights, config, placed[0], placed[1], view, asarray_like(rows, cache.keys, "int64")
    )
    return logits(weights, hidden) if rows else None


def _padding(plan: Plan) -> list[tuple[int, int, int]]:
    """(slot of column 0, columns before, columns computed) of everything that a padded
    batch computes for nobody.
    """
    pads = [
        (item.blocks[0] - item.pad, 0, item.pad)
        for item in plan.items
        if item.pad and not item.start
    ]
    return pads + [(row.first, row.start, row.count) for row in plan.padding_rows]
