"""Which static tree to draft: the one with the longest expected accepted path, by dynamic
programming.

Source: Sequoia, Chen et al. 2024, section 3.1 and the hardware-aware choice of 3.3. It
assumes that the k-th child of any node is the accepted one with probability a_k, wherever
the node stands. Then a node is accepted with the product of the probabilities on its path,
and the expected path of a tree (with the root, the token that a step always emits) is the
sum of these products over all nodes.

    c(n, d) = 1 + max Σ_k a_k c(n_k, d − 1)   over n_1 + n_2 + … = n − 1

| symbol | name                                                          | shape |
|--------|---------------------------------------------------------------|-------|
| a      | chance that the k-th child is the accepted one                | [K]   |
| n, d   | tokens of the tree, root included; levels of drafts           |       |
| t(n)   | cost of a target step of n tokens, in units of t(1)           |       |
| c      | cost of drafting a level                                      |       |

The naive twin, ``most_likely``, takes the n likeliest nodes: as the probability never grows
downwards they form a tree, and no other n nodes have a larger sum. The paper's recursion
finds the same, and is kept because readers look for it.

Left out: probabilities that depend on the position in the tree.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from refllm.decode.speculative.tree import Tree
from refllm.errors import InputError


def expected_path(tree: Tree, chances: Sequence[float]) -> float:
    """Expected tokens per step: 1 + the sum over nodes of the product of the chances on their path.

    >>> round(expected_path(Tree([-1, 0]), [0.5]), 3)  # 1 + 0.5 + 0.25
    1.75
    """
    reach = [1.0] + [0.0] * len(tree)
    for row, below in enumerate(tree.children):
        for rank, node in enumerate(below):
            chance = chances[rank] if rank < len(chances) else 0.0
            reach[node + 1] = reach[row] * chance
    return sum(reach)


def optimal_tree(chances: Sequence[float], nodes: int, depth: int) -> Tree:
    """The tree of ``nodes`` drafts (fewer if no more fit), at most ``depth`` deep, with the
    longest expected path.

    >>> optimal_tree([0.6, 0.3], nodes=3, depth=2).parents
    [-1, -1, 0]
    """
    _check(chances, nodes, depth)
    # value[d][n] = c(n, d) with n tokens, the root included; c(0, d) = 0
    value = [[0.0] + [1.0] * (nodes + 1)]
    # split[d][n]: the tokens n_1, n_2, … of the children's subtrees that reach c(n, d)
    split: list[list[list[int]]] = [[[] for _ in range(nodes + 2)]]
    for _ in range(depth):
        best, parts = _best_split(chances, value[-1], nodes)
        value.append([0.0, 1.0] + [1 + gain for gain in best[1:]])
        split.append([[], [], *parts[1:]])
    return _build(split, nodes + 1, depth)


def _best_split(
    chances: Sequence[float], below: Sequence[float], nodes: int
) -> tuple[list[float], list[list[int]]]:
    """For n = 0 … ``nodes`` tokens: the largest Σ_k a_k c(n_k, d − 1), and its n_1, n_2, …

    ``below[n]`` is c(n, d − 1). The children are added one at a time: after k of them,
    ``best`` and ``parts`` hold the result for the first k chances.
    """
    best = [0.0] * (nodes + 1)
    parts: list[list[int]] = [[] for _ in range(nodes + 1)]
    for k, chance in enumerate(chances):
        wider = best[:]
        longer = parts[:]
        for n in range(1, nodes + 1):
            for mine in range(1, n + 1):  # tokens of the k-th child's subtree
                gain = best[n - mine] + chance * below[mine]
                if len(parts[n - mine]) == k and gain > wider[n] + 1e-15:
                    wider[n] = gain
                    longer[n] = [*parts[n - mine], mine]
        best = wider
        parts = longer
    return best, parts


def most_likely(chances: Sequence[float], nodes: int, depth: int) -> Tree:
    """The same as ``optimal_tree``, by taking the likeliest remaining node ``nodes`` times."""
    _check(chances, nodes, depth)
    parents: list[int] = []
    # (−probability, order, parent, rank among its siblings, depth)
    heap = [(-chances[0], 0, -1, 0, 1)] if depth else []
    while heap and len(parents) < nodes:
        chance, _, parent, rank, level = heapq.heappop(heap)
        node = len(parents)
        parents.append(parent)
        if rank + 1 < len(chances) and chances[rank] > 0:
            sibling = chance * chances[rank + 1] / chances[rank]
            heapq.heappush(heap, (sibling, 2 * node + 1, parent, rank + 1, level))
        if level < depth:
            heapq.heappush(heap, (chance * chances[0], 2 * node + 2, node, 0, level + 1))
    return Tree(parents)


def best_tree(
    chances: Sequence[float], cost: Sequence[float], draft_cost: float, depth: int
) -> tuple[Tree, float]:
    """The tree with the largest speed-up c(n, d) t(1) / (t(n) + d c), and that speed-up;
    cost[n − 1] = t(n).
    """
    best = Tree([])
    gain = 1.0
    for levels in range(1, depth + 1):
        for nodes in range(1, len(cost)):
            tree = most_likely(chances, nodes, levels)
            step_cost = cost[len(tree)] + max(tree.depths) * draft_cost
            faster = expected_path(tree, chances) * cost[0] / step_cost
            if faster > gain:
                best = tree
                gain = faster
    return best, gain


def rank_chances(best: Sequence[int], ranked: Sequence[Sequence[int]]) -> list[float]:
    """a_k at temperature 0: how often the target's argmax best[T] is the draft's k-th
    choice, ranked[T][K].
    """
    if not best or len(best) != len(ranked):
        raise InputError(
            "needs the draft's ranking for each of the target's tokens, got "
            f"{len(best)}, {len(ranked)}"
        )
    columns = zip(*ranked, strict=True)
    return [
        sum(t == x for t, x in zip(best, column, strict=True)) / len(best) for column in columns
    ]


def _build(split: list[list[list[int]]], tokens: int, depth: int) -> Tree:
    """The tree that the recorded splits describe, level by level."""
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
    """ValueError for chances that are no falling probabilities of exclusive events, and for
    negative sizes.
    """
    if not chances or not all(0 <= a <= 1 for a in chances) or sum(chances) > 1 + 1e-9:
        raise InputError(
            "the chances of the children are probabilities of exclusive events, got "
            f"{list(chances)}"
        )
    if list(chances) != sorted(chances, reverse=True):
        raise InputError(
            "the first child is the likeliest: give the chances in falling order, got "
            f"{list(chances)}"
        )
    if min(nodes, depth) < 0:
        raise InputError(f"a tree has 0 or more nodes and levels, got {nodes} and {depth}")
