"""Token trees: many drafts share their prefixes and are computed in one step of the target.

Sources: SpecInfer, Miao et al. 2024, section 4 (tree mask); Chen et al. 2024 (Sequoia),
section 3.1 (the static tree).

| symbol  | name                                                                    | shape    |
|---------|-------------------------------------------------------------------------|----------|
| m       | drafted nodes, parents before their children                            |          |
| parents | node i hangs below node ``parents[i]``, −1 below the last token (root)  | [m]      |
| row     | row 0 is the root, row i + 1 is node i                                  | 0..m     |
| path    | the accepted nodes, from the root down                                  |          |

A step computes m + 1 tokens: the root (the last token, whose keys and values are not cached
yet) and the nodes; a token stands at position start + depth and sees what is cached, its
ancestors and itself. Its keys and values lie in the order of the rows, so those of the path
are moved together afterwards (``compact``). Which path is accepted is decided in
``decode.speculative.tree_verification``.

Left out: trees that grow by the draft's own confidence (EAGLE-2), several sequences in one
tree step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

from refllm.backend import Array, asarray_like, namespace
from refllm.kv.contiguous import ContiguousCache
from refllm.model.attention import masked_score


class Tree:
    """The shape of a token tree: the parent of every node.

    A node with two children, the first of which has one:

    >>> tree = Tree([-1, 0, 0, 1])
    >>> tree.depths
    [0, 1, 2, 2, 3]
    >>> tree.children
    [[0], [1, 2], [3], [], []]
    """

    def __init__(self, parents: Sequence[int]):
        self.parents = [int(a) for a in parents]
        wrong = next((i for i, a in enumerate(self.parents) if not -1 <= a < i), None)
        if wrong is not None:
            raise ValueError(
                f"node {wrong} hangs below {self.parents[wrong]}: a parent is −1 or comes earlier"
            )

    @classmethod
    def chain(cls, length: int) -> Tree:
        """One path: the case of token-wise verification."""
        return cls(range(-1, length - 1))

    def __len__(self) -> int:
        return len(self.parents)

    @cached_property
    def depths(self) -> list[int]:
        """Of every row: 0 for the root, then 1 + the depth of its parent; [m+1]."""
        depths = [0]
        for parent in self.parents:
            depths.append(1 + depths[parent + 1])
        return depths

    @cached_property
    def children(self) -> list[list[int]]:
        """Nodes below each row, in their order; [m+1]."""
        below: list[list[int]] = [[] for _ in range(len(self) + 1)]
        for node, parent in enumerate(self.parents):
            below[parent + 1].append(node)
        return below

    def positions(self, start: int) -> list[int]:
        """Positions of the rows where the root stands at ``start``."""
        return [start + depth for depth in self.depths]

    def ancestors(self, node: int) -> list[int]:
        """The path from the root down to a node, itself included."""
        path: list[int] = []
        while node >= 0:
            path.insert(0, node)
            node = self.parents[node]
        return path

    def mask(self) -> list[list[bool]]:
        """[m+1][m+1]: whether row i sees row j, which is its ancestor or itself."""
        rows: list[list[bool]] = [[True] + [False] * len(self)]
        for node, parent in enumerate(self.parents):
            row = rows[parent + 1][:]
            row[node + 1] = True
            rows.append(row)
        return rows


class TreeView:
    """An ``attend`` for one tree step of one sequence in a contiguous cache; then
    ``compact``, not ``advance``.
    """

    def __init__(self, cache: ContiguousCache, sequence: int, tree: Tree):
        self.cache = cache
        self.sequence = sequence
        self.start = cache.lengths[sequence]
        self.end = self.start + len(tree) + 1
        if self.end > cache.capacity:
            raise ValueError(
                f"{self.start} cached + {len(tree) + 1} tokens of a tree exceed {cache.capacity}"
            )
        like = cache.keys
        xp = namespace(like)
        self.first = self.start  # all rows see every cached slot before this one
        sees = asarray_like(tree.mask(), like, "bool")  # [m+1, m+1]
        if cache.window is not None:  # distances are those of positions, not of rows
            at = asarray_like(tree.positions(self.start), like, "int64")
            since = at[:, None] - cache.window  # [m+1, 1]
            self.first = 0
            sees_cached = xp.arange(self.start)[None, :] > since
            sees = xp.concat([sees_cached, sees & (at[None, :] > since)], axis=1)
        low = xp.asarray(masked_score(xp, like.dtype), dtype=like.dtype)
        zero = xp.asarray(0.0, dtype=like.dtype)
        self.bias = xp.where(sees, zero, low)  # [m+1, S − first]

    def __call__(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        """Store the rows' keys and values, and attend to all that each row sees."""
        xp = namespace(q)
        cache = self.cache
        count, heads, dim = q.shape
        keys = cache.keys[layer, self.sequence, :, :, : self.end]  # [G, D, S]
        values = cache.values[layer, self.sequence, :, : self.end]  # [G, S, D]
        keys[:, :, self.start :] = k.transpose(1, 2, 0)
        values[:, self.start :] = v.transpose(1, 0, 2)
        groups = keys.shape[0]
        q = q * (1.0 / math.sqrt(dim))
        rows = q.reshape(count, groups, heads // groups, dim).transpose(
            1, 2, 0, 3
        )  # [G, R, m+1, D]
        p = xp.matmul(rows, keys[:, None])  # [G, R, m+1, S]
        p[..., self.first :] += self.bias
        p -= p.max(axis=-1, keepdims=True)
        xp.exp(p, out=p)
        p /= p.sum(axis=-1, keepdims=True)
        o = xp.matmul(p, values[:, None])  # [G, R, m+1, D]
        return o.transpose(2, 0, 1, 3).reshape(count, heads, dim)


def compact(cache: ContiguousCache, sequence: int, path: Sequence[int]) -> None:
    """Keep the root and the accepted path of the last ``TreeView`` step: one gather, and
    the sequence is longer.

    Slots [0, start) stay; the root's is start; node ``path[i]`` moves from start + 1 +
    path[i] to start + 1 + i, which is never to the right, since parents come before their
    children.
    """
    start = cache.lengths[sequence]
    if list(path) != list(range(len(path))):  # a chain lies where it should
        source = asarray_like([start + 1 + node for node in path], cache.keys, "int64")
        target = slice(start + 1, start + 1 + len(path))
        # indexing with an array copies, so source and target may overlap
        cache.keys[:, sequence, :, :, target] = cache.keys[:, sequence][:, :, :, source]
        cache.values[:, sequence, :, target] = cache.values[:, sequence][:, :, source]
    cache.lengths[sequence] = start + 1 + len(path)
