"""Uniform grids: which step s and zero point z a range of numbers gets, by seven rules and
five granularities.

A number x is stored as a whole number q, and comes back as x̂ = s (q − z). With a = max
|x|, lo = min(min x, 0), hi = max(max x, 0) and L = 2^b − 1 (zero must stay representable,
so a range always includes it):

| rule                   | s             | z                         | q within            | |x̂ − x| ≤ |
|------------------------|---------------|---------------------------|---------------------|------------|
| "restricted"           | a/(2^(b−1)−1) | 0                         | ±(2^(b−1)−1)        | s/2        |
| "half_integer"         | a/(L/2)       | 0                         | −2^(b−1) … 2^(b−1)−1 | s/2       |
| "half_integer_unsigned"| a/(L/2)       | 2^(b−1)                   | 0 … L               | s/2        |
| "power"                | a/2^(b−1)     | 0                         | −2^(b−1) … 2^(b−1)−1 | s, at +a  |
| "asymmetric"           | (hi − lo)/L   | clip(rint(−lo/s), 0, L)   | 0 … L               | s/2        |
| "asymmetric_signed"    | (hi − lo)/L   | rint(clip(qmin − lo/s))   | −2^(b−1) … 2^(b−1)−1 | s/2       |
| "awq"                  | (max − min)/L | clip(−rint(min/s), 0, L)  | 0 … L               | s/2 only if min ≤ 0 ≤ max |

Who does so: restricted: SmoothQuant, bitsandbytes, TensorRT; half_integer and
asymmetric_signed: compressed-tensors, llm-compressor, torch's qint8 observers;
half_integer_unsigned and asymmetric: GPTQ's authors, GPTQModel; power: textbooks; awq:
llm-awq, which does not force zero into the range, so that a group far from zero loses all
of one side to clipping.

| granularity | one step for                    | shape of s and z      |
|-------------|---------------------------------|-----------------------|
| "tensor"    | everything                      | ()                    |
| "channel"   | a row of a weight W[M, N]       | (M, 1)                |
| "token"     | a row of activations x[T, N]    | (T, 1)                |
| "group"     | g neighbours of a row           | (M, N/g)              |
| "block"     | bo × bi neighbours              | (⌈M/bo⌉, ⌈N/bi⌉)      |

Left out: the signed-maximum form of "power" (Q4_0 and Q5_0 of GGUF), floating-point grids,
codebooks, groups that run over the end of a row (refused; only blocks may be ragged). What
the formulas do with numbers is in ``ranges``.

<<MERGED>> From the range of the numbers to the step and the zero point: the formulas of
``scheme``, in arithmetic that ends.

A range without extent has no step. Choices: an all-zero range gets what the rule's upstream
gives it (the eps of the dtype; for GPTQ's rules the step of the range ±1; for AWQ the range
1e-5; 1 for the other two), and a step below the smallest normal number becomes that number,
so that x/s stays within the codes.


| symbol | name                                         | shape             |
|--------|----------------------------------------------|-------------------|
| lo, hi | smallest and largest number of each range    | one of ``scheme`` |
| s      | step ("scale"), > 0, in x's dtype            | as lo             |
| z      | zero point, int32                            | as lo             |

Left out: where a range comes from, if not from the smallest and the largest number
(``quant.observers``).

<<MERGED>>
Numbers to codes and back, given their steps; and a matrix in pieces of rows.

The formulas and the two orders of rounding are explained in ``affine``, what shares a step
in ``scheme``.

| symbol | name                                       | shape                   |
|--------|--------------------------------------------|-------------------------|
| x      | activations or weight                      | any, [T, N], [M, N]     |
| q      | codes, int8 (signed rules) or uint8        | as x                    |
| s, z   | scale and zero point                       | (), [M, 1], [M, N/g], … |

Left out: where steps come from (``ranges``), storage (``storage``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from refllm.backend import Array, namespace

SYMMETRIC = ("restricted", "half_integer", "half_integer_unsigned", "power")
RULES = (*SYMMETRIC, "asymmetric", "asymmetric_signed", "awq")
GRANULARITIES = ("tensor", "channel", "token", "group", "block")
_UNSIGNED = ("half_integer_unsigned", "asymmetric", "awq")


@dataclass(frozen=True)
class Scheme:
    """Bits a code (1 to 8), rule and granularity; ``group_size`` is g for "group", (bo, bi)
    or one size for "block".
    """

    bits: int
    rule: str
    granularity: str
    group_size: int | tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool | float) or self.bits not in range(1, 9):
            raise ValueError(f"Scheme: bits is a whole number in 1..8, got {self.bits!r}")
        if self.rule not in RULES:
            raise ValueError(
                f"Scheme: unknown rule {self.rule!r}; choose one of {', '.join(RULES)}"
            )
        if self.rule == "restricted" and self.bits == 1:
            raise ValueError(
                "Scheme: 'restricted' has the one code 0 at 1 bit; use 2 bits or another rule"
            )
        if self.granularity not in GRANULARITIES:
            known = ", ".join(GRANULARITIES)
            raise ValueError(
                f"Scheme: unknown granularity {self.granularity!r}; choose one of {known}"
            )
        sizes = self.group_size if isinstance(self.group_size, tuple) else (self.group_size,)
        if self.granularity not in ("group", "block"):
            if self.group_size is not None:
                raise ValueError(f"Scheme: granularity {self.granularity!r} takes no group_size")
        elif not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes) or (
            len(sizes) != 1 if self.granularity == "group" else len(sizes) > 2
        ):
            if self.granularity == "group":
                wanted = "a positive number"
            else:
                wanted = "a positive number or a pair of them"
            raise ValueError(
                f"Scheme: granularity {self.granularity!r} takes {wanted}, got {self.group_size!r}"
            )

    @property
    def signed(self) -> bool:
        """Whether codes lie on both sides of 0 (and are int8, not uint8)."""
        return self.rule not in _UNSIGNED

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
        """The number that a symmetric range's a, or an asymmetric one's hi − lo, is divided
        by.
        """
        if not self.symmetric:
            return float((1 << self.bits) - 1)
        return {"restricted": float(self.qmax), "power": 0.5 * (1 << self.bits)}.get(
            self.rule, 0.5 * ((1 << self.bits) - 1)
        )

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scale of an array of this shape; ValueError where the scheme does
        not fit it.
        """
        if self.granularity == "tensor":
            return ()
        if not shape or (self.granularity == "block" and len(shape) != 2):
            raise ValueError(
                f"granularity {self.granularity!r} does not fit an array of shape {shape}"
            )
        if self.granularity in ("channel", "token"):
            return (*shape[:-1], 1)
        if self.granularity == "block":
            rows, columns = self.block
            return -(-shape[0] // rows), -(-shape[1] // columns)
        _, g = self.block
        n = shape[-1]
        if n % g:
            divisors = [d for d in range(1, n + 1) if n % d == 0]
            below = max(d for d in divisors if d < g)
            above = min((d for d in divisors if d > g), default=n)
            near = f"{below} and {above}" if below != above else f"{below}"
            raise ValueError(
                f"groups of {g} do not divide a row of {n}: the nearest sizes that do are {near}, "
                f"or pad the row with zeros to {-(-n // g) * g}"
            )
        return (*shape[:-1], n // g)

    @property
    def block(self) -> tuple[int, int]:
        """(rows, columns) that share a step, for "group" and "block"."""
        if isinstance(self.group_size, tuple):
            return self.group_size
        assert self.group_size is not None, "only groups and blocks have a size"
        return (1 if self.granularity == "group" else self.group_size), self.group_size


# --- arrays as blocks ---------------------------------------------------------------------


def as_blocks(x: Array, scheme: Scheme) -> Array:
    """x as [row blocks, rows, column blocks, columns]: what shares a step lies on axes 1
    and 3.

    A view, except of ragged blocks: they are filled up with copies of their last row and
    column, which change no range.
    """
    xp = namespace(x)
    if scheme.granularity == "tensor":
        return xp.reshape(x, (1, 1, 1, x.size))
    lead = math.prod(x.shape[:-1])
    n = int(x.shape[-1])
    if scheme.granularity in ("channel", "token"):
        return xp.reshape(x, (lead, 1, 1, n))
    rows, columns = scheme.block
    if scheme.granularity == "group":
        return xp.reshape(x, (lead, 1, n // columns, columns))
    down, right = scheme.scale_shape(tuple(x.shape))
    rows = min(rows, lead)  # a block that is larger than all there is needs no filling
    columns = min(columns, n)
    x = xp.concat([x] + [x[-1:, :]] * (down * rows - lead), axis=0)
    x = xp.concat([x] + [x[:, -1:]] * (right * columns - n), axis=1)
    return xp.reshape(x, (down, rows, right, columns))


def from_blocks(blocks: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of ``as_blocks``."""
    xp = namespace(blocks)
    if blocks.size == math.prod(shape):
        return xp.reshape(blocks, shape)
    down, rows, right, columns = blocks.shape
    return xp.reshape(blocks, (down * rows, right * columns))[: shape[0], : shape[1]]


def expand_scale(scale: Array, scheme: Scheme, shape: tuple[int, ...]) -> Array:
    """A scale or zero point of an array of ``shape``, ready to be multiplied with its
    ``as_blocks``.
    """
    if tuple(scale.shape) != scheme.scale_shape(shape):
        raise ValueError(
            f"scale or zero point of shape {tuple(scale.shape)}: an array of shape {shape} takes "
            f"{scheme.scale_shape(shape)} at granularity {scheme.granularity!r}"
        )
    xp = namespace(scale)
    if scheme.granularity == "block":
        return xp.reshape(scale, (scale.shape[0], 1, scale.shape[1], 1))
    columns = scale.shape[-1] if scheme.granularity == "group" else 1
    return xp.reshape(scale, (math.prod(scale.shape[:-1]), 1, columns, 1))


AWQ_RANGE = 1e-5  # the smallest range that llm-awq divides


def ranges(x: Array, scheme: Scheme, *, name: str = "x") -> tuple[Array, Array]:
    """Smallest and largest number of each range: x → lo, hi, shaped like the scale.

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
        raise ValueError(f"{name}: {error}") from None
    if 0 in x.shape[-1:] or (x.size == 0 and scheme.granularity in ("tensor", "block")):
        raise ValueError(f"{name}: an array of shape {tuple(x.shape)} has no range")
    lo, hi = _extremes(x, scheme)
    if not bool(xp.all(xp.isfinite(lo) & xp.isfinite(hi))):  # min and max pass NaN on
        require_finite(x, name)
    return xp.reshape(lo, shape), xp.reshape(hi, shape)


def _extremes(x: Array, scheme: Scheme) -> tuple[Array, Array]:
    """min and max of each range, in any shape; a range that holds NaN gives NaN."""
    xp = namespace(x)
    if xp is np and scheme.granularity == "group" and x.size:
        # NumPy's max along a short last axis takes twice as long as the same through
        # reduceat
        flat = x.reshape(-1)
        starts = np.arange(0, flat.size, scheme.block[1])
        return np.minimum.reduceat(flat, starts), np.maximum.reduceat(flat, starts)
    blocks = as_blocks(x, scheme)
    return xp.min(blocks, axis=(1, 3)), xp.max(blocks, axis=(1, 3))


def qparams(x: Array, scheme: Scheme, *, name: str = "x") -> tuple[Array, Array]:
    """The step and zero point of each range of x → scale (x's dtype), zero_point (int32),
    shaped alike.

    Zero points of symmetric rules are all the same number: 0, or 2^(b−1) for
    "half_integer_unsigned".
    """
    lo, hi = ranges(x, scheme, name=name)
    return range_to_qparams(lo, hi, scheme, name=name)


def range_to_qparams(
    lo: Array, hi: Array, scheme: Scheme, *, name: str = "range"
) -> tuple[Array, Array]:
    """Ranges lo ≤ hi of any shape → scale (their dtype) and zero_point (int32) of that
    shape.

    Raises
    ------
    ValueError
        naming ``name`` if a bound is not finite or lo > hi.
    """
    xp = namespace(lo, hi)
    largest, smallest = _limits(lo, name)
    shape = lo.shape
    lo = xp.reshape(lo, (lo.size,))  # NumPy makes numbers of arrays without axes
    hi = xp.reshape(hi, (hi.size,))
    if not bool(xp.all((lo <= hi) & xp.isfinite(lo) & xp.isfinite(hi))):
        raise ValueError(f"{name}: a range needs finite bounds lo ≤ hi")
    if scheme.rule != "awq":  # zero lies in every range
        lo = xp.clip(lo, -largest, 0.0)
        hi = xp.clip(hi, 0.0, largest)
    empty = (lo == 0) & (hi == 0)
    if scheme.symmetric:
        # at 1 bit the step may be 2a: held within the dtype
        widest = xp.clip(xp.maximum(-lo, hi), 0.0, largest * min(1.0, scheme.steps))
        scale = xp.clip(widest / scheme.steps, smallest, largest)
        scale = xp.where(empty, _empty_step(scheme, scale), scale)
        return xp.reshape(scale, shape), xp.full(shape, scheme.zero, dtype=xp.int32)
    if scheme.rule == "asymmetric":  # GPTQ gives an all-zero row the range ±1
        lo = xp.where(empty, -1.0, lo)
        hi = xp.where(empty, 1.0, hi)
    # the difference of halves: as exact as hi − lo, and never infinite; nor is its
    # quotient, where L is 1
    least = 0.5 * AWQ_RANGE if scheme.rule == "awq" else 0.0
    half = xp.clip(0.5 * hi - 0.5 * lo, least, largest * min(1.0, 0.5 * scheme.steps))
    scale = xp.clip(half / (0.5 * scheme.steps), smallest, largest)
    if scheme.rule == "asymmetric_signed":
        scale = xp.where(empty, _empty_step(scheme, scale), scale)
        zero = xp.round(xp.clip(scheme.qmin - lo / scale, float(scheme.qmin), float(scheme.qmax)))
    else:
        zero = xp.clip(-xp.round(reachable(lo, scale) / scale), 0.0, float(scheme.qmax))
    return xp.reshape(scale, shape), xp.reshape(xp.astype(zero, xp.int32), shape)


def reachable(x: Array, scale: Array) -> Array:
    """x held within ±1024 steps, so that x/s is finite; no code is that large, so none
    changes.
    """
    xp = namespace(x, scale)
    largest, _ = _limits(scale, "scale")
    bound = 1024.0 * xp.clip(scale, 0.0, largest / 1024.0)
    return xp.clip(x, -bound, bound)


# --- guards -------------------------------------------------------------------------------


def require_finite(x: Array, name: str) -> None:
    """ValueError naming ``name`` and the first bad place if x holds NaN or infinity."""
    xp = namespace(x)
    if bool(xp.all(xp.isfinite(x))):
        return
    at = int(xp.argmax(xp.astype(xp.reshape(~xp.isfinite(x), (x.size,)), xp.uint8)))
    index = []
    for size in reversed(x.shape):
        at, k = divmod(at, size)
        index.append(k)
    raise ValueError(f"{name}: holds NaN or infinity, first at index {tuple(reversed(index))}")


def _limits(x: Array, name: str) -> tuple[float, float]:
    """(largest, smallest normal) number of x's dtype, which must be float32 or float64.

    A float16 quotient x/s would be too coarse to be rounded to 8 bits.
    """
    xp = namespace(x)
    if x.dtype not in (xp.float32, xp.float64):
        raise TypeError(
            f"{name}: quantisation computes in float32 or float64, got {x.dtype}; convert it first"
        )
    info = xp.finfo(x.dtype)
    return float(info.max), float(info.smallest_normal)


def _empty_step(scheme: Scheme, scale: Array) -> Array:
    """The step of an all-zero range, as large as any: every choice gives back zeros. See
    the module.
    """
    xp = namespace(scale)
    if scheme.rule in ("half_integer", "asymmetric_signed"):
        step = float(xp.finfo(scale.dtype).eps)
    else:
        if scheme.rule == "half_integer_unsigned":
            step = 1.0 / scheme.steps
        else:
            step = 1.0
    return xp.full(scale.shape, step, dtype=scale.dtype)


# Numbers at a time (host, device). On a CPU all steps of a piece run within its cache; a
# GPU wants to be filled.
PIECE = (1 << 17, 1 << 26)
_ADD_FIRST = ("half_integer", "asymmetric_signed")


def quantize_codes(
    x: Array,
    scale: Array,
    zero_point: Array,
    scheme: Scheme,
    *,
    name: str = "x",
    check: bool = True,
) -> Array:
    """Codes of x, int8 or uint8, shaped like x. The quotient is clipped before it becomes
    an integer.

    ``check=False`` is for a caller that knows x to be finite and within the range that the
    scale was made for.

    Raises
    ------
    ValueError
        naming ``name`` if x holds NaN or infinity, or scale or zero point has not the
        scheme's shape.
    """
    xp = namespace(x, scale, zero_point)
    if check:
        require_finite(x, name)
        # NaN fails it too
        if scale.size and not 0.0 < float(xp.min(scale)) <= float(xp.max(scale)) < math.inf:
            raise ValueError(f"{name}: a scale is a finite number above 0")
    shape = tuple(x.shape)
    s = expand_scale(xp.astype(scale, x.dtype, copy=False), scheme, shape)
    z = expand_scale(zero_point, scheme, shape)
    blocks = as_blocks(x, scheme)
    if (
        check
        and x.size
        and float(xp.max(xp.abs(x))) > float(xp.min(s)) * 0.5 * float(xp.finfo(x.dtype).max)
    ):
        blocks = reachable(blocks, s)
    return from_blocks(_codes(blocks, s, z, scheme), shape)


def _codes(blocks: Array, s: Array, z: Array, scheme: Scheme) -> Array:
    """``encode`` of x, s and z as blocks."""
    xp = namespace(blocks, s, z)
    add = scheme.zero != 0 or not scheme.symmetric
    t = blocks / s
    if add and scheme.rule in _ADD_FIRST:
        t += xp.astype(z, t.dtype)
    if scheme.rule not in _ADD_FIRST:
        t = xp.round(t)
        if add:
            t += xp.astype(z, t.dtype)
    t = xp.clip(t, float(scheme.qmin), float(scheme.qmax))
    if scheme.rule in _ADD_FIRST:
        t = xp.round(t)
    return xp.astype(t, xp.int8 if scheme.signed else xp.uint8)


def dequantize_codes(codes: Array, scale: Array, zero_point: Array, scheme: Scheme) -> Array:
    """x̂ = s (q − z) in the scale's dtype, shaped like the codes."""
    xp = namespace(codes, scale, zero_point)
    shape = tuple(codes.shape)
    s = expand_scale(scale, scheme, shape)
    z = expand_scale(zero_point, scheme, shape)
    blocks = xp.astype(as_blocks(codes, scheme), scale.dtype)
    if scheme.zero != 0 or not scheme.symmetric:
        blocks -= xp.astype(z, scale.dtype)
    blocks *= s
    return from_blocks(blocks, shape)


# --- pieces -------------------------------------------------------------------------------


def row_pieces(
    like: Array, shape: tuple[int, int], scheme: Scheme, size: tuple[int, int]
) -> Iterator[tuple[int, int]]:
    """(first row, last row + 1) of pieces of a matrix, whole row blocks each, of about
    ``size`` numbers.

    ``size`` is (on the host, on a device); ``like`` tells which of them is meant.
    """
    high = scheme.block[0] if scheme.granularity == "block" else 1
    wanted = size[0] if namespace(like) is np else size[1]
    step = high * max(1, wanted // (high * max(1, shape[1])))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def rows_of(parameter: Array, scheme: Scheme, start: int, stop: int) -> Array:
    """The scale or zero point of rows ``start`` to ``stop``."""
    if scheme.granularity == "tensor":
        return parameter
    high = scheme.block[0] if scheme.granularity == "block" else 1
    return parameter[start // high : -(-stop // high), :]
