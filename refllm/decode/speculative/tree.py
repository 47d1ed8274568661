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
ancestors and itself. The cache computes that step, and afterwards keeps the accepted path
(``view_tree`` and ``advance_path`` of ``kv.contiguous``). Which path is accepted is decided
in ``decode.speculative.tree_verification``.

Left out: trees that grow by the draft's own confidence (EAGLE-2), several sequences in one
tree step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from refllm.errors import InputError


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
            raise InputError(
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
