"""Acceptance rules for token trees: recursive rejection sampling, and its greedy form.

Sources: SpecInfer, Miao et al. 2024, section 4 (multi-step verification); Chen et al. 2024
(Sequoia), section 3.2 (without replacement).

| symbol | name                                                                     | shape    |
|--------|--------------------------------------------------------------------------|----------|
| m      | drafted nodes of the tree                                                |          |
| p      | target: row 0 after the root, row i + 1 after node i                     | [m+1, V] |
| q      | row i: the distribution that the children of row i were drawn from       | [m+1, V] |
| path   | the accepted nodes, from the root down                                   |          |

At a node its children are verified in order: accept x with probability min(1, p(x)/q(x));
after a rejection p becomes norm(max(p − q, 0)), and q stays (drawn with replacement) or
loses x (without). When no child is left the token is drawn from what p has become. For
one-hot drafts (``q = None``) a rejection takes x out of p.

Left out: block verification of trees.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from refllm.backend import Array, namespace
from refllm.decode.sampling import EMPTY, draw
from refllm.decode.speculative.tree import Tree
from refllm.decode.speculative.verification import check_rows
from refllm.errors import InputError


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
    ``replacement``. A chain is verified as ``verify`` does it, uniform for uniform.

    ValueError for shapes and rows that ``verify`` would reject, and for a child that its
    row cannot have drawn.
    """
    _check(p, q, tree, tokens)
    path: list[int] = []
    row = 0
    while True:
        left = p[row, ...]  # [V]
        drawn = None if q is None else q[row, ...]  # [V]
        accepted = None
        for node in tree.children[row]:
            x = int(tokens[node])
            # left and drawn are what p and q have become after the rejections so far
            if rng.random() < _chance(left, drawn, x):
                accepted = node
                break
            left = _rejected(left, drawn, x)
            if drawn is not None and not replacement:
                drawn = _without(drawn, x)
        if accepted is None:
            return path, draw(left, rng.random())
        path.append(accepted)
        row = accepted + 1


def verify_tree_greedy(
    best: Sequence[int], tree: Tree, tokens: Sequence[int]
) -> tuple[list[int], int]:
    """Temperature 0: best[m+1], the target's argmax after each row → (path, token), as
    plain greedy decoding emits them.

    Two children of the root, of which the second is right:

    >>> verify_tree_greedy(best=[6, 0, 7], tree=Tree([-1, -1]), tokens=[5, 6])
    ([1], 7)
    """
    if len(best) != len(tree) + 1 or len(tokens) != len(tree):
        raise InputError(
            f"a tree of {len(tree)} nodes needs as many tokens and one more target, got "
            f"{len(tokens)} and {len(best)}"
        )
    path: list[int] = []
    row = 0
    while True:
        node = next((c for c in tree.children[row] if tokens[c] == best[row]), None)
        if node is None:
            return path, int(best[row])
        path.append(node)
        row = node + 1


def draw_children(
    q: Array, count: int, rng: np.random.Generator, *, replacement: bool = False
) -> list[int]:
    """At most ``count`` tokens from q[V], one after another; without replacement no more
    than q has.
    """
    children: list[int] = []
    while len(children) < count:
        children.append(draw(q, rng.random()))
        if not replacement:
            q = _without(q, children[-1])
            if not float(namespace(q).sum(q)) > EMPTY:
                break
    return children


def _chance(left: Array, drawn: Array | None, x: int) -> float:
    """min(1, p(x)/q(x)) of what p and q have become; values above 1 accept for certain."""
    xp = namespace(left)
    target = float(left[x]) / float(xp.sum(left))
    if drawn is None:
        return target
    drafted = float(drawn[x]) / float(xp.sum(drawn))
    if not drafted > 0:
        raise InputError(
            f"token {x} has probability 0 in the distribution that it is said to be drawn from"
        )
    return target / drafted


def _rejected(left: Array, drawn: Array | None, x: int) -> Array:
    """norm(max(p − q, 0)); for a one-hot q all of p but x. Where nothing is left, p unchanged."""
    xp = namespace(left)
    if drawn is None:
        rest = _without(left, x)
    else:
        rest = left / xp.sum(left) - drawn / xp.sum(drawn)
        rest = xp.maximum(rest, xp.zeros_like(rest))
    if float(xp.sum(rest)) > EMPTY:
        return rest
    return left


def _without(weights: Array, x: int) -> Array:
    """A copy of weights[V] in which token x has weight 0."""
    rest = weights * 1.0
    rest[x] = 0.0
    return rest


def _check(p: Array, q: Array | None, tree: Tree, tokens: Sequence[int]) -> None:
    """The checks of ``verify``, for all rows of a tree."""
    if len(tokens) != len(tree):
        raise InputError(f"a tree of {len(tree)} nodes needs as many tokens, got {len(tokens)}")
    if p.shape[0] != len(tree) + 1 or (q is not None and q.shape != p.shape):
        shapes = f"{tuple(p.shape)} and {None if q is None else tuple(q.shape)}"
        raise InputError(
            f"a tree of {len(tree)} nodes needs p and q of shape ({len(tree) + 1}, V), got {shapes}"
        )
    check_rows("p", p)
    if q is not None and len(tree):
        xp = namespace(q)
        inner = [row for row, below in enumerate(tree.children) if below]
        check_rows("q", xp.take(q, xp.asarray(inner, dtype=xp.int64), axis=0))
    wrong = next((i for i, t in enumerate(tokens) if not 0 <= t < p.shape[1]), None)
    if wrong is not None:
        raise InputError(
            f"node {wrong} is token {tokens[wrong]}, outside the vocabulary of {p.shape[1]}"
        )
