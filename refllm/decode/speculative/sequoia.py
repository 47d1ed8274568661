"""Which static tree to draft: the one whose expected accepted path is longest, by dynamic
programming.

Source: Sequoia, Chen et al. 2024, section 3.1 and the hardware-aware choice of 3.3. Assumed
is that the k-th child of any node is the accepted one with probability a_k, wherever the
node stands; then a node's chance is the product of those on its path, and the expected path
of a tree (root included, which is the token that a step always emits) is the sum of all its
nodes' chances.

    c(n, d) = 1 + max Σ_k a_k c(n_k, d − 1)   over n_1 + n_2 + … = n − 1

| symbol | name                                                          | shape |
|--------|---------------------------------------------------------------|-------|
| a      | chance that the k-th child is the accepted one                | [K]   |
| n, d   | tokens of the tree, root included; levels of drafts           |       |
| t(n)   | cost of a target step of n tokens, in units of t(1)           |       |
| c      | cost of drafting a level                                      |       |

The naive twin, ``most_likely``, takes the n likeliest nodes: as a chance never grows
downwards they are a tree, and no other n have a larger sum. The paper's recursion finds the
same, and is kept because readers look for it.

Left out: chances that depend on the place in the tree.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from refllm.decode.speculative.tree import Tree


def expected_path(tree: Tree, chances: Sequence[float]) -> float:
    """Expected tokens a step: 1 + the sum over nodes of the product of their path's
    chances.
    """
    reach = [1.0] + [0.0] * len(tree)
    for row, below in enumerate(tree.children):
        for rank, node in enumerate(below):
            reach[node + 1] = reach[row] * (chances[rank] if rank < len(chances) else 0.0)
    return sum(reach)


def optimal_tree(chances: Sequence[float], nodes: int, depth: int) -> Tree:
    """The tree of ``nodes`` drafts (fewer if no more fit), at most ``depth`` deep, of the
    longest expected path.
    """
    _check(chances, nodes, depth)
    ranks = len(chances)
    # value[d][n] = c(n, d) with n tokens, its root included; c(0, d) = 0
    value = [[0.0] + [1.0] * (nodes + 1)]
    split: list[list[list[int]]] = [[[] for _ in range(nodes + 2)]]
    for _ in range(depth):
        below = value[-1]
        row = [0.0, 1.0]
        how: list[list[int]] = [[], []]
        # best[n]: Σ a_k c(n_k, d − 1) of n tokens among the ranks so far
        best = [0.0] * (nodes + 1)
        parts: list[list[int]] = [[] for _ in range(nodes + 1)]
        for k in range(ranks):
            wider = best[:]
            longer = parts[:]
            for n in range(1, nodes + 1):
                for mine in range(1, n + 1):
                    gain = best[n - mine] + chances[k] * below[mine]
                    if len(parts[n - mine]) == k and gain > wider[n] + 1e-15:
                        wider[n] = gain
                        longer[n] = [*parts[n - mine], mine]
            best = wider
            parts = longer
        for n in range(1, nodes + 1):
            row.append(1 + best[n])
            how.append(parts[n])
        value.append(row)
        split.append(how)
    return _built(split, nodes + 1, depth)


def most_likely(chances: Sequence[float], nodes: int, depth: int) -> Tree:
    """The same by taking the likeliest node that is left, ``nodes`` times."""
    _check(chances, nodes, depth)
    parents: list[int] = []
    heap = [(-chances[0], 0, -1, 0, 1)] if depth else []  # (−chance, order, parent, rank, depth)
    while heap and len(parents) < nodes:
        chance, _, parent, rank, level = heapq.heappop(heap)
        node = len(parents)
        parents.append(parent)
        if rank + 1 < len(chances) and chances[rank] > 0:
            heapq.heappush(
                heap,
                (chance * chances[rank + 1] / chances[rank], 2 * node + 1, parent, rank + 1, level),
            )
        if level < depth:
            heapq.heappush(heap, (chance * chances[0], 2 * node + 2, node, 0, level + 1))
    return Tree(parents)


def best_tree(
    chances: Sequence[float], cost: Sequence[float], draft_cost: float, depth: int
) -> tuple[Tree, float]:
    """The tree with the largest c(n, d) t(1) / (t(n) + d c), and that speed-up; cost[n − 1]
    = t(n).
    """
    best = Tree([])
    gain = 1.0
    for levels in range(1, depth + 1):
        for nodes in range(1, len(cost)):
            tree = most_likely(chances, nodes, levels)
            faster = (
                expected_path(tree, chances)
                * cost[0]
                / (cost[len(tree)] + max(tree.depths) * draft_cost)
            )
            if faster > gain:
                best = tree
                gain = faster
    return best, gain


def rank_chances(best: Sequence[int], ranked: Sequence[Sequence[int]]) -> list[float]:
    """a_k at temperature 0: how often the target's argmax best[T] is the draft's k-th
    choice, ranked[T][K].
    """
    if not best or len(best) != len(ranked):
        raise ValueError(
            f"needs the draft's ranking for each of the target's tokens, got {len(best)}, {len(ranked)}"
        )
    columns = zip(*ranked, strict=True)
    return [
        sum(t == x for t, x in zip(best, column, strict=True)) / len(best) for column in columns
    ]


def _built(split: list[list[list[int]]], tokens: int, depth: int) -> Tree:
    """The tree of the choices that were kept, level by level."""
    parents: list[int] = []
    level = [(-1, tokens)]
    for d in range(depth, 0, -1):
        below = []
        for parent, count in level:
            for mine in split[d][count]:
                parents.append(parent)
                below.append((len(parents) - 1, mine))
        level = below
    return Tree(parents)


def _check(chances: Sequence[float], nodes: int, depth: int) -> None:
    if not chances or not all(0 <= a <= 1 for a in chances) or sum(chances) > 1 + 1e-9:
        raise ValueError(
            f"the chances of the children are probabilities of one event each, got {list(chances)}"
        )
    if list(chances) != sorted(chances, reverse=True):
        raise ValueError(
            f"the first child is the likeliest: give the chances in falling order, got {list(chances)}"
        )
    if min(nodes, depth) < 0:
        raise ValueError(f"a tree has 0 or more nodes and levels, got {nodes} and {depth}")
