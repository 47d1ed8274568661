"""Uniform (affine) quantisation: seven rules for scale and zero point, and codes made with them.

    q = clip(rint(x/s) + z, qmin, qmax)        x̂ = s (q − z)

Source: Jacob et al. 2018 (arXiv:1712.05877), §2.1. With a = max |x|, lo = min(min x, 0),
hi = max(max x, 0) and L = 2^b − 1 (zero must stay representable, so a range always includes
it):

| rule                   | s             | z                        | q within             | error |
|------------------------|---------------|--------------------------|----------------------|-------|
| "restricted"           | a/(2^(b−1)−1) | 0                        | ±(2^(b−1)−1)         | s/2   |
| "half_integer"         | a/(L/2)       | 0                        | −2^(b−1) … 2^(b−1)−1 | s/2   |
| "half_integer_unsigned"| a/(L/2)       | 2^(b−1)                  | 0 … L                | s/2   |
| "power"                | a/2^(b−1)     | 0                        | −2^(b−1) … 2^(b−1)−1 | s     |
| "asymmetric"           | (hi − lo)/L   | clip(rint(−lo/s), 0, L)  | 0 … L                | s/2   |
| "asymmetric_signed"    | (hi − lo)/L   | rint(clip(qmin − lo/s))  | −2^(b−1) … 2^(b−1)−1 | s/2   |
| "awq"                  | (max − min)/L | clip(−rint(min/s), 0, L) | 0 … L                | s/2   |

The last column bounds |x̂ − x|; for "power" it is reached at +a alone, for "awq" it holds
only if min ≤ 0 ≤ max.

Who uses which: restricted: SmoothQuant, bitsandbytes, TensorRT; half_integer and
asymmetric_signed: compressed-tensors, llm-compressor, torch's qint8 observers;
half_integer_unsigned and asymmetric: GPTQ's authors, GPTQModel; power: textbooks; awq:
llm-awq, which does not force zero into the range, so that a group far from zero loses all
of one side to clipping.

rint rounds half to even, as everywhere in this field but ggml. Two orders of rounding are
in use; they differ on a tie when z is odd:

- round, then add: q = clip(rint(x/s) + z) (GPTQ, AWQ and most others);
- add, then round: q = rint(clip(x/s + z)) (compressed-tensors: "half_integer" and
  "asymmetric_signed").

A range without extent gets the scale that the rule's upstream gives it: the eps of the
dtype ("half_integer", "asymmetric_signed"); the scale of the range ±1 (GPTQ's two rules);
that of the range 1e-5 (AWQ); 1 for the other two. A scale below the smallest normal number
becomes that number, so that x/s stays finite.

| symbol | name                                 | shape                         |
|--------|--------------------------------------|-------------------------------|
| x      | activations or weight                | any, [T, N], [M, N]           |
| q      | codes, int8 (signed rules) or uint8  | as x                          |
| lo, hi | smallest and largest value per range | one of ``granularity``'s      |
| s      | scale, > 0, in x's dtype             | as lo: (), [M, 1], [M, N/g] … |
| z      | zero point, int32                    | as lo                         |

Left out: the signed-maximum form of "power" (Q4_0 and Q5_0 of GGUF), floating-point codes,
codebooks; ranges that come from elsewhere than the smallest and the largest value
(``quant.observers``); storage (``packing``, ``quantized_linear``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from refllm.backend import Array, namespace
from refllm.errors import InputError, alternatives
from refllm.formats.granularity import Granularity, from_blocks

SYMMETRIC = ("restricted", "half_integer", "half_integer_unsigned", "power")
RULES = (*SYMMETRIC, "asymmetric", "asymmetric_signed", "awq")
_UNSIGNED = ("half_integer_unsigned", "asymmetric", "awq")
_ADD_FIRST = ("half_integer", "asymmetric_signed")  # these add the zero point, then round

AWQ_RANGE = 1e-5  # the smallest range that llm-awq divides


@dataclass(frozen=True)
class Scheme:
    """A rule at ``bits`` bits per code (1 to 8), and the granularity at which it is applied.

    ``group_size`` is g for granularity "group", (bo, bi) or one size for "block".

    >>> scheme = Scheme(4, "asymmetric", "group", 32)
    >>> scheme.qmin, scheme.qmax, scheme.symmetric
    (0, 15, False)
    >>> scheme.scale_shape((64, 128))
    (64, 4)
    """

    bits: int
    rule: str
    granularity: str
    group_size: int | tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool | float) or self.bits not in range(1, 9):
            raise InputError(f"Scheme: bits is an integer in 1..8, got {self.bits!r}")
        if self.rule not in RULES:
            raise InputError(
                f"Scheme: unknown rule {self.rule!r}; {alternatives(self.rule, RULES)}"
            )
        if self.rule == "restricted" and self.bits == 1:
            raise InputError(
                "Scheme: 'restricted' has the one code 0 at 1 bit; use 2 bits or another rule"
            )
        try:
            self.geometry  # noqa: B018 (its checks are what is wanted)
        except ValueError as error:
            raise InputError(f"Scheme: {error}") from None

    # --- geometry ---

    @cached_property
    def geometry(self) -> Granularity:
        """Which elements share a scale."""
        return Granularity(self.granularity, self.group_size)

    @property
    def block(self) -> tuple[int, int]:
        """(rows, columns) that share a scale, for "group" and "block"."""
        return self.geometry.block

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scale of an array of this shape; ValueError if the granularity does
        not fit it.
        """
        return self.geometry.scale_shape(shape)

    # --- rule ---

    @property
    def signed(self) -> bool:
        """Whether codes lie on both sides of 0 (and are int8, not uint8)."""
        return self.rule not in _UNSIGNED

    @property
    def code_dtype(self) -> str:
        """The integer type of codes."""
        return "int8" if self.signed else "uint8"

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is the same for all ranges, and need not be stored."""
        return self.rule in SYMMETRIC

    @property
    def qmin(self) -> int:
        """Smallest code."""
        if self.signed:
            return -(1 << (self.bits - 1)) + (self.rule == "restricted")
        return 0

    @property
    def qmax(self) -> int:
        """Largest code."""
        if self.signed:
            return (1 << (self.bits - 1)) - 1
        return (1 << self.bits) - 1

    @property
    def zero(self) -> int:
        """The zero point of a symmetric rule."""
        if self.rule == "half_integer_unsigned":
            return 1 << (self.bits - 1)
        return 0

    @property
    def offset(self) -> int:
        """What is added to a code for storage, so that it is not negative: 2^(b−1) for
        signed codes.
        """
        return 1 << (self.bits - 1) if self.signed else 0

    @property
    def steps(self) -> float:
        """How many scales s make up a symmetric rule's a, or an asymmetric rule's hi − lo:
        the divisor of the table's column s.
        """
        if not self.symmetric:
            return float((1 << self.bits) - 1)
        if self.rule == "restricted":
            return float(self.qmax)
        if self.rule == "power":
            return 0.5 * (1 << self.bits)
        return 0.5 * ((1 << self.bits) - 1)


# --- ranges, and the scales made of them --------------------------------------------------


def ranges(x: Array, scheme: Scheme, *, name: str = "x") -> tuple[Array, Array]:
    """Smallest and largest value of each range: x → lo, hi, shaped like the scale.

    Raises
    ------
    ValueError
        naming ``name`` if x is empty, holds NaN or infinity, or does not fit the scheme.
    """
    xp = namespace(x)
    _limits(x, name)
    try:
        shape = scheme.scale_shape(tuple(x.shape))
    except ValueError as error:
        raise InputError(f"{name}: {error}") from None
    if 0 in x.shape[-1:] or (x.size == 0 and scheme.granularity in ("tensor", "block")):
        raise InputError(f"{name}: an array of shape {tuple(x.shape)} has no range")
    lo, hi = _extremes(x, scheme.geometry)
    if not bool(xp.all(xp.isfinite(lo) & xp.isfinite(hi))):  # min and max propagate NaN
        require_finite(x, name)
    return xp.reshape(lo, shape), xp.reshape(hi, shape)


def _extremes(x: Array, geometry: Granularity) -> tuple[Array, Array]:
    """min and max of each range, in any shape; a range that holds NaN gives NaN."""
    if isinstance(x, np.ndarray) and geometry.kind == "group" and x.size:
        # NumPy's max along a short last axis takes twice as long as reduceat
        flat = x.reshape(-1)
        starts = np.arange(0, flat.size, geometry.block[1])
        return np.minimum.reduceat(flat, starts), np.maximum.reduceat(flat, starts)
    xp = namespace(x)
    blocks = geometry.as_blocks(x)  # [M/bo, bo, N/bi, bi]
    return xp.min(blocks, axis=(1, 3)), xp.max(blocks, axis=(1, 3))  # [M/bo, N/bi]


def qparams(x: Array, scheme: Scheme, *, name: str = "x") -> tuple[Array, Array]:
    """Scale (x's dtype) and zero point (int32) of each range of x, shaped alike.

    Zero points of a symmetric rule are all equal: 0, or 2^(b−1) for
    "half_integer_unsigned".

    >>> import numpy as np
    >>> s, z = qparams(np.array([[-1.0, 0.5, 2.0, 0.0]]), Scheme(2, "asymmetric", "channel"))
    >>> s.tolist(), z.tolist()
    ([[1.0]], [[1]])
    """
    lo, hi = ranges(x, scheme, name=name)
    return range_to_qparams(lo, hi, scheme, name=name)


def range_to_qparams(
    lo: Array, hi: Array, scheme: Scheme, *, name: str = "range"
) -> tuple[Array, Array]:
    """Ranges lo ≤ hi of any shape → scale (their dtype) and zero point (int32) of that
    shape, by the table of the module.

    Raises
    ------
    ValueError
        naming ``name`` if a bound is not finite or lo > hi.
    """
    xp = namespace(lo, hi)
    largest, _ = _limits(lo, name)
    shape = lo.shape
    lo = xp.reshape(lo, (lo.size,))  # NumPy turns results without axes into scalars
    hi = xp.reshape(hi, (hi.size,))
    if not bool(xp.all((lo <= hi) & xp.isfinite(lo) & xp.isfinite(hi))):
        raise InputError(f"{name}: a range needs finite bounds lo ≤ hi")
    if scheme.rule != "awq":  # zero lies in every range
        lo = xp.clip(lo, -largest, 0.0)
        hi = xp.clip(hi, 0.0, largest)
    if scheme.symmetric:
        scale = _symmetric_scale(lo, hi, scheme)
        return xp.reshape(scale, shape), xp.full(shape, scheme.zero, dtype=xp.int32)
    scale, zero = _asymmetric_qparams(lo, hi, scheme)
    return xp.reshape(scale, shape), xp.reshape(xp.astype(zero, xp.int32), shape)


def _symmetric_scale(lo: Array, hi: Array, scheme: Scheme) -> Array:
    """s = max |x| / steps of ranges lo ≤ 0 ≤ hi, [n]."""
    xp = namespace(lo, hi)
    largest, smallest = _limits(lo, "range")
    # at 1 bit the scale may be 2a: clipped so that the division below cannot overflow
    a = xp.clip(xp.maximum(-lo, hi), 0.0, largest * min(1.0, scheme.steps))
    scale = xp.clip(a / scheme.steps, smallest, largest)
    empty = (lo == 0) & (hi == 0)
    return xp.where(empty, _empty_scale(scheme, scale), scale)


def _asymmetric_qparams(lo: Array, hi: Array, scheme: Scheme) -> tuple[Array, Array]:
    """s and z (still floats) of ranges lo ≤ hi, [n] each."""
    xp = namespace(lo, hi)
    largest, smallest = _limits(lo, "range")
    empty = (lo == 0) & (hi == 0)
    if scheme.rule == "asymmetric":  # GPTQ gives an all-zero row the range ±1
        lo = xp.where(empty, -1.0, lo)
        hi = xp.where(empty, 1.0, hi)
    # The difference of halves is as exact as hi − lo and never infinite; nor is its quotient
    # where L is 1.
    least = 0.5 * AWQ_RANGE if scheme.rule == "awq" else 0.0
    half = xp.clip(0.5 * hi - 0.5 * lo, least, largest * min(1.0, 0.5 * scheme.steps))
    scale = xp.clip(half / (0.5 * scheme.steps), smallest, largest)
    if scheme.rule == "asymmetric_signed":
        scale = xp.where(empty, _empty_scale(scheme, scale), scale)
        unrounded = scheme.qmin - lo / scale
        return scale, xp.round(xp.clip(unrounded, float(scheme.qmin), float(scheme.qmax)))
    return scale, xp.clip(-xp.round(reachable(lo, scale) / scale), 0.0, float(scheme.qmax))


def _empty_scale(scheme: Scheme, scale: Array) -> Array:
    """The scale of an all-zero range (any scale gives zeros back; see the module), shaped
    like ``scale``.
    """
    xp = namespace(scale)
    value = 1.0
    if scheme.rule in ("half_integer", "asymmetric_signed"):
        value = float(xp.finfo(scale.dtype).eps)
    elif scheme.rule == "half_integer_unsigned":
        value = 1.0 / scheme.steps
    return xp.full(scale.shape, value, dtype=scale.dtype)


# --- codes --------------------------------------------------------------------------------


def quantize_codes(
    x: Array,
    scale: Array,
    zero_point: Array,
    scheme: Scheme,
    *,
    name: str = "x",
    check: bool = True,
) -> Array:
    """Codes of x, int8 or uint8, shaped like x; for one range they are
    ``clip(rint(x / scale) + zero_point, qmin, qmax)``.

    The quotient is clipped before it becomes an integer. ``check=False`` is for a caller
    that knows x to be finite and within the range that the scale was made for.

    Raises
    ------
    ValueError
        naming ``name`` if x holds NaN or infinity, or if scale or zero point do not have
        the scheme's shape.

    >>> import numpy as np
    >>> x = np.array([[-1.0, 0.4, 2.0, 9.0]])
    >>> s, z = np.array([[1.0]]), np.array([[1]])
    >>> quantize_codes(x, s, z, Scheme(2, "asymmetric", "channel")).tolist()
    [[0, 1, 3, 3]]
    """
    xp = namespace(x, scale, zero_point)
    if check:
        require_finite(x, name)
        # NaN fails this comparison too
        if scale.size and not 0.0 < float(xp.min(scale)) <= float(xp.max(scale)) < math.inf:
            raise InputError(f"{name}: a scale is a finite number above 0")
    shape = tuple(x.shape)
    geometry = scheme.geometry
    s = geometry.expand_scale(xp.astype(scale, x.dtype, copy=False), shape)  # [M/bo, 1, N/bi, 1]
    z = geometry.expand_scale(zero_point, shape)
    blocks = geometry.as_blocks(x)  # [M/bo, bo, N/bi, bi]
    if check and x.size:
        half = 0.5 * float(xp.finfo(x.dtype).max)
        if float(xp.max(xp.abs(x))) > float(xp.min(s)) * half:  # x/s could overflow
            blocks = reachable(blocks, s)
    return from_blocks(_rounded_codes(blocks, s, z, scheme), shape)


def _rounded_codes(blocks: Array, s: Array, z: Array, scheme: Scheme) -> Array:
    """``quantize_codes`` of x, s and z as blocks."""
    xp = namespace(blocks, s, z)
    t = blocks / s
    add = scheme.zero != 0 or not scheme.symmetric
    add_first = scheme.rule in _ADD_FIRST
    if not add_first:
        t = xp.round(t)
    if add:
        t += xp.astype(z, t.dtype)
    t = xp.clip(t, float(scheme.qmin), float(scheme.qmax))
    if add_first:
        t = xp.round(t)
    return xp.astype(t, getattr(xp, scheme.code_dtype))


def dequantize_codes(codes: Array, scale: Array, zero_point: Array, scheme: Scheme) -> Array:
    """x̂ = s (q − z) in the scale's dtype, shaped like the codes."""
    xp = namespace(codes, scale, zero_point)
    shape = tuple(codes.shape)
    geometry = scheme.geometry
    s = geometry.expand_scale(scale, shape)
    z = geometry.expand_scale(zero_point, shape)
    blocks = xp.astype(geometry.as_blocks(codes), scale.dtype)  # [M/bo, bo, N/bi, bi]
    if scheme.zero != 0 or not scheme.symmetric:
        blocks -= xp.astype(z, scale.dtype)
    blocks *= s
    return from_blocks(blocks, shape)


# --- guards -------------------------------------------------------------------------------


def reachable(x: Array, scale: Array) -> Array:
    """x clipped to ±1024 scales, so that x/s is finite; no code is that large, so no code
    changes.
    """
    xp = namespace(x, scale)
    largest, _ = _limits(scale, "scale")
    bound = 1024.0 * xp.clip(scale, 0.0, largest / 1024.0)
    return xp.clip(x, -bound, bound)


def require_finite(x: Array, name: str) -> None:
    """ValueError naming ``name`` and the first bad index if x holds NaN or infinity."""
    xp = namespace(x)
    if bool(xp.all(xp.isfinite(x))):
        return
    at = int(xp.argmax(xp.astype(xp.reshape(~xp.isfinite(x), (x.size,)), xp.uint8)))
    index = []
    for size in reversed(x.shape):
        at, k = divmod(at, size)
        index.append(k)
    raise InputError(f"{name}: holds NaN or infinity, first at index {tuple(reversed(index))}")


def _limits(x: Array, name: str) -> tuple[float, float]:
    """(largest, smallest normal) value of x's dtype, which must be float32 or float64.

    A float16 quotient x/s would be too coarse to be rounded to 8 bits.
    """
    xp = namespace(x)
    if x.dtype not in (xp.float32, xp.float64):
        raise TypeError(
            f"{name}: quantisation computes in float32 or float64, got {x.dtype}; convert it first"
        )
    info = xp.finfo(x.dtype)
    return float(info.max), float(info.smallest_normal)
