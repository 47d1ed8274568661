"""Weight layouts: the tensors, bit orders and restrictions of the checkpoint formats that
other programs read.

| layout          | bits       | rules     | groups     | activations  | read by               |
|-----------------|------------|-----------|------------|--------------|-----------------------|
| int-quantized   | 8          | symmetric | row        | 8 bits       | transformers, vLLM    |
| pack-quantized  | 1 to 8     | symmetric | any, row   | float        | the same (vLLM: 4, 8) |
| naive-quantized | 8          | symmetric | any, row   | float        | transformers          |
| gptq_v2         | 2, 3, 4, 8 | all       | any, row   | float        | GPTQModel, vLLM       |
| gptq            | 2, 3, 4, 8 | symmetric | any, row   | float        | GPTQModel, vLLM       |
| awq             | 4          | all       | any, row   | float        | GPTQModel, vLLM       |
| float-quantized | 8, E4M3    |           | row, block | 8 bits/float | transformers, vLLM    |
| fp8             | 8, E4M3    |           | block      | 8 bits       | transformers, vLLM    |

The names with "-quantized" are compressed-tensors' formats; fp8 is DeepSeek-V3's.

For a weight W[M, N] in b bits whose rows have G groups (N/g of them, or one), the tensors:

| layout          | tensors of a weight                                                            |
|-----------------|--------------------------------------------------------------------------------|
| pack-quantized  | weight_packed int32 [M, ⌈N·b/32⌉], weight_scale [M, G], weight_shape int64 [2] |
|                 | (asymmetric: weight_zero_point int32 [⌈M·b/32⌉, G])                            |
| int-quantized   | weight int8 [M, N], weight_scale [M, G]; activations have one scale per token  |
| naive-quantized | the same, activations in floating point                                        |
| gptq_v2, gptq   | qweight int32 [N·b/32, M], qzeros int32 [G, M·b/32], scales [G, M],            |
|                 | g_idx int32 [N]                                                                |
| awq             | qweight int32 [N, M/8], qzeros int32 [G, M/8], scales [G, M]; 4 bits           |
| float-quantized | weight E4M3 [M, N], weight_scale (``float_layouts``)                           |
| fp8             | weight E4M3 [M, N], weight_scale_inv (``float_layouts``)                       |

All pack integers the same way: code C = q + 2^(b−1) (q if unsigned) number i of a stream
takes the bits [i·b, (i+1)·b) of it, as in ``packing``. pack-quantized has a stream per row.
So has GPTQ, stored as columns: its 3-bit layout of 32 codes in three words, usually drawn
as 10 codes, a split one, 10, a split one and 10, is the same stream. AWQ has a stream per
input column, in which every eight rows of W stand in the order 0 2 4 6 1 3 5 7. Zero points
are Z = z + 2^(b−1) (z if unsigned); ``gptq`` ("v1") stores Z − 1, which cannot represent
Z = 0; ``gptq_v2`` stores Z. ``from_tensors`` also reads what is never written: asymmetric
compressed-tensors weights, and any ``g_idx``.

Sources: the compressed-tensors library; AutoGPTQ's and GPTQModel's QuantLinear; AutoAWQ's
WQLinear_GEMM.

Left out: AWQ's GEMV layouts and TinyChat's v2, Marlin's (made by kernels when they load),
experts, blocks of integers, zero points in a float type, scales in E8M0, different schemes
within one matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from refllm.backend import Array, bitcast, namespace
from refllm.errors import InputError, alternatives
from refllm.formats.packing import (
    pack,
    pack_codes,
    store_scale,
    store_zero,
    unpack,
    words_per_row,
)
from refllm.formats.quantized_linear import ActOrderLinear, QuantizedLinear, column_order
from refllm.formats.uniform import Scheme
from refllm.formats.w8a8_linear import W8A8Linear

FLOAT_LAYOUTS = ("float-quantized", "fp8")
LAYOUTS = (
    *("pack-quantized", "int-quantized", "naive-quantized", "gptq_v2", "gptq", "awq"),
    *FLOAT_LAYOUTS,
)
FLOAT = "float"  # in a spec: the floating-point type that the checkpoint is stored in
FLOAT8 = "float8_e4m3fn"
GPTQ_BITS = (2, 3, 4, 8)
SCALES = ("weight_scale", "scales")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight rows of W stands at each place of a word

Spec = tuple[str, tuple[int, ...]]  # dtype's name, shape


@dataclass(frozen=True)
class WeightLayout:
    """How a weight is stored: what a reader must know besides the tensors.

    ``name`` is one of ``LAYOUTS``; ``group_size`` None is one scale per row; ``act_order``
    says that groups need not be of neighbouring columns.

    >>> print(WeightLayout("gptq_v2", 4, 128))
    gptq_v2, 4 bits, groups of 128
    """

    name: str
    bits: int
    group_size: int | None = None
    symmetric: bool = True
    act_order: bool = False
    weight_only: bool = False  # float-quantized: activations stay in floating point

    def __str__(self) -> str:
        share = "one scale per row"
        if self.group_size is not None:
            share = f"groups of {self.group_size}"
            if self.is_float:
                share = f"blocks of {self.group_size} × {self.group_size}"
        if self.activations:
            share += ", activations in 8 bits"
        return f"{self.name}, {self.bits} bits, {share}"

    @property
    def activations(self) -> bool:
        """Whether activations are quantised too, to 8 bits with one scale per token."""
        return self.name == "int-quantized" or (self.is_float and not self.weight_only)

    @property
    def is_float(self) -> bool:
        """Whether codes are 8-bit floats."""
        return self.name in FLOAT_LAYOUTS

    @property
    def transposed(self) -> bool:
        """Whether tensors run from inputs to outputs, as GPTQ's and AWQ's do."""
        return self.name in ("gptq_v2", "gptq", "awq")

    def groups(self, columns: int) -> int:
        """G, the groups of a row of ``columns``."""
        if self.group_size is None:
            return 1
        return columns // self.group_size


def layout_for(
    scheme: Scheme, name: str, *, activations: bool = False, act_order: bool = False
) -> WeightLayout:
    """The layout ``name`` for weights of ``scheme``.

    ``activations`` says that their inputs are quantised too, to 8 bits per token;
    ``act_order`` that groups are of columns in another order than their own (GPTQ's
    act-order without static groups).

    Raises
    ------
    ValueError
        if the layout cannot hold them; the message says which layouts can.
    """
    if name not in LAYOUTS:
        raise InputError(f"unknown layout {name!r}; {alternatives(name, LAYOUTS)}")
    act_order = act_order and scheme.granularity == "group"
    reason = _obstacle(scheme, name, activations, act_order)
    if reason is not None:
        able = [n for n in LAYOUTS if _obstacle(scheme, n, activations, act_order) is None]
        instead = "no layout can"
        if able:
            instead = f"what can: {', '.join(able)}"
        raise InputError(f"{name} cannot hold {reason}; {instead}")
    group = scheme.group_size if isinstance(scheme.group_size, int) else None
    return WeightLayout(name, scheme.bits, group, scheme.symmetric, act_order)


def _obstacle(scheme: Scheme, name: str, activations: bool, act_order: bool) -> str | None:
    """What the layout cannot represent; None if it holds all of it."""
    if name in FLOAT_LAYOUTS:
        return "integers, only 8-bit floats"
    if scheme.granularity not in ("tensor", "channel", "group"):
        return f"one scale per {scheme.granularity}"
    if act_order and name not in ("gptq", "gptq_v2"):
        reordered = "groups of columns in another order"
        return f"{reordered} (act-order without static groups: there is no g_idx)"
    if activations != (name == "int-quantized"):
        if activations:
            return "quantised activations"
        return "weights whose activations are not quantised"
    if name == "awq":
        if scheme.bits != 4:
            return f"{scheme.bits}-bit weights, only 4-bit ones"
        return None
    if name in ("gptq", "gptq_v2"):
        if scheme.bits not in GPTQ_BITS:
            return f"{scheme.bits}-bit weights, only those of 2, 3, 4 or 8 bits"
        if name == "gptq" and not scheme.symmetric:
            return "asymmetric weights (a zero point of 0 is lost)"
        return None
    # compressed-tensors defines them, but transformers 5.23 fails to load them
    if not scheme.symmetric:
        return "asymmetric weights (its readers fail on them)"
    if name == "pack-quantized":
        return None
    if scheme.bits != 8:
        return f"{scheme.bits}-bit weights, only 8-bit ones"
    if scheme.granularity == "group" and activations:
        return "groups"
    return None


def tensor_specs(
    layout: WeightLayout, shape: tuple[int, int], name: str = "weight"
) -> dict[str, Spec]:
    """Suffix → (dtype, shape) of the tensors of a weight W[M, N]; the dtype ``"float"``
    stands for the checkpoint's.

    Raises
    ------
    ValueError
        naming ``name`` if the layout cannot hold a weight of this shape.

    >>> for suffix, spec in tensor_specs(WeightLayout("awq", 4, 64), (32, 128)).items():
    ...     print(suffix, *spec)
    qweight int32 (128, 4)
    qzeros int32 (2, 4)
    scales float (2, 32)
    """
    m, n = shape
    if layout.is_float:
        return _float_specs(layout, shape, name)
    if layout.group_size is not None and n % layout.group_size:
        raise InputError(f"{name}: groups of {layout.group_size} do not divide its {n} columns")
    b = layout.bits
    g = layout.groups(n)
    specs: dict[str, Spec]
    if layout.name == "pack-quantized":
        specs = {
            "weight_packed": ("int32", (m, words_per_row(n, b))),
            "weight_scale": (FLOAT, (m, g)),
            "weight_shape": ("int64", (2,)),
        }
        if not layout.symmetric:
            specs["weight_zero_point"] = ("int32", (words_per_row(m, b), g))
        return specs
    if not layout.transposed:
        specs = {"weight": ("int8", (m, n)), "weight_scale": (FLOAT, (m, g))}
        if not layout.symmetric:
            specs["weight_zero_point"] = ("int8", (m, g))
        return specs
    unit = 32 if b == 3 else 32 // b  # codes that fill whole words
    if m % unit or (layout.name != "awq" and n % unit):
        raise InputError(
            f"{name}: {layout.name} packs {unit} codes of {b} bits at once, which does not "
            f"divide {m} × {n}; pack-quantized takes any shape"
        )
    small: dict[str, Spec] = {"qzeros": ("int32", (g, m * b // 32)), "scales": (FLOAT, (g, m))}
    if layout.name == "awq":
        return {"qweight": ("int32", (n, m // 8)), **small}
    return {"qweight": ("int32", (n * b // 32, m)), **small, "g_idx": ("int32", (n,))}


def _float_specs(layout: WeightLayout, shape: tuple[int, int], name: str) -> dict[str, Spec]:
    """``tensor_specs`` of 8-bit floats."""
    m, n = shape
    size = layout.group_size
    if size is not None and n % size and layout.name != "fp8" and layout.activations:
        raise InputError(
            f"{name}: the readers of {layout.name} cut activations into whole tiles of {size}, "
            f"which do not divide its {n} columns; fp8 takes any shape"
        )
    scales = (m, 1) if size is None else (-(-m // size), -(-n // size))
    # "inv" despite being a multiplier
    suffix = "weight_scale_inv" if layout.name == "fp8" else "weight_scale"
    return {"weight": (FLOAT8, (m, n)), suffix: (FLOAT, scales)}


# --- writing ------------------------------------------------------------------------------


def to_tensors(
    weight: QuantizedLinear | W8A8Linear,
    layout: WeightLayout,
    *,
    dtype: str = "float16",
    name: str = "weight",
) -> dict[str, Array]:
    """The tensors of a weight by suffix: ``to_tensor`` of each of its ``tensor_specs``."""
    return {
        suffix: to_tensor(weight, layout, suffix, dtype=dtype)
        for suffix in tensor_specs(layout, weight.shape, name)
    }


def to_tensor(
    weight: QuantizedLinear | W8A8Linear,
    layout: WeightLayout,
    suffix: str,
    *,
    dtype: str = "float16",
) -> Array:
    """One tensor of a weight whose scheme ``layout_for`` accepted.

    Scales are rounded to ``dtype`` ("bfloat16" comes as the uint16 of its bits); a weight
    that was quantised with that ``scale_dtype`` is stored exactly.
    """
    inner = weight.weight if isinstance(weight, W8A8Linear) else weight
    xp = namespace(inner.packed())
    m, n = inner.shape
    if suffix == "weight_packed":
        return bitcast(inner.packed(), xp.int32)
    if suffix == "weight_shape":
        return xp.asarray([m, n], dtype=xp.int64)
    if suffix == "weight":  # C − 128 = q − z, whatever the rule
        return bitcast(unpack(inner.packed(), 8, n) - 128, xp.int8)
    if suffix in SCALES:
        scale = store_scale(_per_row(inner.scale, m), dtype, name="scale")
        if layout.transposed:
            scale = xp.ascontiguousarray(scale.T)
        return scale
    if suffix == "qweight":
        if layout.name == "awq":
            return _interleave(xp.ascontiguousarray(unpack(inner.packed(), 4, n).T))
        words = inner.packed()
        if isinstance(inner, ActOrderLinear):  # with the columns in their own order
            words = pack_codes(inner.codes, inner.scheme)
        return bitcast(xp.ascontiguousarray(words.T), xp.int32)
    if suffix == "qzeros":
        zeros = xp.astype(_per_row(inner.zero_point, m) + inner.scheme.offset, xp.uint8)
        zeros = xp.ascontiguousarray(zeros.T)  # Z[G, M]
        if layout.name == "awq":
            return _interleave(zeros)
        return bitcast(pack(zeros - _zero_offset(layout), layout.bits), xp.int32)
    if suffix == "g_idx":
        g_idx = inner.g_idx if isinstance(inner, ActOrderLinear) else None
        if g_idx is not None:
            return g_idx
        return xp.astype(xp.arange(n) // (layout.group_size or n), xp.int32)
    raise InputError(f"{layout.name} has no tensor {suffix!r}")


def _per_row(parameter: Array, rows: int) -> Array:
    """A scale or zero point of shape () repeated per row, [M, 1]; others unchanged."""
    xp = namespace(parameter)
    if parameter.ndim:
        return parameter
    return xp.ascontiguousarray(xp.broadcast_to(parameter, (rows, 1)))


def _zero_offset(layout: WeightLayout) -> int:
    """What GPTQ's first version subtracts from zero points when it stores them."""
    return 1 if layout.name == "gptq" else 0


def _interleave(codes: Array) -> Array:
    """4-bit codes[K, M] → AWQ's words, int32 [K, M/8]."""
    xp = namespace(codes)
    k, m = codes.shape
    # eight slices instead of a list of indices: NumPy and CuPy both take them
    eights = xp.reshape(codes, (k, m // 8, 8))  # [K, M/8, 8]
    placed = xp.stack([eights[:, :, row] for row in AWQ_ORDER], axis=2)
    return bitcast(pack(xp.reshape(placed, (k, m)), 4), xp.int32)


# --- reading ------------------------------------------------------------------------------


def from_tensors(
    tensors: Mapping[str, Array],
    layout: WeightLayout,
    shape: tuple[int, int],
    *,
    scale_dtype: str | None = None,
    dtype: str = "float32",
    name: str = "weight",
) -> QuantizedLinear | W8A8Linear:
    """A weight W[M, N] from its tensors by suffix, with the shapes of ``tensor_specs``;
    scales are float32 or float64.

    ``scale_dtype`` is the type that the scales were stored in and are stored in again,
    ``dtype`` the type that the weight comes back in. Zero points that are all 2^(b−1) are
    not kept: the weight is then symmetric, as all weights of a symmetric layout must be.

    Raises
    ------
    ValueError
        naming ``name`` if the tensors contradict each other, or need what is left out.
    """
    m, n = shape
    scale = tensors["scales"].T if layout.transposed else tensors["weight_scale"]
    xp = namespace(scale)
    if not bool(xp.all((scale >= 0) & xp.isfinite(scale))):
        raise InputError(f"{name}: a scale is negative or not finite: the file is damaged")
    words = _stream(tensors, layout, shape, name)
    zero = _zeros(tensors, layout, m)
    if layout.transposed and layout.symmetric and zero is not None:
        _require_symmetric(zero, layout, name)
    order = None
    if "g_idx" in tensors:
        order = _act_order(tensors["g_idx"], layout.groups(n), name)
    if order is not None:
        words = pack(unpack(words, layout.bits, n)[:, order], layout.bits)
    if zero is not None and bool(xp.all(zero == 1 << (layout.bits - 1))):
        zero = None  # symmetric after all; codes are stored as C either way
    granularity = "channel" if layout.group_size is None else "group"
    rule = "half_integer" if zero is None else "asymmetric"
    scheme = Scheme(layout.bits, rule, granularity, layout.group_size)
    if zero is not None:
        zero = store_zero(zero, scheme, None)
    held = store_scale(xp.ascontiguousarray(scale), scale_dtype, name=f"{name}'s scale")
    held = xp.where(scale > 0, held, 0)  # some writers give groups of zeros a scale of zero
    parts = (words, held, zero, scheme, (m, n), getattr(xp, dtype))
    made = QuantizedLinear(*parts)
    if order is not None:
        made = ActOrderLinear(*parts)
        made.order = order
    if layout.activations:
        return W8A8Linear(made, name=f"the input of {name}")
    return made


def _require_symmetric(zero: Array, layout: WeightLayout, name: str) -> None:
    """ValueError unless all zero points are 2^(b−1), as the layout says they are."""
    xp = namespace(zero)
    middle = 1 << (layout.bits - 1)
    wrong = zero != middle
    if not bool(xp.any(wrong)):
        return
    found = int(xp.reshape(zero, (-1,))[int(xp.argmax(xp.reshape(wrong, (-1,))))])
    advice = "set 'sym' to false if the zero points are right"
    if layout.name == "gptq" and bool(xp.all(zero == middle + 1)):
        advice = "'checkpoint_format' should say gptq_v2, which stores zero points as they are"
    elif layout.name == "gptq_v2" and bool(xp.all(zero == middle - 1)):
        advice = "'checkpoint_format' should say gptq, which stores zero points less 1"
    raise InputError(
        f"{name} has the zero point {found}, but its quantization config says that weights are "
        f"symmetric ('sym'), with {middle}: {advice}"
    )


def _act_order(g_idx: Array, groups: int, name: str) -> Array | None:
    """The order of columns that makes groups contiguous; None if it is their own."""
    xp = namespace(g_idx)
    columns = int(g_idx.shape[0])
    if bool(xp.all(g_idx == xp.arange(columns) // (columns // groups))):
        return None
    return column_order(g_idx, groups, name=name)


def _stream(
    tensors: Mapping[str, Array], layout: WeightLayout, shape: tuple[int, int], name: str
) -> Array:
    """C as one bit stream per row, uint32 [M, ⌈N·b/32⌉]."""
    m, n = shape
    if layout.name == "pack-quantized":
        found = [int(size) for size in tensors["weight_shape"]]
        if found != [m, n]:
            raise InputError(f"{name}: weight_shape is {found}, but the network needs {[m, n]}")
        return _words(tensors["weight_packed"])
    if not layout.transposed:
        return pack(bitcast(tensors["weight"], "uint8") + 128, 8)
    if layout.name != "awq":
        return _words(tensors["qweight"].T)
    codes = _deinterleave(tensors["qweight"])
    return pack(namespace(codes).ascontiguousarray(codes.T), 4)


def _zeros(tensors: Mapping[str, Array], layout: WeightLayout, rows: int) -> Array | None:
    """Z[M, G], int32; None where the layout stores none."""
    if layout.transposed:
        words = tensors["qzeros"]
        xp = namespace(words)
        if layout.name == "awq":
            zeros = _deinterleave(words)
        else:  # Z − 1 = −1 was stored as the largest code
            zeros = unpack(_words(words), layout.bits, rows) + _zero_offset(layout)
            zeros &= (1 << layout.bits) - 1
        return xp.ascontiguousarray(xp.astype(zeros.T, xp.int32))
    if layout.symmetric:
        return None
    given = tensors["weight_zero_point"]
    xp = namespace(given)
    if layout.name != "pack-quantized":
        return xp.astype(given, xp.int32) + 128
    return xp.ascontiguousarray(xp.astype(unpack(_words(given.T), layout.bits, rows).T, xp.int32))


def _deinterleave(words: Array) -> Array:
    """AWQ's words, int32 [K, M/8] → codes[K, M], the inverse of ``_interleave``."""
    xp = namespace(words)
    k, eighth = words.shape
    placed = xp.reshape(unpack(_words(words), 4, 8 * eighth), (k, eighth, 8))  # [K, M/8, 8]
    eights = xp.stack([placed[:, :, AWQ_ORDER.index(row)] for row in range(8)], axis=2)
    return xp.reshape(eights, (k, 8 * eighth))


def _words(tensor: Array) -> Array:
    """int32 words as the uint32 that ``packing`` takes."""
    xp = namespace(tensor)
    return bitcast(xp.ascontiguousarray(tensor), xp.uint32)
