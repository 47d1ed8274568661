"""Codes of 1 to 8 bits as a dense little-endian bit stream in 32-bit words, one stream a row.

Code i of a row takes the bits [i·b, (i+1)·b) of the row's stream; bit k is bit k mod 32 of word k // 32. Codes of 3,
5, 6 or 7 bits straddle words, and nothing is lost but the end of a row's last word. This is the layout of
compressed-tensors' "pack-quantized" weights.

Eight codes are squeezed at once, as the eight bytes of one 64-bit number: neighbours are pushed together in pairs,
pairs in fours, fours in eights (each step: shift, or, mask), which leaves 8·b bits at the low end, b whole bytes.
Unpacking is the same three steps backwards. There is no loop over codes.

| symbol | name                                      | shape              |
|--------|-------------------------------------------|--------------------|
| codes  | whole numbers in 0 … 2^b − 1              | [..., count]       |
| words  | the stream, uint32                        | [..., ⌈count·b/32⌉] |

Left out: other orders (GPTQ's and AWQ's are in ``layouts``), big-endian hosts (NumPy views follow the host's order),
streams that run on from one row to the next.
"""

from __future__ import annotations

from refllm.backend import Array, namespace

__all__ = ["pack", "unpack", "words_per_row"]

_UNITS = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64"}


def words_per_row(count: int, bits: int) -> int:
    """32-bit words that ``count`` codes of ``bits`` bits take: ⌈count·bits/32⌉."""
    _check_bits(bits)
    return -(-count * bits // 32)


def pack(codes: Array, bits: int, *, check: bool = True) -> Array:
    """Whole numbers codes[..., count] in 0 … 2^bits − 1 → uint32 words[..., ⌈count·bits/32⌉].

    ``check=False`` is for codes that are known to be in range (it spares a GPU the wait for the answer).

    Raises
    ------
    ValueError
        for bits outside 1..8, and for a code that needs more than ``bits`` bits or is negative.
    TypeError
        if the codes are no integers.
    """
    xp = namespace(codes)
    _check_bits(bits)
    if codes.dtype.kind not in "iu":
        raise TypeError(f"pack: codes are whole numbers, got {codes.dtype}")
    count = int(codes.shape[-1])
    if check and codes.size and not 0 <= int(xp.min(codes)) <= int(xp.max(codes)) < 1 << bits:
        raise ValueError(f"pack: {bits}-bit codes lie in 0..{(1 << bits) - 1}, got {xp.min(codes)}..{xp.max(codes)}")
    lead, eights, words = codes.shape[:-1], -(-count // 8), words_per_row(count, bits)
    if count % 8 or codes.dtype != xp.uint8 or not codes.flags.c_contiguous:
        padded = xp.zeros((*lead, 8 * eights), dtype=xp.uint8)
        padded[..., :count] = xp.astype(codes, xp.uint8)
        codes = padded
    v = _squeeze(codes.view(xp.uint64), bits)  # [..., eights], 8·bits bits each
    # The stream is the low `bits` bytes of each: moved in the largest units that divide them
    unit = bits & -bits
    source = v.view(_UNITS[unit]).reshape((*lead, eights, 8 // unit))
    stream = xp.empty((*lead, eights, bits // unit), dtype=_UNITS[unit])
    for j in range(bits // unit):
        stream[..., j] = source[..., j]
    return _fit(stream.reshape((*lead, eights * bits // unit)).view(xp.uint8), 4 * words).view(xp.uint32)


def unpack(words: Array, bits: int, count: int) -> Array:
    """The inverse of ``pack``: uint32 words[..., ⌈count·bits/32⌉] → uint8 codes[..., count].

    Raises
    ------
    ValueError
        for bits outside 1..8, and for rows of any other number of words.
    TypeError
        if the words are not uint32.
    """
    xp = namespace(words)
    if words.dtype != xp.uint32:
        raise TypeError(f"unpack: words are uint32, got {words.dtype} (view signed words as uint32)")
    if words.shape[-1] != words_per_row(count, bits):
        raise ValueError(
            f"unpack: {count} codes of {bits} bits take {words_per_row(count, bits)} words a row, got {words.shape[-1]}"
        )
    lead, eights, unit = words.shape[:-1], -(-count // 8), bits & -bits
    stream = _fit(xp.ascontiguousarray(words).view(xp.uint8), eights * bits).view(_UNITS[unit])
    source = stream.reshape((*lead, eights, bits // unit))
    spread = xp.zeros((*lead, eights, 8 // unit), dtype=_UNITS[unit])
    for j in range(bits // unit):
        spread[..., j] = source[..., j]
    codes = _spread(spread.reshape((*lead, 8 * eights // unit)).view(xp.uint64), bits).view(xp.uint8)
    return codes if count == 8 * eights else xp.copy(codes[..., :count])


def _squeeze(v: Array, bits: int) -> Array:
    """Bytes of which only the low ``bits`` bits are used → the same bits side by side at the low end."""
    for width in (8, 16, 32):  # of each two neighbouring fields, push the upper down to the bits used by the lower
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
    """The low ``used`` bits of each field of ``width`` bits in a 64-bit number."""
    return sum(((1 << used) - 1) << at for at in range(0, 64, width))


def _fit(stream: Array, size: int) -> Array:
    """Bytes [..., n] cut or filled with zeros to [..., size]: what is cut is padding."""
    xp = namespace(stream)
    have = int(stream.shape[-1])
    if have == size:
        return stream
    if have > size:
        return xp.copy(stream[..., :size])  # of a single row, ascontiguousarray would keep the longer buffer
    out = xp.zeros((*stream.shape[:-1], size), dtype=xp.uint8)
    out[..., :have] = stream
    return out


def _check_bits(bits: int) -> None:
    if bits not in range(1, 9) or not hasattr(bits, "__index__"):
        raise ValueError(f"packing: bits is a whole number in 1..8, got {bits!r}")
