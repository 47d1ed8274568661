"""OBQ, the naive twin of GPTQ: round a column, move the others by a row of the inverse
Hessian, downdate the inverse.

Source: Frantar & Alistarh 2022 (OBC, arXiv:2208.11580), section 5, equation 7 and lemma 1.

Minimise ½ δ H δᵀ over the change δ of a row, with component i fixed at q_i − w_i. A Lagrange
multiplier gives

    δ = −(w_i − q_i) / [H⁻¹]_ii · [H⁻¹]_i,   at the cost of ½ (w_i − q_i)² / [H⁻¹]_ii.

Then column i is fixed, and what is left is the same problem without it. The inverse of H
without row and column i is one step of elimination applied to H⁻¹ (lemma 1):

    H⁻¹ ← H⁻¹ − [H⁻¹]_:i [H⁻¹]_i: / [H⁻¹]_ii,   then without row and column i.

**Why GPTQ may take a Cholesky factor.** Elimination that walks down the diagonal *is* the
Cholesky factorisation: when column i is reached, the first row of what is left of H⁻¹ is
U_ii · (U_ii, U_i,i+1, …), where Uᵀ U = H⁻¹. So [H⁻¹]_i / [H⁻¹]_ii = U_i / U_ii, the diagonal
is U_ii², and the N successive inverses are the N rows of one U. This requires that all rows
of the weight visit the columns in one order. OBQ proper does not require that: each row
continues with the column that costs it least (``greedy``), with an inverse of its own, at N
times the work.

| symbol | name                                   | shape                              |
|--------|----------------------------------------|------------------------------------|
| W      | weight                                 | [M, N]                             |
| H⁻¹    | inverse of what is left of the Hessian | [N, N], or [M, N, N] if ``greedy`` |
| e      | (w_i − q_i) / [H⁻¹]_ii                 | [M]                                |

Left out: pruning, blocks, everything that makes it fast; ``gptq`` is the fast version.
"""

from __future__ import annotations

from refllm.backend import Array, namespace
from refllm.errors import InputError
from refllm.formats.uniform import Scheme, dequantize_codes, quantize_codes, require_finite
from refllm.quant.column_quantizer import ColumnQuantizer, GPTQResult
from refllm.quant.hessian import check, damped

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
) -> GPTQResult:
    """Quantise W[M, N] for inputs with the Hessian H[N, N]: what ``gptq`` computes, in
    O(N³ + M N²) operations, one column at a time.

    The arguments are those of ``gptq``. ``greedy`` lets each row choose its next column by
    its cost; groups are then static, ``act_order`` has no effect, and it takes M times the
    time and memory.

    Raises
    ------
    ValueError
        naming ``name`` if W is not finite or does not fit the scheme or H, or if the damped
        H is not positive definite (unlike ``gptq``, this does not raise ``damp``).
    """
    xp = namespace(weight, hessian)
    check(hessian, damp)
    if weight.ndim != 2 or weight.shape[1] != hessian.shape[0]:
        raise InputError(
            f"{name}: shape {tuple(weight.shape)} does not fit a Hessian of "
            f"{hessian.shape[0]} columns"
        )
    require_finite(weight, name)
    diagonal = xp.diagonal(hessian)
    dead = diagonal == 0
    h = damped(hessian, damp)
    alive = xp.where(dead, 0.0, weight)
    order = None
    if act_order and not greedy:
        order = xp.argsort(-diagonal, kind="stable")
    static = static_groups or greedy
    columns = ColumnQuantizer(alive, scheme, order=order, static=static, mse=mse, name=name)
    if order is not None:
        alive = alive[:, order]
        h = h[order][:, order]
    inverse = xp.linalg.inv(h)
    if not bool(xp.all(xp.diagonal(inverse) > 0)):
        raise InputError(f"{name}: the Hessian is not positive definite at damp={damp}; raise it")
    round_all = _greedy if greedy else _in_order
    codes, loss = round_all(alive, inverse, columns)
    return GPTQResult.collect(codes, columns, loss=loss, damp=damp, dead=dead)


def _in_order(weight: Array, inverse: Array, columns: ColumnQuantizer) -> tuple[Array, float]:
    """Codes[M, N] and the loss; the columns of W[M, N] are rounded from first to last."""
    xp = namespace(weight, inverse)
    codes = []
    loss = 0.0
    for i in range(weight.shape[1]):
        if columns.dynamic and i % columns.width == 0:
            columns.begin_group(weight[:, i : i + columns.width].T)
        q, back = columns.quantize(i, weight[:, i])  # both [M]
        error = weight[:, i] - back  # w_i − q_i
        d = inverse[i, i]  # [H⁻¹]_ii
        loss += 0.5 * float(xp.sum(error * error) / d)
        # equation 7; column i becomes q, earlier columns do not move: H⁻¹ is zero there
        weight = weight - (error / d)[:, None] * inverse[i, :]
        # lemma 1; row and column i become zero
        inverse = inverse - inverse[:, i : i + 1] * inverse[i : i + 1, :] / d
        codes.append(q)
    return xp.stack(codes, axis=1), loss  # [M, N]


def _greedy(weight: Array, inverse: Array, columns: ColumnQuantizer) -> tuple[Array, float]:
    """``_in_order``, but each row continues with the column that costs it least, and has an
    inverse of its own.
    """
    xp = namespace(weight, inverse)
    m, n = weight.shape
    scale, zero_point = columns.qparams()
    rows = xp.arange(m)
    loss = 0.0
    inverse = xp.repeat(inverse[None], m, axis=0)  # [M, N, N]
    codes = quantize_codes(weight, scale, zero_point, columns.scheme)
    todo = xp.ones((m, n), dtype=xp.bool_)
    for _ in range(n):
        q = quantize_codes(weight, scale, zero_point, columns.scheme)
        error = weight - dequantize_codes(q, scale, zero_point, columns.scheme)  # [M, N]
        d = xp.where(todo, xp.diagonal(inverse, axis1=1, axis2=2), 1.0)  # [M, N]
        cost = xp.where(todo, error * error / d, xp.inf)
        i = xp.argmin(cost, axis=1)  # [M]
        loss += 0.5 * float(xp.sum(cost[rows, i]))
        codes[rows, i] = q[rows, i]
        row = xp.where(todo, inverse[rows, i, :], 0.0)  # [M, N]; rounded columns do not move
        weight = weight - (error / d)[rows, i][:, None] * row
        inverse = inverse - row[:, :, None] * row[:, None, :] / d[rows, i][:, None, None]
        todo[rows, i] = False
    return codes, loss
