"""Integer products by floating-point units: exact sums of 8-bit codes, and the scaled
products made of them.

NumPy's integer matrix product is a loop, many times slower than a BLAS call. But a float32
product of integers is exact as long as no partial sum can exceed 2²⁴ = 16,777,216, in any
order of summation, because float32 represents every integer up to there. With codes of at
most p and q in size that holds for

    K ≤ ⌊2²⁴ / (p·q)⌋      127·127: 1,040   128·128: 1,024   255·127: 518   255·255: 258

and no further: 1,041 products of 127·127 are 16,790,289, which is odd and not a float32. A
longer sum is split along N, and the parts are added as integers.

A product of two quantised matrices, x̂ = s_x (q_x − z_x) per row (token) and
ŵ = s_w (q_w − z_w) per row (channel), needs one integer product and sums of codes:

    Y = s_x s_w (Q_x Q_wᵀ − z_x Σq_w − z_w Σq_x + N z_x z_w)

Scales per row factor out of the sum over N, scales per input channel do not (that is why
SmoothQuant moves them into the weight); scales per group need one such product per group.

| symbol   | name                             | shape                      |
|----------|----------------------------------|----------------------------|
| Q_x, Q_w | codes of activations and weight  | [T, N], [M, N] int8, uint8 |
| s_x, z_x | scale, zero point of activations | [T, 1] or ()               |
| s_w, z_w | scale, zero point of the weight  | [M, 1], () or [M, N/g]     |

On a GPU the product must not be run in TF32 (CuPy does so only if asked to by
``CUPY_TF32=1``).

Left out: activations in groups, accumulators of fewer than 32 bits, saturation (the result
is the exact sum).
"""

from __future__ import annotations

from refllm.backend import Array, namespace
from refllm.errors import InputError

__all__ = ["exact_length", "integer_matmul", "scaled_matmul"]

EXACT = 1 << 24  # float32 represents every integer up to this size
# weight codes converted to float32 at a time, so that no float copy of the weight exists
_TILE = 1 << 20


def exact_length(p: int, q: int) -> int:
    """The longest sum of products of integers of at most p and q in size that float32 adds
    exactly: ⌊2²⁴/(p·q)⌋.

    >>> exact_length(127, 127)
    1040
    """
    if p < 0 or q < 0:
        raise InputError(f"exact_length: sizes are not negative, got {p} and {q}")
    length = EXACT // max(1, p * q)
    if length == 0:
        raise InputError(
            f"exact_length: one product of {p}·{q} may exceed 2²⁴: float32 cannot hold it"
        )
    return length


def integer_matmul(qx: Array, qw: Array, *, sizes: tuple[int, int] | None = None) -> Array:
    """Integers Q_x[T, N], Q_w[M, N] → Q_x Q_wᵀ [T, M], exactly; int32, or int64 where int32
    could overflow. The result of ``qx.astype(int) @ qw.astype(int).T``.

    ``sizes`` are bounds of |Q_x| and |Q_w|, if known; otherwise the codes are searched for
    their largest (on a GPU this waits for the device).

    Raises
    ------
    TypeError
        if a matrix is not of integers.
    ValueError
        if the lengths of the rows differ, or a single product is beyond float32 (codes of
        more than 12 bits).
    """
    xp = namespace(qx, qw)
    for name, codes in (("qx", qx), ("qw", qw)):
        if codes.ndim != 2 or codes.dtype.kind not in "iu":
            raise TypeError(
                f"integer_matmul: {name} is a matrix of integers, got {codes.dtype} "
                f"{tuple(codes.shape)}"
            )
    rows, n = qx.shape
    outputs, k = qw.shape
    if n != k:
        raise InputError(f"integer_matmul: rows of {n} and of {k} codes do not fit")
    if sizes is None:
        sizes = (_size(qx), _size(qw))
    p, q = sizes
    step = min(max(1, n), exact_length(p, q))
    dtype = xp.int32 if n * p * q < 1 << 31 else xp.int64
    out = xp.zeros((rows, outputs), dtype=dtype)
    tile = max(1, _TILE // step)
    for i in range(0, n, step):
        left = xp.astype(qx[:, i : i + step], xp.float32)
        for j in range(0, outputs, tile):
            right = xp.astype(qw[j : j + tile, i : i + step], xp.float32)
            out[:, j : j + tile] += xp.astype(left @ right.T, dtype)
    return out


def scaled_matmul(
    qx: Array,
    x_scale: Array,
    x_zero: Array | None,
    qw: Array,
    w_scale: Array,
    w_zero: Array | None,
    *,
    sizes: tuple[int, int] | None = None,
) -> Array:
    """Y[T, M] = s_x s_w (Q_x − z_x)(Q_w − z_w)ᵀ in the scales' dtype, through exact integers.

    s_x is [T, 1] or (), s_w is [M, 1], () or, in groups along N, [M, N/g]; a zero point is
    shaped like its scale, and None stands for zeros.

    Raises
    ------
    ValueError
        if a scale's shape is none of these.
    """
    xp = namespace(qx, x_scale, qw, w_scale)
    rows, n = qx.shape
    outputs = int(qw.shape[0])
    if tuple(x_scale.shape) not in ((), (1, 1), (rows, 1)):
        raise InputError(
            f"scaled_matmul: a scale of activations is [T, 1] or (), got {tuple(x_scale.shape)}"
        )
    groups = _groups(w_scale, outputs, n)
    size = n // groups
    total = None
    for group in range(groups):
        at = slice(group * size, (group + 1) * size)
        column = slice(group, group + 1)
        s = w_scale
        z = w_zero
        if s.ndim:
            s = s[:, column].T  # [1, M]
        if z is not None and z.ndim:
            z = z[:, column].T  # [1, M]
        part = _centred(qx[:, at], x_zero, qw[:, at], z, sizes)
        part = xp.astype(part, x_scale.dtype) * s
        if total is None:
            total = part
        else:
            total = total + part
    assert total is not None, "there is at least one group"
    return total * x_scale


def _groups(w_scale: Array, outputs: int, n: int) -> int:
    """Groups per row of a weight [outputs, n] with this scale; ValueError if it has no
    possible shape.
    """
    groups = int(w_scale.shape[1]) if w_scale.ndim == 2 else 1
    if tuple(w_scale.shape) not in ((), (1, 1), (outputs, groups)) or groups == 0 or n % groups:
        raise InputError(
            "scaled_matmul: a scale of a weight is [M, 1], () or [M, N/g], "
            f"got {tuple(w_scale.shape)}"
        )
    return groups


def _centred(
    qx: Array, zx: Array | None, qw: Array, zw: Array | None, sizes: tuple[int, int] | None
) -> Array:
    """(Q_x − z_x)(Q_w − z_w)ᵀ [T, M], exact integers (int64 if there is a zero point), for
    z_x [T, 1] or (), z_w [1, M] or ().
    """
    xp = namespace(qx, qw)
    out = integer_matmul(qx, qw, sizes=sizes)
    if zx is None and zw is None:
        return out
    out = xp.astype(out, xp.int64)
    if zx is not None:
        zx = xp.astype(zx, xp.int64)
        out = out - zx * xp.sum(qw, axis=1, dtype=xp.int64)[None, :]
    if zw is not None:
        zw = xp.astype(zw, xp.int64)
        out = out - zw * xp.sum(qx, axis=1, dtype=xp.int64)[:, None]
    if zx is not None and zw is not None:
        out = out + int(qx.shape[1]) * zx * zw
    return out


def _size(codes: Array) -> int:
    """max |q|, as a Python integer (|−128| is not an int8)."""
    xp = namespace(codes)
    if codes.size:
        return max(int(xp.max(codes)), -int(xp.min(codes)))
    return 0
