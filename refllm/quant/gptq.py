"""GPTQ: round a weight column by column, and let the columns to come make up for each one's
error.

Source: Frantar et al. 2022 (arXiv:2210.17323), section 3 and algorithm 1, and the code that
they published with it. The layer's output error for one row is ½ (w − q) H (w − q)ᵀ. After
column i was rounded, the columns j > i move by

    w_j ← w_j − e_i U_ij,   e_i = (w_i − q_i) / U_ii,   Uᵀ U = H⁻¹,

which is where the error is least given q_1 … q_i; what that costs is ½ e_i². ``hessian``
says why U is the matrix that the step needs, ``obq`` is the same in the plain form, with
the inverse that it stands for.

| symbol | name                                                                    | shape  |
|--------|-------------------------------------------------------------------------|--------|
| W      | weight; rows do not influence each other                                | [M, N] |
| H, U   | damped Hessian and the triangular factor of its inverse (``hessian``)   | [N, N] |
| e      | scaled errors                                                           | [N, M] |
| Σ      | loss, ½ Σ e² = ½ tr((W − Ŵ) H (W − Ŵ)ᵀ), dead columns of W at zero      |        |

Columns lie in rows here, [N, M], so that each is contiguous. The update is applied when a
column is reached: a block of columns first takes the errors of all earlier blocks in one
product ("lazy batch updates", section 3.3), then each of its columns those of the block.
Errors take the place of the columns that they belong to. When a dynamic group begins, all
of its columns are brought up to date before its scale is found, so the block size changes
nothing but rounding; ``upstream_quirks`` does as the published code does instead, where it
does.

Left out: the sequential order of a layer's projections (``calibrate``), ternary grids,
batches of experts.
"""

from __future__ import annotations

from refllm.backend import Array, namespace
from refllm.formats.uniform import Scheme, require_finite
from refllm.quant.hessian import Factor, Hessian, damped, factor, hessian
from refllm.quant.rtn import Grids, Solution

__all__ = ["Factor", "Hessian", "Solution", "damped", "factor", "gptq", "hessian"]


def gptq(
    weight: Array,
    hessian: Array | Factor,
    scheme: Scheme,
    *,
    block_size: int = 128,
    damp: float = 0.01,
    act_order: bool = False,
    static_groups: bool = False,
    mse: bool = False,
    upstream_quirks: bool = False,
    scale_dtype: str | None = None,
    zero_dtype: str | None = None,
    name: str = "weight",
) -> Solution:
    """Quantise W[M, N] for inputs with the Hessian H[N, N].

    Parameters
    ----------
    hessian
        H, or its ``factor(H, damp, act_order)``, which serves all weights that read the
        same input.
    block_size
        columns a block. Changes the speed, and nothing but rounding in the result.
    damp
        λ as a share of H's mean diagonal; raised if H is not positive definite
        (``factor``), see ``.damp``.
    act_order
        visit the columns by falling diagonal of H, so that the columns that matter most
        have the most columns left to make up for them. With dynamic groups the result has a
        ``g_idx``.
    static_groups
        scales of all groups from the weight as it came, not from what is left when the
        group begins.
    mse
        search the range of each scale (``rtn.params``).
    upstream_quirks
        as the published code does: a dynamic group's scale is found from columns that lack
        the errors of its own block; one-sided ranges of "half_integer_unsigned" get half of
        the step; a row's scale sees dead columns.
    scale_dtype, zero_dtype
        what scales and zero points are stored in (``affine.quantize``); everything is
        rounded with the stored scales.

    Returns
    -------
    A ``QuantizedLinear`` with ``.loss`` Σ, ``.damp``, ``.dead`` and ``.g_idx``. Dead columns,
    whose input was always zero during calibration, become zero.

    Raises
    ------
    ValueError
        naming ``name`` if W is not finite or does not fit the scheme or H; for an H that no
        damping helps.
    """
    xp = namespace(weight)
    if isinstance(hessian, Factor):
        f = hessian
    else:
        f = factor(hessian, damp, act_order)
    _check(weight, f, act_order, block_size, name)
    upper = xp.astype(f.upper, weight.dtype, copy=False)
    alive = xp.where(f.dead, 0.0, weight)
    whole_rows = scheme.granularity in ("tensor", "channel")
    grids = Grids(
        weight if upstream_quirks and whole_rows else alive,
        scheme,
        order=f.order,
        static=static_groups,
        mse=mse,
        one_sided=upstream_quirks,
        scale_dtype=scale_dtype,
        name=name,
    )
    # [N, M], to be overwritten; where it is no copy, it is a view of ``alive``, which
    # ``where`` has made
    work = xp.ascontiguousarray((alive if f.order is None else alive[:, f.order]).T)
    walk = _stale_walk if upstream_quirks and grids.dynamic else _walk
    codes = xp.empty(work.shape, dtype=xp.int8 if scheme.signed else xp.uint8)
    walk(work, upper, grids, codes, block_size)
    report = {"loss": _loss(work), "damp": f.damp, "dead": f.dead}
    return Solution.collect(
        codes.T, grids, scale_dtype=scale_dtype, zero_dtype=zero_dtype, **report
    )


def _loss(errors: Array) -> float:
    """½ Σ e², summed in float64, some columns at a time."""
    xp = namespace(errors)
    pieces = (xp.astype(errors[i : i + 128], xp.float64) for i in range(0, errors.shape[0], 128))
    return 0.5 * sum(float(xp.sum(xp.square(piece))) for piece in pieces)


def _walk(work: Array, upper: Array, grids: Grids, codes: Array, block: int) -> None:
    """Round all columns; work[N, M] holds the weight before and the errors e after.

    Two levels of blocks, [c, d) and within it [a, b): a dynamic group is one of them,
    ``block`` the other.
    """
    n = work.shape[0]
    width = grids.width if grids.dynamic else block
    outer, inner = (width, block) if width >= block else (block // width * width, width)
    for c in range(0, n, outer):
        d = min(c + outer, n)
        _catch_up(work, upper, 0, c, d)
        for a in range(c, d, inner):
            b = min(a + inner, d)
            _catch_up(work, upper, c, a, b)
            if grids.dynamic and a % grids.width == 0:
                grids.open(work[a : a + grids.width])  # up to date, all of them
            _round_columns(work, upper, grids, codes, a, a, b)


def _stale_walk(work: Array, upper: Array, grids: Grids, codes: Array, block: int) -> None:
    """``_walk`` as published: a group's scale is found from columns that know the errors of
    earlier blocks only.
    """
    xp = namespace(work)
    n = work.shape[0]
    width = grids.width
    for c in range(0, n, block):
        d = min(c + block, n)
        _catch_up(work, upper, 0, c, d)
        starts = [c, *range(c // width * width + width, d, width)]
        for a, b in zip(starts, [*starts[1:], d], strict=True):
            if a % width == 0:
                end = min(a + width, n)
                # columns of blocks to come; often none
                beyond = work[d:end] - upper[:c, d:end].T @ work[:c]
                grids.open(xp.concat([work[a : min(end, d)], beyond], axis=0))
            _round_columns(work, upper, grids, codes, c, a, b)


def _catch_up(work: Array, upper: Array, start: int, a: int, b: int) -> None:
    """Columns a … b take the errors of columns start … a."""
    if a > start:
        work[a:b] -= upper[start:a, a:b].T @ work[start:a]


def _round_columns(
    work: Array, upper: Array, grids: Grids, codes: Array, start: int, a: int, b: int
) -> None:
    """Round columns a … b, which lack the errors of columns start … a and each other's, one
    after the other.
    """
    for i in range(a, b):
        w = work[i]  # a view: what is done to w is done to the column
        if i > start:
            w -= upper[start:i, i] @ work[start:i]
        codes[i], back = grids.round(i, w)
        w -= back
        w /= upper[i, i]  # from here on the row holds e_i


def _check(weight: Array, f: Factor, act_order: bool, block: int, name: str) -> None:
    if weight.ndim != 2 or weight.shape[1] != f.upper.shape[0]:
        raise ValueError(
            f"{name}: shape {tuple(weight.shape)} does not fit a Hessian of {f.upper.shape[0]} columns"
        )
    if weight.dtype.kind != "f":
        raise ValueError(f"{name}: GPTQ rounds floating-point weights, got {weight.dtype}")
    require_finite(weight, name)
    if act_order != (f.order is not None):
        raise ValueError(
            f"{name}: act_order={act_order}, but the factor was made with act_order={not act_order}"
        )
    if block < 1:
        raise ValueError(f"gptq: a block has one column or more, got block_size={block}")
