"""Plain floats (F32, F16, BF16), and MXFP4, whose blocks share a power of two.

MXFP4: 32 elements, one byte E for 2^(E − 127), and 4-bit floats (E2M1: 0, ½, 1, 1½, 2, 3,
4, 6 and their negatives). ggml keeps twice the values of E2M1 and half the scale, which is
the same. E is chosen so that the largest element falls into the top binade of E2M1,
E = ⌊log2 largest⌋ − 2 + 127; what is then above 6 becomes 6. Codes are the nearest value, of
two that are equally near the smaller code.

Quirk: for a largest element below 2^−125 this E is negative, and is stored modulo 256. The
scale is then huge and the block becomes zeros, as nearly all of it would with E = 0.

Source: OCP Microscaling Formats 1.0 (MXFP4); ggml's quantisers for ties, zero blocks
(E = 0) and tiny ones.

Left out: NVFP4.
"""

from __future__ import annotations

from refllm.backend import Array, bitcast, namespace
from refllm.formats import minifloat
from refllm.formats.gguf.bits import float16_bytes, pack_bits, unpack_bits
from refllm.formats.gguf.unpacked import Unpacked

__all__ = ["FLOATS", "QUANTIZERS", "UNPACKERS"]

E2M1 = (0, 1, 2, 3, 4, 6, 8, 12)  # doubled


def quantize_f32(x: Array) -> Array:
    """x[B, 1] → bytes[B, 4]."""
    xp = namespace(x)
    return xp.ascontiguousarray(x).view(xp.uint8)


def quantize_f16(x: Array) -> Array:
    """x[B, 1] → bytes[B, 2], to nearest even; infinity from 65,520 on."""
    return float16_bytes(x[:, 0])


def quantize_bf16(x: Array) -> Array:
    """x[B, 1] → bytes[B, 2]: the upper half of the float32, to nearest even; infinity beyond
    the largest value.
    """
    return minifloat.quantize(x, "bf16", "nan").view(namespace(x).uint8)


def quantize_mxfp4(x: Array) -> Array:
    """x[B, 32] → bytes[B, 17]."""
    xp = namespace(x)
    largest = xp.max(xp.abs(x), axis=1)
    some = largest > 0
    # log2 is rounded to float32 first: a value just below a power of two counts as that power
    binade = xp.floor(
        xp.astype(xp.log2(xp.astype(xp.where(some, largest, 1.0), xp.float64)), xp.float32)
    )
    # modulo 256, as in C: see above
    shared = xp.where(some, xp.astype(binade, xp.int32) + 125, 0) & 255
    scale = _scale(shared)
    scaled = x / scale[:, None]
    size = xp.abs(scaled)
    code = xp.zeros(x.shape, dtype=xp.uint8)
    for i in range(1, 8):  # strictly above the midpoint: a tie takes the smaller code
        # near the largest float32 some of the values are infinite
        fits = xp.isfinite(scale * float(E2M1[i]))[:, None]
        code += xp.astype((size > (E2M1[i - 1] + E2M1[i]) / 2.0) & fits, xp.uint8)
    code |= xp.astype(scaled < 0, xp.uint8) << 3
    code = xp.where((code & 7) == 0, 0, code)
    exponent = xp.astype(shared, xp.uint8)[:, None]
    return xp.concat([exponent, pack_bits(xp.astype(code, xp.uint8), 4, 16)], axis=1)


def _scale(shared: Array) -> Array:
    """2^(E − 128) as float32, E in 0 … 255, made of bits: the smallest two are denormal."""
    xp = namespace(shared)
    shared = xp.astype(shared, xp.uint32)
    bits = xp.where(shared < 2, (shared + 1) << 21, (shared - 1) << 23)
    return bitcast(xp.ascontiguousarray(xp.astype(bits, xp.uint32)), xp.float32)


def dequantize_f32(data: Array) -> Array:
    """bytes[B, 4] → float32 [B, 1]."""
    xp = namespace(data)
    return xp.ascontiguousarray(data).view(xp.float32)


def dequantize_f16(data: Array) -> Array:
    """bytes[B, 2] → float32 [B, 1]."""
    xp = namespace(data)
    return xp.astype(xp.ascontiguousarray(data).view(xp.float16), xp.float32)


def dequantize_bf16(data: Array) -> Array:
    """bytes[B, 2] → float32 [B, 1]."""
    xp = namespace(data)
    return minifloat.dequantize(xp.ascontiguousarray(data).view(xp.uint16), "bf16")


def unpack_mxfp4(data: Array) -> Unpacked:
    """bytes[..., 17, C]; the codes are doubled values, −12 … 12."""
    xp = namespace(data)
    table = xp.asarray([*E2M1, *(-size for size in E2M1)], dtype=xp.int8)
    codes = xp.take(table, xp.astype(unpack_bits(data[..., 1:, :], 4, 16), xp.int32))
    return Unpacked(codes, _scale(data[..., :1, :]), None)


QUANTIZERS = {
    "F32": quantize_f32,
    "F16": quantize_f16,
    "BF16": quantize_bf16,
    "MXFP4": quantize_mxfp4,
}
# plain floats take bytes [B, size] and return [B, 1]
FLOATS = {"F32": dequantize_f32, "F16": dequantize_f16, "BF16": dequantize_bf16}
UNPACKERS = {"MXFP4": unpack_mxfp4}
