"""The Hessian of a layer's output error, and the triangular factor that GPTQ needs of it.

If a row w of the weight is stored as q, the squared error of its outputs for T inputs X is
‖(w − q) Xᵀ‖². Its mean over the tokens is ½ (w − q) H (w − q)ᵀ with H = 2 XᵀX / T: a
quadratic form with the same matrix for all rows.

Sources: Frantar et al. 2022 (GPTQ), section 3 and algorithm 1; Frantar & Alistarh 2022
(OBC), section 3 and lemma 1.

| symbol | name                                                           | shape  |
|--------|----------------------------------------------------------------|--------|
| X      | calibration inputs of the layer, all tokens                    | [T, N] |
| H      | Hessian, ones on the diagonal of dead columns, plus λI         | [N, N] |
| λ      | damping: ``damp`` times the mean of the diagonal               |        |
| R      | upper triangular, H = R Rᵀ                                     | [N, N] |
| U      | upper triangular, Uᵀ U = H⁻¹: U = R⁻¹, the matrix of the paper | [N, N] |

The paper inverts H and takes the upper Cholesky factor of the inverse: OBQ's update of
column i needs row i of the inverse of what is left of H after i columns, and that row is
U_ii · U_i. Factorising H itself from the last column to the first gives the same U without
inverting H: H = R Rᵀ gives H⁻¹ = R⁻ᵀ R⁻¹ = Uᵀ U, and there is only one triangular matrix
with a positive diagonal that satisfies this. It takes less than half of the operations, and
there is no second factorisation that could fail. (For float32 arrays NumPy computes the
factor in float64; CuPy does not.)

Left out: Hessians of groups of rows, sharding, the Fisher matrix in place of XᵀX.
"""

from __future__ import annotations

from dataclasses import dataclass

from refllm.backend import Array, namespace
from refllm.errors import InputError

# the least damping that is tried after ``damp`` has failed; each further attempt doubles it
LEAST_DAMP = 1e-4
_LEAF = 128  # a triangle of this size is inverted in one call; larger ones by halves


def hessian(x: Array) -> Array:
    """H = 2 xᵀx / T of x[T, N] → [N, N], in x's dtype (float32 for 16-bit inputs).

    ValueError if there is no token, or a value is not finite.

    >>> import numpy as np
    >>> hessian(np.array([[1.0, 2.0], [3.0, 0.0]])).tolist()
    [[10.0, 2.0], [2.0, 4.0]]
    """
    accumulator = Hessian()
    accumulator.add(x)
    return accumulator.matrix


class Hessian:
    """H accumulated over batches, weighted by their token counts: how tokens are batched
    changes the result only by rounding.

    The published code averages over sequences instead. If all sequences have one length,
    that scales H and the loss by a constant.
    """

    def __init__(self, name: str = "x") -> None:
        self.name = name  # of the tensor, for messages
        self.count = 0  # tokens so far
        self._sum: Array | None = None  # Σ xᵀx

    def add(self, x: Array) -> None:
        """Add a batch x[..., N] of any number of tokens; ValueError if a value is not finite,
        or x has no columns.
        """
        xp = namespace(x)
        if x.ndim == 0 or x.shape[-1] == 0:
            raise InputError(
                f"hessian: {self.name} needs columns, x[..., N], got shape {tuple(x.shape)}"
            )
        x = xp.reshape(x, (-1, x.shape[-1]))  # [T, N]
        if x.dtype.itemsize < 4:
            x = xp.astype(x, xp.float32)  # sums of float16 overflow at 65,504
        if not bool(xp.all(xp.isfinite(x))):
            raise InputError(
                f"hessian: {self.name} holds NaN or infinity after {self.count} tokens"
            )
        # [N, N]; NumPy sees that both operands are one array and computes one triangle only
        gram = x.T @ x
        if self._sum is None:
            self._sum = gram
        elif self._sum.shape != gram.shape:
            raise InputError(
                f"hessian: {self.name} has {gram.shape[0]} columns, earlier {self._sum.shape[0]}"
            )
        else:
            self._sum += gram
        self.count += x.shape[0]

    @property
    def matrix(self) -> Array:
        """H[N, N], a new array; ValueError before the first token."""
        if self._sum is None or self.count == 0:
            raise InputError(f"hessian: {self.name} has seen no token")
        return self._sum * (2.0 / self.count)


@dataclass(frozen=True)
class Factor:
    """U of a damped Hessian. One factor serves all weights that read the same input."""

    upper: Array  # U[N, N], with the columns in ``order``
    damp: float  # λ as a share of the mean diagonal: at least the value that was asked for
    dead: Array  # columns whose input was always zero, bool[N], in the weight's own order
    # the columns by decreasing diagonal, int64[N]; None: the weight's own order
    order: Array | None


def damped(h: Array, damp: float) -> Array:
    """H with ones on the diagonal of dead columns, plus λI, λ = damp · mean(diagonal): a new
    array [N, N].

    The mean includes those ones, as in the published code.
    """
    xp = namespace(h)
    diagonal = xp.diagonal(h)
    diagonal = xp.where(diagonal == 0, 1.0, diagonal)
    index = xp.arange(h.shape[0])
    out = xp.astype(h, h.dtype, copy=True)
    out[index, index] = diagonal + damp * float(xp.mean(diagonal))  # + λ
    return out


def factor(h: Array, damp: float = 0.01, act_order: bool = False) -> Factor:
    """U with Uᵀ U = (H + λI)⁻¹ for a Hessian h[N, N]. ``act_order`` first sorts the columns
    by decreasing diagonal.

    Of equal diagonals the lower column comes first; dead columns come last, since nothing
    depends on them.

    If the matrix is not positive definite within its precision (too few tokens, or inputs
    of very different sizes, with a small ``damp``), ``damp`` is raised to 1e-4 if it was
    less, and then doubled until the matrix is positive definite.

    Raises
    ------
    ValueError
        if h is not a square matrix of finite values with a diagonal of zero or more, or if
        no damping helps.
    """
    xp = namespace(h)
    check(h, damp)
    diagonal = xp.diagonal(h)  # [N]
    dead = diagonal == 0  # bool[N]
    order = None
    if act_order:
        order = xp.argsort(-diagonal, kind="stable")
        h = h[order][:, order]  # rows and columns alike
    while (r := _reverse_cholesky(damped(h, damp))) is None:
        damp = max(LEAST_DAMP, 2 * damp)
        if damp > 2.0 * h.shape[0] / LEAST_DAMP:  # far beyond the sum of all eigenvalues
            raise InputError(
                "hessian: no damping makes it positive definite; it is not 2·xᵀx/T of any x"
            )
    upper = xp.zeros_like(h)
    _invert(r, upper)
    return Factor(upper, damp, dead, order)


def check(h: Array, damp: float) -> None:
    """ValueError unless h[N, N] can be a Hessian and ``damp`` a share of its diagonal."""
    xp = namespace(h)
    if h.ndim != 2 or h.shape[0] != h.shape[1] or h.shape[0] == 0:
        raise InputError(f"hessian: needs a square matrix [N, N], got shape {tuple(h.shape)}")
    if not bool(xp.all(xp.isfinite(h))):
        raise InputError("hessian: it holds NaN or infinity; look at the calibration inputs")
    if not bool(xp.all(xp.diagonal(h) >= 0)):
        raise InputError("hessian: its diagonal is negative somewhere; it is not 2·xᵀx/T of any x")
    if not 0 <= damp < float("inf"):
        raise InputError(f"hessian: damp is a share of the mean diagonal, 0 or more, got {damp}")


def _reverse_cholesky(matrix: Array) -> Array | None:
    """R, upper triangular with R Rᵀ = matrix, or None if it is not positive definite."""
    xp = namespace(matrix)
    try:
        # from the last column to the first: flip, take the lower factor, flip back
        lower = xp.linalg.cholesky(matrix[::-1, ::-1])
    except xp.linalg.LinAlgError:
        return None
    # CuPy does not raise but returns an unfinished factor. The squared rows of a true factor
    # sum to the diagonal, up to the rounding of n terms; NaN fails the comparison too.
    diagonal = xp.diagonal(matrix)[::-1]
    error = xp.abs(xp.einsum("ij,ij->i", lower, lower) - diagonal)
    tolerance = (lower.shape[0] + 2) * float(xp.finfo(lower.dtype).eps)
    if not bool(xp.all(error <= tolerance * diagonal)):
        return None
    return xp.ascontiguousarray(lower[::-1, ::-1])


def _invert(r: Array, out: Array) -> None:
    """Write the inverse of an upper-triangular r[n, n] into ``out``, which holds zeros. It
    takes a quarter of the work of inverting a general matrix.

    By halves: [[A, B], [0, C]]⁻¹ = [[A⁻¹, −A⁻¹ B C⁻¹], [0, C⁻¹]]
    """
    n = r.shape[0]
    if n <= _LEAF:
        # zeros below the diagonal stay exact zeros: elimination has nothing to do there
        out[...] = namespace(r).linalg.inv(r)
        return
    first = slice(None, n // 2)
    second = slice(n // 2, None)
    _invert(r[first, first], out[first, first])
    _invert(r[second, second], out[second, second])
    out[first, second] = -(out[first, first] @ r[first, second]) @ out[second, second]
