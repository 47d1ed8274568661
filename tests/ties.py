"""Which codes two ways of computing them must share: those of a row before its first tie.

A weight half-way between two codes is rounded by the last bit of its computation, and the
rest of its row follows. This is not rare: the half-integer rules put an extreme weight at
±7.5 scales, which is a tie wherever the first column of a group holds the extreme that is
not clipped.

Whether a tie is met is computed in float64. In 3,000 random problems of 12 and 24 columns
nothing came as near as 1e-6 of a scale to a tie without being one, and every tie was found
within 1e-11: NEAR lies between. ``exact_ties`` decides the same in fractions, to compare.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

from conftest import to_host
from refllm.formats.uniform import Scheme
from refllm.quant.hessian import factor
from schemes import spread

NEAR = 1e-9  # relative to the scale, in float64


def settled(
    q: Any, weight: np.ndarray, hessian: np.ndarray, *, damp: float = 0.01, act_order: bool = False
) -> np.ndarray:
    """Codes that were found before their row met a tie, bool[M, N] in the weight's own order.
    Rows that share a scale (blocks) end at the first tie of any.

    From the result alone: W − Ŵ = e U, and e_i U_ii is what the rounding of column i did.
    AssertionError if a code, before or after a tie, is not a nearest one to what the errors of
    earlier columns made of its weight.
    """
    f = factor(hessian, damp, act_order)
    order = np.arange(weight.shape[1]) if f.order is None else to_host(f.order)
    upper = to_host(f.upper)
    codes = to_host(q.codes)
    error = (np.where(to_host(f.dead), 0.0, weight) - to_host(q.dequantize()))[:, order]
    rounded = np.linalg.solve(upper.T, error.T).T * np.diag(upper)
    # of a dynamic group: in the order of the visit
    scales = spread(to_host(q.scale), q.scheme, weight.shape)
    r = rounded / (scales if q.g_idx is not None else scales[:, order])
    codes = codes[:, order]
    clipped = ((codes == q.scheme.qmin) & (r < 0)) | ((codes == q.scheme.qmax) & (r > 0))
    assert np.all((np.abs(r) <= 0.5 + NEAR) | clipped)
    ties = (np.abs(np.abs(r) - 0.5) < NEAR) & ~clipped
    if q.scheme.granularity == "block":
        ties = np.broadcast_to(ties.any(axis=0), ties.shape)
    before = np.empty(ties.shape, dtype=bool)
    before[:, order] = np.cumsum(ties, axis=1) == 0
    return before


def exact_ties(
    weight: np.ndarray, hessian: np.ndarray, scheme: Scheme, damp: float = 0.01
) -> np.ndarray:
    """Ties of OBQ in the weight's own order, bool[M, N], in fractions: exact for these floats.
    Of a half-integer rule with dynamic groups; a tie is rounded to the even code.
    """
    m, n = weight.shape
    h = [[Fraction(float(entry)) for entry in row] for row in hessian]
    dead = [h[i][i] == 0 for i in range(n)]
    diagonal = [Fraction(1) if dead[i] else h[i][i] for i in range(n)]
    for i in range(n):
        h[i][i] = diagonal[i] + Fraction(damp) * sum(diagonal) / n
    inverse = _inverse(h)
    w = [[Fraction(0 if dead[j] else float(x)) for j, x in enumerate(row)] for row in weight]
    rows, width = scheme.block
    if scheme.granularity == "group":
        rows = 1
    zero = 1 << (scheme.bits - 1) if scheme.qmin == 0 else 0
    half = Fraction((1 << scheme.bits) - 1, 2)
    scale = [Fraction(1)] * m
    ties = np.zeros((m, n), dtype=bool)
    for i in range(n):
        if i % width == 0:
            sizes = [max(map(abs, row[i : i + width])) for row in w]
            for k in range(m):
                first = k // rows * rows
                scale[k] = max(sizes[first : first + rows]) / half or Fraction(1)
        for k, row in enumerate(w):
            x = row[i] / scale[k]
            code = min(max(round(x) + zero, scheme.qmin), scheme.qmax)
            ties[k, i] = abs(x - (code - zero)) == Fraction(1, 2) and (
                scheme.qmin - zero <= x <= scheme.qmax - zero
            )
            share = (row[i] - scale[k] * (code - zero)) / inverse[i][i]
            for j in range(i, n):
                row[j] -= share * inverse[i][j]
        pivot = list(inverse[i])
        for a in range(i + 1, n):
            share = inverse[a][i] / pivot[i]
            inverse[a] = [x - share * y for x, y in zip(inverse[a], pivot, strict=True)]
    return ties


def _inverse(matrix: list[list[Fraction]]) -> list[list[Fraction]]:
    """The inverse of a positive definite matrix by Gauss and Jordan."""
    n = len(matrix)
    rows = [[*row, *(Fraction(i == j) for j in range(n))] for i, row in enumerate(matrix)]
    for i in range(n):
        pivot = [x / rows[i][i] for x in rows[i]]
        rows = [
            pivot if k == i else [x - row[i] * y for x, y in zip(row, pivot, strict=True)]
            for k, row in enumerate(rows)
        ]
    return [row[n:] for row in rows]
