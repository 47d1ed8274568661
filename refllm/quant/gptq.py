"""GPTQ: round a weight column by column, and let the remaining columns compensate for each
column's error.

Source: Frantar et al. 2022 (arXiv:2210.17323), section 3 and algorithm 1, and the code that
they published with it. For one row w of the weight the output error of the layer is
½ (w − q) H (w − q)ᵀ. After column i has been rounded, the columns j > i move by

    w_j ← w_j − e_i U_ij,   e_i = (w_i − q_i) / U_ii,   Uᵀ U = H⁻¹,

which minimises the error given q_1 … q_i, and adds ½ e_i² to it. ``hessian`` explains why U
is the matrix that this update needs. ``obq`` is the naive twin: the same algorithm with the
inverse Hessian itself, downdated column by column.

| symbol | name                                                                   | shape  |
|--------|------------------------------------------------------------------------|--------|
| W      | weight; its rows are independent of each other                         | [M, N] |
| H, U   | damped Hessian, and the triangular factor of its inverse (``hessian``) | [N, N] |
| e      | scaled errors                                                          | [N, M] |
| Σ      | loss, ½ Σ e² = ½ tr((W − Ŵ) H (W − Ŵ)ᵀ), dead columns of W at zero     |        |

How it is made fast, without changing the result except by rounding:

- The weight is stored transposed, [N, M], so that each column is contiguous.
- Updates are lazy (section 3.3): a column receives the errors of earlier columns when it is
  reached. A block of columns first receives the errors of all earlier blocks in one matrix
  product, then each of its columns those of the earlier columns of the block.
- The errors e overwrite the columns that they belong to, so W needs no copy.
- When a dynamic group begins, all of its columns are brought up to date before its scale is
  found. (The published code does not always do so: ``upstream_quirks`` repeats it.)

Left out: the sequential order of a layer's projections (``layer_inputs``), ternary grids,
batches of experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from refllm.backend import Array, namespace
from refllm.errors import InputError
from refllm.formats.uniform import Scheme, require_finite
from refllm.quant.column_quantizer import ColumnQuantizer, GPTQResult
from refllm.quant.hessian import Factor, Hessian, damped, factor, hessian
from refllm.quant.layer_inputs import STAGES, LayerRun
from refllm.quant.methods import Method, QuantizedProjection, QuantizeWeight

__all__ = ["GPTQ", "Factor", "GPTQResult", "Hessian", "damped", "factor", "gptq", "hessian"]


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
) -> GPTQResult:
    """Quantise W[M, N] for inputs with the Hessian H[N, N].

    The simple version (``obq`` with U in place of the inverse)::

        for i in range(N):
            q[:, i] = nearest(W[:, i])
            e = (W[:, i] - q[:, i]) / U[i, i]
            W[:, i + 1:] -= outer(e, U[i, i + 1:])

    Parameters
    ----------
    hessian
        H, or its ``factor(H, damp, act_order)``, which serves all weights that read the
        same input.
    block_size
        columns per block. It changes the speed, and the result only by rounding.
    damp
        λ as a share of the mean diagonal of H; raised if H is not positive definite
        (``factor``). The result's ``.damp`` is the value that was used.
    act_order
        visit the columns by decreasing diagonal of H, so that the columns that matter most
        have the most columns left to compensate for them. With dynamic groups the result
        has a ``g_idx``.
    static_groups
        find the scales of all groups from the original weight, not from what compensation
        has made of a group when it begins.
    mse
        search the range of each scale (``column_quantizer.weight_qparams``).
    upstream_quirks
        do as the published code does: a dynamic group's scale is found from columns that
        lack the errors of their own block; one-sided ranges of "half_integer_unsigned" get
        half the scale; the scale of a row covers dead columns.
    scale_dtype, zero_dtype
        dtypes in which scales and zero points are stored (``quantized_linear.quantize``);
        all rounding uses the stored scales.

    Returns
    -------
    A ``GPTQResult``: a ``QuantizedLinear`` with ``.loss`` Σ, ``.damp``, ``.dead`` and
    ``.g_idx``. Dead columns, whose input was always zero during calibration, become zero.

    Raises
    ------
    ValueError
        naming ``name`` if W is not finite or does not fit the scheme or H; for an H that no
        damping makes positive definite.

    Examples
    --------
    Two equal inputs: the second weight makes up for the rounding of the first, 0.4 → 0.

    >>> import numpy as np
    >>> w = np.array([[0.4, 0.4, 7.0]])
    >>> h = np.array([[2.0, 2.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 2.0]])
    >>> gptq(w, h, Scheme(4, "restricted", "channel")).codes.tolist()
    [[0, 1, 7]]
    """
    xp = namespace(weight)
    if isinstance(hessian, Factor):
        f = hessian
    else:
        f = factor(hessian, damp, act_order)
    _check(weight, f, act_order, block_size, name)
    upper = xp.astype(f.upper, weight.dtype, copy=False)  # U[N, N]
    alive = xp.where(f.dead, 0.0, weight)  # [M, N]; an input that is always zero needs no weight
    whole_rows = scheme.granularity in ("tensor", "channel")
    columns = ColumnQuantizer(
        weight if upstream_quirks and whole_rows else alive,
        scheme,
        order=f.order,
        static=static_groups,
        mse=mse,
        one_sided=upstream_quirks,
        scale_dtype=scale_dtype,
        name=name,
    )
    if f.order is not None:
        alive = alive[:, f.order]  # columns in the order of the visit
    # [N, M], overwritten below: a copy, or a view of ``alive``, which is itself a new array
    work = xp.ascontiguousarray(alive.T)
    codes = xp.empty(work.shape, dtype=xp.int8 if scheme.signed else xp.uint8)  # [N, M]
    walk = _stale_walk if upstream_quirks and columns.dynamic else _walk
    walk(work, upper, columns, codes, block_size)
    return GPTQResult.collect(
        codes.T,
        columns,
        loss=_loss(work),
        damp=f.damp,
        dead=f.dead,
        scale_dtype=scale_dtype,
        zero_dtype=zero_dtype,
    )


def _walk(work: Array, upper: Array, columns: ColumnQuantizer, codes: Array, block: int) -> None:
    """Round all columns. work[N, M] holds W before and the errors e after; codes[N, M] is written.

    Two levels of blocks, [c, d) and within it [a, b): a dynamic group is one of them,
    ``block`` the other.
    """
    n = work.shape[0]
    width = columns.width if columns.dynamic else block
    if width >= block:
        outer = width
        inner = block
    else:
        outer = block // width * width
        inner = width
    for c in range(0, n, outer):
        d = min(c + outer, n)
        _compensate(work, upper, 0, c, d)  # one product for all earlier blocks
        for a in range(c, d, inner):
            b = min(a + inner, d)
            _compensate(work, upper, c, a, b)  # and one for the rest of this block
            if columns.dynamic and a % columns.width == 0:
                columns.begin_group(work[a : a + columns.width])  # all of them up to date
            _round_columns(work, upper, columns, codes, a, a, b)


def _stale_walk(
    work: Array, upper: Array, columns: ColumnQuantizer, codes: Array, block: int
) -> None:
    """``_walk`` as published: the scale of a group is found from columns that have received
    the errors of earlier blocks only.
    """
    xp = namespace(work)
    n = work.shape[0]
    width = columns.width
    for c in range(0, n, block):
        d = min(c + block, n)
        _compensate(work, upper, 0, c, d)
        starts = [c, *range(c // width * width + width, d, width)]
        for a, b in zip(starts, [*starts[1:], d], strict=True):
            if a % width == 0:
                end = min(a + width, n)
                # the group's columns in later blocks; often there are none
                beyond = work[d:end] - upper[:c, d:end].T @ work[:c]
                columns.begin_group(xp.concat([work[a : min(end, d)], beyond], axis=0))
            _round_columns(work, upper, columns, codes, c, a, b)


def _compensate(work: Array, upper: Array, start: int, a: int, b: int) -> None:
    """Columns [a, b) receive the errors of columns [start, a): w_j −= Σ_i e_i U_ij."""
    if a > start:
        work[a:b] -= upper[start:a, a:b].T @ work[start:a]  # [b − a, M]


def _round_columns(
    work: Array, upper: Array, columns: ColumnQuantizer, codes: Array, start: int, a: int, b: int
) -> None:
    """Round columns [a, b) one after the other. They have not yet received the errors of
    columns [start, a), nor each other's.
    """
    for i in range(a, b):
        w = work[i]  # [M], a view: what changes w changes the column
        if i > start:
            w -= upper[start:i, i] @ work[start:i]  # w_i −= Σ_j e_j U_ji
        codes[i], back = columns.quantize(i, w)
        w -= back  # w_i − q_i
        w /= upper[i, i]  # e_i = (w_i − q_i) / U_ii, from here on in the place of w_i


def _loss(errors: Array) -> float:
    """Σ = ½ Σ e² of e[N, M], summed in float64, some columns at a time."""
    xp = namespace(errors)
    pieces = (xp.astype(errors[i : i + 128], xp.float64) for i in range(0, errors.shape[0], 128))
    return 0.5 * sum(float(xp.sum(xp.square(piece))) for piece in pieces)


def _check(weight: Array, f: Factor, act_order: bool, block: int, name: str) -> None:
    """ValueError for a weight and factor that do not fit each other."""
    if weight.ndim != 2 or weight.shape[1] != f.upper.shape[0]:
        raise InputError(
            f"{name}: shape {tuple(weight.shape)} does not fit a Hessian of "
            f"{f.upper.shape[0]} columns"
        )
    if weight.dtype.kind != "f":
        raise InputError(f"{name}: GPTQ rounds floating-point weights, got {weight.dtype}")
    require_finite(weight, name)
    if act_order != (f.order is not None):
        raise InputError(
            f"{name}: act_order={act_order}, but the factor was made with act_order={not act_order}"
        )
    if block < 1:
        raise InputError(f"gptq: a block has one column or more, got block_size={block}")


# --- as a method for whole models -----------------------------------------------------------


@dataclass(frozen=True)
class GPTQ(Method):
    """GPTQ as a method for whole models; options as in ``gptq``."""

    block_size: int = 128
    damp: float = 0.01
    act_order: bool = False
    static_groups: bool = False
    mse: bool = False
    scale_dtype: str | None = "float16"
    name: ClassVar[str] = "gptq"
    default_scheme: ClassVar[Scheme] = Scheme(4, "half_integer", "group", 128)
    calibrates: ClassVar[bool] = True
    sequential: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.damp < float("inf"):
            raise InputError(
                f"gptq: damp is a share of the mean diagonal, 0 or more, got {self.damp}"
            )

    def stage_quantizer(self, run: LayerRun, scheme: Scheme) -> QuantizeWeight:
        """The projections of a stage read the same inputs, so they share one Hessian and one
        factor.
        """
        inputs = Hessian(f"the input of {run.tensor(STAGES[run.stage][0])}")
        for x in run.inputs():
            inputs.add(x)
        shared = factor(inputs.matrix, self.damp, self.act_order)

        def quantize_weight(name: str, weight: Array) -> QuantizedProjection:
            made = gptq(
                weight,
                shared,
                scheme,
                block_size=self.block_size,
                act_order=self.act_order,
                static_groups=self.static_groups,
                mse=self.mse,
                scale_dtype=self.scale_dtype,
                name=run.tensor(name),
            )
            return QuantizedProjection(made, made.loss, _note(made, inputs.count, self.damp))

        return quantize_weight


def _note(made: GPTQResult, tokens: int, damp: float) -> str:
    """What is worth knowing about the Hessian: dead inputs, too few tokens, raised damping."""
    columns = made.shape[1]
    dead = int(made.dead.sum())
    notes = [f"{dead} of {columns} inputs are always zero"] if dead else []
    if tokens < columns:
        notes.append(
            f"{tokens} tokens for {columns} columns: only damping makes the Hessian definite"
        )
    if made.damp > damp:
        notes.append(f"damping raised from {damp:g} to {made.damp:g}")
    return "; ".join(notes)
