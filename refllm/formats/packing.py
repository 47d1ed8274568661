"""Storage of codes, scales and zero points: fewer bits than they are computed with.

**Codes** of b = 1 to 8 bits form a dense little-endian bit stream in 32-bit words, one
stream per row. Code i of a row takes the bits [i·b, (i+1)·b) of the row's stream; bit k of
the stream is bit k mod 32 of word k // 32. Codes of 3, 5, 6 or 7 bits straddle words, and
only the end of a row's last word is wasted. This is the layout of compressed-tensors'
"pack-quantized" weights. Codes are packed as they are if unsigned, and plus 2^(b−1) if
signed.

Eight codes are packed at once, as the eight bytes of a 64-bit integer: neighbours are
pushed together in pairs, pairs in fours, fours in eights (each time: shift, or, mask),
which leaves 8·b bits at the low end, exactly b bytes. Unpacking reverses this. There is no
loop over codes.

**Zero points** are codes, packed to b bits in one stream for the whole matrix unless a
dtype is asked for; symmetric rules store none. **Scales**:

| stored as  | bytes | array held                                 |
|------------|-------|--------------------------------------------|
| None       | 4, 8  | the scale itself                           |
| "float32"  | 4     | float32                                    |
| "float16"  | 2     | float16                                    |
| "bfloat16" | 2     | uint16: the upper half of a float32's bits |

Rounding is to nearest, ties to even. A scale that would round to 0 becomes the smallest
value above 0, because values are divided by it.

| symbol | name                    | shape               |
|--------|-------------------------|---------------------|
| codes  | integers in 0 … 2^b − 1 | [..., count]        |
| words  | the bit stream, uint32  | [..., ⌈count·b/32⌉] |

Left out: other orders (GPTQ's and AWQ's are in ``layouts``), big-endian hosts (NumPy views
follow the host's order), streams that continue from one row to the next, 8-bit scales (they
come with the block formats).
"""

from __future__ import annotations

from refllm.backend import Array, DType, bitcast, namespace
from refllm.errors import InputError
from refllm.formats import minifloat
from refllm.formats.uniform import Scheme

SCALE_DTYPES = ("float16", "bfloat16", "float32", "float64")
ZERO_DTYPES = ("float16", "float32", "int32")  # all codes are exact in them
_UNITS = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64"}

# --- codes --------------------------------------------------------------------------------


def words_per_row(count: int, bits: int) -> int:
    """32-bit words that ``count`` codes of ``bits`` bits take: ⌈count·bits/32⌉."""
    _check_bits(bits)
    return -(-count * bits // 32)


def pack(codes: Array, bits: int, *, check: bool = True) -> Array:
    """Integers codes[..., count] in 0 … 2^bits − 1 → uint32 words[..., ⌈count·bits/32⌉].

    ``check=False`` is for codes that are known to be in range (on a GPU the check waits for
    the device).

    Raises
    ------
    ValueError
        for bits outside 1..8, and for a code that is negative or needs more than ``bits``
        bits.
    TypeError
        if the codes are not integers.

    >>> import numpy as np
    >>> [hex(word) for word in pack(np.array([1, 2, 3, 4]), 4)]
    ['0x4321']
    >>> pack(np.array([7] * 11), 3).tolist()  # 33 bits: the last code straddles two words
    [4294967295, 1]
    """
    xp = namespace(codes)
    _check_bits(bits)
    if codes.dtype.kind not in "iu":
        raise TypeError(f"pack: codes are integers, got {codes.dtype}")
    count = int(codes.shape[-1])
    if check and codes.size and not 0 <= int(xp.min(codes)) <= int(xp.max(codes)) < 1 << bits:
        found = f"{xp.min(codes)}..{xp.max(codes)}"
        raise InputError(f"pack: {bits}-bit codes lie in 0..{(1 << bits) - 1}, got {found}")
    lead = codes.shape[:-1]
    eights = -(-count // 8)
    words = words_per_row(count, bits)
    if count % 8 or codes.dtype != xp.uint8 or not codes.flags.c_contiguous:
        padded = xp.zeros((*lead, 8 * eights), dtype=xp.uint8)
        padded[..., :count] = xp.astype(codes, xp.uint8)
        codes = padded
    squeezed = _squeeze(codes.view(xp.uint64), bits)  # [..., eights], 8·bits bits each
    # The stream is the low `bits` bytes of each, copied in the largest units that divide them
    unit = bits & -bits
    source = squeezed.view(_UNITS[unit]).reshape((*lead, eights, 8 // unit))
    stream = xp.empty((*lead, eights, bits // unit), dtype=_UNITS[unit])
    for j in range(bits // unit):
        stream[..., j] = source[..., j]
    as_bytes = stream.reshape((*lead, eights * bits // unit)).view(xp.uint8)
    return _fit(as_bytes, 4 * words).view(xp.uint32)


def unpack(words: Array, bits: int, count: int) -> Array:
    """The inverse of ``pack``: uint32 words[..., ⌈count·bits/32⌉] → uint8 codes[..., count].

    Raises
    ------
    ValueError
        for bits outside 1..8, and for rows of any other number of words.
    TypeError
        if the words are not uint32.

    >>> import numpy as np
    >>> unpack(np.array([0x4321], dtype=np.uint32), 4, 4).tolist()
    [1, 2, 3, 4]
    """
    xp = namespace(words)
    if words.dtype != xp.uint32:
        raise TypeError(
            f"unpack: words are uint32, got {words.dtype} (view signed words as uint32)"
        )
    needed = words_per_row(count, bits)
    if words.shape[-1] != needed:
        raise InputError(
            f"unpack: {count} codes of {bits} bits take {needed} words per row, "
            f"got {words.shape[-1]}"
        )
    lead = words.shape[:-1]
    eights = -(-count // 8)
    unit = bits & -bits
    stream = _fit(xp.ascontiguousarray(words).view(xp.uint8), eights * bits).view(_UNITS[unit])
    source = stream.reshape((*lead, eights, bits // unit))
    spread = xp.zeros((*lead, eights, 8 // unit), dtype=_UNITS[unit])
    for j in range(bits // unit):
        spread[..., j] = source[..., j]
    eight_codes = spread.reshape((*lead, 8 * eights // unit)).view(xp.uint64)
    codes = _spread(eight_codes, bits).view(xp.uint8)
    if count == 8 * eights:
        return codes
    return xp.copy(codes[..., :count])


def _squeeze(v: Array, bits: int) -> Array:
    """Bytes of which only the low ``bits`` bits are used → those bits side by side at the
    low end.
    """
    # of each two neighbouring fields, push the upper down to the bits used by the lower
    for width in (8, 16, 32):
        used = bits * width // 8
        lower = _mask(used, 2 * width)
        upper = (v >> (width - used)) & (lower << used)
        v = (v & lower) | upper
    return v


def _spread(v: Array, bits: int) -> Array:
    """The inverse of ``_squeeze``."""
    for width in (32, 16, 8):
        used = bits * width // 8
        lower = _mask(used, 2 * width)
        upper = (v << (width - used)) & (lower << width)
        v = (v & lower) | upper
    return v


def _mask(used: int, width: int) -> int:
    """The low ``used`` bits of each field of ``width`` bits in a 64-bit integer."""
    return sum(((1 << used) - 1) << at for at in range(0, 64, width))


def _fit(stream: Array, size: int) -> Array:
    """Bytes [..., n], cut or filled with zeros to [..., size]; what is cut is padding."""
    xp = namespace(stream)
    have = int(stream.shape[-1])
    if have == size:
        return stream
    if have > size:
        # of a single row, ascontiguousarray would keep the longer buffer
        return xp.copy(stream[..., :size])
    out = xp.zeros((*stream.shape[:-1], size), dtype=xp.uint8)
    out[..., :have] = stream
    return out


def _check_bits(bits: int) -> None:
    """ValueError unless ``bits`` is an integer in 1..8."""
    if bits not in range(1, 9) or not hasattr(bits, "__index__"):
        raise InputError(f"packing: bits is an integer in 1..8, got {bits!r}")


# --- scales and zero points ---------------------------------------------------------------


def store_scale(scale: Array, dtype: str | None, *, name: str = "scale") -> Array:
    """Positive finite scales, rounded to ``dtype`` → the array to hold (bfloat16 as uint16).

    Raises
    ------
    ValueError
        for an unknown dtype, and naming ``name`` where a scale is larger than the dtype can
        hold.
    """
    xp = namespace(scale)
    if dtype is None:
        return scale
    if dtype not in SCALE_DTYPES:
        raise InputError(
            f"scale_dtype {dtype!r} is unknown; choose one of {', '.join(SCALE_DTYPES)}"
        )
    shape = scale.shape  # NumPy turns results without axes into scalars
    scale = xp.reshape(scale, (scale.size,))
    wide = getattr(xp, "float32" if dtype == "bfloat16" else dtype)
    largest = float(xp.finfo(wide).max)
    most = float(xp.max(scale)) if scale.size else 0.0
    if most > largest:
        raise InputError(f"{name}: a scale of {most:.3g} does not fit {dtype}")
    if dtype == "bfloat16":
        codes = minifloat.quantize(scale, "bf16", "nan")
        if scale.size and int(xp.max(codes)) >= 0x7F80:  # infinity's bits
            raise InputError(f"{name}: a scale of {most:.3g} does not fit bfloat16")
        return xp.reshape(xp.maximum(codes, 1), shape)
    tiny = float(xp.finfo(wide).smallest_subnormal)
    # without this, a scale below half of the smallest value would round to 0
    return xp.reshape(xp.astype(xp.maximum(scale, tiny), wide), shape)


def load_scale(stored: Array, dtype: DType) -> Array:
    """The inverse of ``store_scale``: the array held → floats of ``dtype``."""
    xp = namespace(stored)
    if stored.dtype == xp.uint16:
        flat = xp.reshape(stored, (stored.size,))
        stored = xp.reshape(minifloat.dequantize(flat, "bf16"), stored.shape)
    return xp.astype(stored, dtype, copy=False)


def pack_codes(codes: Array, scheme: Scheme) -> Array:
    """int8 or uint8 codes → words of code + offset."""
    xp = namespace(codes)
    if scheme.signed:  # int8 plus 2^(b−1), modulo 256: never negative
        codes = bitcast(xp.ascontiguousarray(codes), xp.uint8) + scheme.offset
    return pack(codes, scheme.bits, check=False)


def unpack_codes(words: Array, scheme: Scheme, count: int) -> Array:
    """The inverse of ``pack_codes``."""
    xp = namespace(words)
    codes = unpack(words, scheme.bits, count)
    if scheme.signed:
        return bitcast(codes - scheme.offset, xp.int8)
    return codes


def store_zero(zero_point: Array, scheme: Scheme, dtype: str | None) -> Array | None:
    """Zero points of an asymmetric rule as one stream of b bits each, or in ``dtype``; None
    for a symmetric rule.
    """
    xp = namespace(zero_point)
    if scheme.symmetric:
        if not bool(xp.all(zero_point == scheme.zero)):
            raise InputError(
                f"zero points of rule {scheme.rule!r} are all {scheme.zero}; use an asymmetric rule"
            )
        return None
    if dtype is not None:
        if dtype not in ZERO_DTYPES:
            raise InputError(
                f"zero_dtype {dtype!r} is unknown; choose one of {', '.join(ZERO_DTYPES)}, or None"
            )
        return xp.astype(zero_point, getattr(xp, dtype))
    return pack(xp.reshape(zero_point, (zero_point.size,)) + scheme.offset, scheme.bits)


def load_zero(stored: Array | None, scale: Array, scheme: Scheme) -> Array:
    """The inverse of ``store_zero``, shaped like the scale."""
    xp = namespace(scale)
    if stored is None:
        return xp.full(scale.shape, scheme.zero, dtype=xp.int32)
    if stored.dtype == xp.uint32:
        stored = xp.astype(unpack(stored, scheme.bits, scale.size), xp.int32) - scheme.offset
    return xp.reshape(xp.astype(stored, xp.int32), scale.shape)
