"""Token trees: many drafts share their prefixes, are verified in one step, and the path
that is accepted stays.

Sources: SpecInfer, Miao et al. 2024, section 4 (tree mask, multi-step verification); Chen
et al. 2024 (Sequoia), sections 3.1 (the static tree) and 3.2 (without replacement).

| symbol  | name                                                                    | shape    |
|---------|-------------------------------------------------------------------------|----------|
| m       | drafted nodes, parents before their children                            |          |
| parents | node i hangs below node ``parents[i]``, −1 below the last token (root)   | [m]      |
| p       | target: row 0 after the root, row i + 1 after node i                     | [m+1, V] |
| q       | row i: the distribution that the children of row i were drawn from       | [m+1, V] |
| path    | the accepted nodes, from the root down                                   |          |

A step computes m + 1 tokens: the root (the last token, whose keys and values are not cached
yet) and the nodes; a token stands at position start + depth and sees what is cached, its
ancestors and itself. Its keys and values lie in the order of the rows, so those of the path
are moved together afterwards (``compact``).

At a node its children are judged in order: accept x with probability min(1, p(x)/q(x));
after a rejection p becomes norm(max(p − q, 0)), and q stays (drawn with replacement) or
loses x (without). When none is left the token comes from what p has become. For one-hot
drafts (``q = None``) a rejection takes x out of p.

Left out: trees that grow by the draft's own confidence (EAGLE-2), several sequences in one
tree step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from refllm.backend import Array, asarray_like, namespace
from refllm.decode.speculative import verification
from refllm.kv.contiguous import ContiguousCache
from refllm.model.attention import masked_score


class Tree:
    """The shape of a token tree. ``Tree([-1, 0, 0, 1])``: a node with two children, the
    first of which has one.
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
        """One path: what token-wise verification judges."""
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


def verify_tree(
    p: Array,
    q: Array | None,
    tree: Tree,
    tokens: Sequence[int],
    rng: np.random.Generator,
    *,
    replacement: bool = False,
) -> tuple[list[int], int]:
    """Recursive rejection: p[m+1, V], q[m+1, V] or None, tokens[m] → (path, token);
    lossless for both ways to draw.

    Children must have been drawn from q's row in their order, with or without
    ``replacement``. A chain is judged as ``verify`` judges it, uniform for uniform.

    ValueError for shapes and rows that ``verify`` would refuse, and for a child that its
    row cannot have drawn.
    """
    _check(p, q, tree, tokens)
    path: list[int] = []
    row = 0
    while True:
        left = p[row, ...]
        drawn = None if q is None else q[row, ...]
        accepted = None
        for node in tree.children[row]:
            x = int(tokens[node])
            if rng.random() < _chance(left, drawn, x):
                accepted = node
                break
            left = _rejected(left, drawn, x)
            if drawn is not None and not replacement:
                drawn = _without(drawn, x)
        if accepted is None:
            return path, verification.draw(left, rng.random())
        path.append(accepted)
        row = accepted + 1


def verify_tree_greedy(
    best: Sequence[int], tree: Tree, tokens: Sequence[int]
) -> tuple[list[int], int]:
    """Temperature 0: best[m+1], the target's argmax after each row → (path, token), as
    plain greedy emits them.
    """
    if len(best) != len(tree) + 1 or len(tokens) != len(tree):
        raise ValueError(
            f"a tree of {len(tree)} nodes needs as many tokens and one target more, got {len(tokens)} "
            f"and {len(best)}"
        )
    path: list[int] = []
    row = 0
    while (
        node := next((c for c in tree.children[row] if tokens[c] == best[row]), None)
    ) is not None:
        path.append(node)
        row = node + 1
    return path, int(best[row])


def draw_children(
    q: Array, count: int, rng: np.random.Generator, *, replacement: bool = False
) -> list[int]:
    """At most ``count`` tokens from q[V], one after another; without replacement no more
    than q has.
    """
    children: list[int] = []
    while len(children) < count:
        children.append(verification.draw(q, rng.random()))
        if not replacement:
            q = _without(q, children[-1])
            if not float(namespace(q).sum(q)) > verification.EMPTY:
                break
    return children


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
        self.first = self.start  # what is cached all of them see
        sees = asarray_like(tree.mask(), like, "bool")
        if cache.window is not None:  # distances are those of positions, not of rows
            at = asarray_like(tree.positions(self.start), like, "int64")
            since = at[:, None] - cache.window
            self.first = 0
            sees = xp.concat(
                [xp.arange(self.start)[None, :] > since, sees & (at[None, :] > since)], axis=1
            )
        low, zero = (xp.asarray(v, dtype=like.dtype) for v in (masked_score(xp, like.dtype), 0.0))
        self.bias = xp.where(sees, zero, low)  # [m+1, S − first]

    def __call__(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        xp = namespace(q)
        cache = self.cache
        count, heads, dim = q.shape
        keys = cache.keys[layer, self.sequence, :, :, : self.end]  # [G, D, S]
        values = cache.values[layer, self.sequence, :, : self.end]  # [G, S, D]
        keys[:, :, self.start :] = k.transpose(1, 2, 0)
        values[:, self.start :] = v.transpose(1, 0, 2)
        groups = keys.shape[0]
        rows = (
            (q * (1.0 / math.sqrt(dim)))
            .reshape(count, groups, heads // groups, dim)
            .transpose(1, 2, 0, 3)
        )
        p = xp.matmul(rows, keys[:, None])  # [G, R, m+1, S]
        p[..., self.first :] += self.bias
        p -= p.max(axis=-1, keepdims=True)
        xp.exp(p, out=p)
        p /= p.sum(axis=-1, keepdims=True)
        return xp.matmul(p, values[:, None]).transpose(2, 0, 1, 3).reshape(q.shape)


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
        # the right side is a copy
        cache.keys[:, sequence, :, :, target] = cache.keys[:, sequence][:, :, :, source]
        cache.values[:, sequence, :, target] = cache.values[:, sequence][:, :, source]
    cache.lengths[sequence] = start + 1 + len(path)


def _chance(left: Array, drawn: Array | None, x: int) -> float:
    """min(1, p(x)/q(x)) of what p and q have become."""
    xp = namespace(left)
    target = float(left[x]) / float(xp.sum(left))
    if drawn is None:
        return target
    drafted = float(drawn[x]) / float(xp.sum(drawn))
    if not drafted > 0:
        raise ValueError(
            f"token {x} was drawn from a distribution that gives it probability 0: it was not, then"
        )
    return target / drafted


def _rejected(left: Array, drawn: Array | None, x: int) -> Array:
    """norm(max(p − q, 0)); for a one-hot q all of p but x. Where nothing is left, p as it
    was.
    """
    xp = namespace(left)
    if drawn is None:
        rest = _without(left, x)
    else:
        rest = left / xp.sum(left) - drawn / xp.sum(drawn)
        rest = xp.maximum(rest, xp.zeros_like(rest))
    if float(xp.sum(rest)) > verification.EMPTY:
        return rest
    return left


def _without(weights: Array, x: int) -> Array:
    rest = weights * 1.0
    rest[x] = 0.0
    return rest


def _check(p: Array, q: Array | None, tree: Tree, tokens: Sequence[int]) -> None:
    """What ``verify`` asks of its rows, of all rows of a tree."""
    if len(tokens) != len(tree):
        raise ValueError(f"a tree of {len(tree)} nodes needs as many tokens, got {len(tokens)}")
    if p.shape[0] != len(tree) + 1 or (q is not None and q.shape != p.shape):
        shapes = f"{tuple(p.shape)} and {None if q is None else tuple(q.shape)}"
        raise ValueError(
            f"a tree of {len(tree)} nodes needs p and q of shape ({len(tree) + 1}, V), got {shapes}"
        )
    verification.check_rows("p", p)
    if q is not None and len(tree):
        xp = namespace(q)
        inner = [row for row, below in enumerate(tree.children) if below]
        verification.check_rows("q", xp.take(q, xp.asarray(inner, dtype=xp.int64), axis=0))
    wrong = next((i for i, t in enumerate(tokens) if not 0 <= t < p.shape[1]), None)
    if wrong is not None:
        raise ValueError(
            f"node {wrong} is token {tokens[wrong]}, outside the vocabulary of {p.shape[1]}"
        )
