"""OBQ, the plain form of GPTQ: round a column, move the others by a row of the inverse
Hessian, downdate the inverse.

Source: Frantar & Alistarh 2022 (OBC, arXiv:2208.11580), section 5, equation 7 and lemma 1.

Minimising ½ δ H δᵀ over the change δ of a row, with component i held at q_i − w_i, gives
(Lagrange)

    δ = −(w_i − q_i) / [H⁻¹]_ii · [H⁻¹]_i,   at the cost of ½ (w_i − q_i)² / [H⁻¹]_ii.

Then column i is fixed, and what is left is the same problem without it. The inverse of H
without row and column i is what one step of elimination leaves of H⁻¹ (lemma 1):

    H⁻¹ ← H⁻¹ − [H⁻¹]_:i [H⁻¹]_i: / [H⁻¹]_ii,   then without row and column i.

**Why GPTQ may take a Cholesky factor.** Elimination that walks down the diagonal *is* the
Cholesky factorisation: when column i is reached, what is left of H⁻¹ has the row U_ii ·
(U_ii, U_i,i+1, …) at its top, where Uᵀ U = H⁻¹. So [H⁻¹]_i / [H⁻¹]_ii = U_i / U_ii, the
diagonal is U_ii², and the whole sequence of N inverses is N rows of one U. That needs all
rows of the weight to visit the columns in one order. OBQ proper does not: each row takes
next whatever column costs least (``greedy``), with an inverse of its own, at N times the
work.

| symbol | name                                    | shape     |
|--------|-----------------------------------------|-----------|
| W      | weight                                  | [M, N]    |
| H⁻¹    | inverse of what is left of the Hessian  | [N, N], of each row if ``greedy`` |
| e      | (w_i − q_i) / [H⁻¹]_ii                  | [M]       |

Left out: pruning, blocks, everything that makes it fast. ``gptq`` is this, fast.
"""

from __future__ import annotations

from refllm.backend import Array, namespace
from refllm.formats.uniform import Scheme, dequantize_codes, quantize_codes, require_finite
from refllm.quant.hessian import check, damped
from refllm.quant.rtn import Grids, Solution

__all__ = ["obq"]


def obq(
    weight: Array,
    hessian: Array,
    scheme: Scheme,
    *,
    damp: float = 0.01,
    act_order: bool = False,
    static_groups: bool = False,
    mse: bool = False,
    greedy: bool = False,
    name: str = "weight",
) -> Solution:
    """Quantise W[M, N] for inputs with the Hessian H[N, N]: ``gptq`` in O(N³ + M N²) with
    no product worth the name.

    The arguments are those of ``gptq``. ``greedy`` lets each row choose its next column by
    the cost; groups are then static, ``act_order`` has no say, and time and memory are M
    times those of an inverse.

    Raises
    ------
    ValueError
        naming ``name`` if W is not finite or does not fit the scheme or H, or if the damped
        H is not positive definite (nothing is raised here: ``gptq`` does that).
    """
    xp = namespace(weight, hessian)
    check(hessian, damp)
    if weight.ndim != 2 or weight.shape[1] != hessian.shape[0]:
        raise ValueError(
            f"{name}: shape {tuple(weight.shape)} does not fit a Hessian of {hessian.shape[0]} columns"
        )
    require_finite(weight, name)
    diagonal = xp.diagonal(hessian)
    dead = diagonal == 0
    h = damped(hessian, damp)
    alive = xp.where(dead, 0.0, weight)
    if act_order and not greedy:
        order = xp.argsort(-diagonal, kind="stable")
    else:
        order = None
    grids = Grids(alive, scheme, order=order, static=static_groups or greedy, mse=mse, name=name)
    if order is not None:
        alive = alive[:, order]
        h = h[order][:, order]
    inverse = xp.linalg.inv(h)
    if not bool(xp.all(xp.diagonal(inverse) > 0)):
        raise ValueError(f"{name}: the Hessian is not positive definite at damp={damp}; raise it")
    codes, loss = _greedy(alive, inverse, grids) if greedy else _in_order(alive, inverse, grids)
    return Solution.collect(codes, grids, loss=loss, damp=damp, dead=dead)


def _in_order(weight: Array, inverse: Array, grids: Grids) -> tuple[Array, float]:
    """Codes[M, N] and the loss, first column first; both arrays are consumed."""
    xp = namespace(weight, inverse)
    codes = []
    loss = 0.0
    for i in range(weight.shape[1]):
        if grids.dynamic and i % grids.width == 0:
            grids.open(weight[:, i : i + grids.width].T)
        q, back = grids.round(i, weight[:, i])
        error = weight[:, i] - back
        d = inverse[i, i]
        loss += 0.5 * float(xp.sum(error * error) / d)
        # column i becomes q; earlier ones have zeros here
        weight = weight - (error / d)[:, None] * inverse[i, :]
        # lemma 1; row and column i become 0
        inverse = inverse - inverse[:, i : i + 1] * inverse[i : i + 1, :] / d
        codes.append(q)
    return xp.stack(codes, axis=1), loss


def _greedy(weight: Array, inverse: Array, grids: Grids) -> tuple[Array, float]:
    """``_in_order``, but each row takes the column next that costs it least, with an
    inverse of its own.
    """
    xp = namespace(weight, inverse)
    m, n = weight.shape
    scale, zero_point = grids.arrays()
    rows = xp.arange(m)
    loss = 0.0
    inverse = xp.repeat(inverse[None], m, axis=0)  # [M, N, N]
    codes = quantize_codes(weight, scale, zero_point, grids.scheme)
    todo = xp.ones((m, n), dtype=xp.bool_)
    for _ in range(n):
        q = quantize_codes(weight, scale, zero_point, grids.scheme)
        error = weight - dequantize_codes(q, scale, zero_point, grids.scheme)
        d = xp.where(todo, xp.diagonal(inverse, axis1=1, axis2=2), 1.0)
        cost = xp.where(todo, error * error / d, xp.inf)
        i = xp.argmin(cost, axis=1)  # [M]
        loss += 0.5 * float(xp.sum(cost[rows, i]))
        codes[rows, i] = q[rows, i]
        row = xp.where(todo, inverse[rows, i, :], 0.0)  # [M, N]; done columns stay where they are
        weight = weight - (error / d)[rows, i][:, None] * row
        inverse = inverse - row[:, :, None] * row[:, None, :] / d[rows, i][:, None, None]
        todo[rows, i] = False
    return codes, loss
