"""What the byte layouts of other programs can hold, and which tensors they store a weight
as.

| layout          | bits       | rules      | groups      | activations | who reads it                                |
|-----------------|------------|------------|-------------|-------------|---------------------------------------------|
| int-quantized   | 8          | symmetric  | row         | 8 bits      | compressed-tensors: transformers, vLLM      |
| pack-quantized  | 1 to 8     | symmetric  | any, or row | as they are | the same; vLLM at 4 and 8 bits only         |
| naive-quantized | 8          | symmetric  | any, or row | as they are | compressed-tensors: transformers            |
| gptq_v2         | 2, 3, 4, 8 | all        | any, or row | as they are | GPTQModel, newer vLLM                       |
| gptq            | 2, 3, 4, 8 | symmetric  | any, or row | as they are | GPTQModel, AutoGPTQ, vLLM                   |
| awq             | 4          | all        | any, or row | as they are | GPTQModel, AutoAWQ, vLLM                    |
| float-quantized | 8, E4M3    |            | row, block  | 8 bits      | compressed-tensors: transformers, vLLM      |
| fp8             | 8, E4M3    |            | block       | 8 bits      | DeepSeek-V3's: transformers, vLLM           |

In the last two, weights are 8-bit floats, and blocks are square: b × b weights share a
scale. A row goes with a scale a token of the activations, a block with 1 × b tiles;
float-quantized may leave activations as they are.

What a foreign file may hold besides (asymmetric compressed-tensors weights, ``g_idx``) is
read, see ``layouts``.

Left out: blocks of integers, scales in E8M0, weights of different schemes in one matrix.

<<MERGED>> Quantised weights in the byte layouts that other programs read:
compressed-tensors, GPTQ and AWQ, tensor by tensor.

For a weight W[M, N] in b bits whose rows have G groups (N/g of them, or one):

| layout         | tensors of a weight                                                                              |
|----------------|--------------------------------------------------------------------------------------------------|
| pack-quantized | weight_packed int32 [M, ⌈N·b/32⌉], weight_scale [M, G], weight_shape int64 [2]; if asymmetric       |
|                | weight_zero_point int32 [⌈M·b/32⌉, G]                                                              |
| int-quantized  | weight int8 [M, N], weight_scale [M, G]; activations are quantised to 8 bits a token at a time    |
| naive-quantized| the same, activations as they are                                                                |
| gptq_v2, gptq  | qweight int32 [N·b/32, M], qzeros int32 [G, M·b/32], scales [G, M], g_idx int32 [N]                |
| awq            | qweight int32 [N, M/8], qzeros int32 [G, M/8], scales [G, M]; 4 bits                               |

All pack the same way: code C = q + 2^(b−1) (q if unsigned) number i of a stream takes the
bits [i·b, (i+1)·b) of it, as in ``packing``. pack-quantized has a stream for each row; so
has GPTQ, stored as columns: its 3-bit layout of 32 codes in three words, usually drawn as
10 codes, a split one, 10, a split one and 10, is nothing else. AWQ has a stream for each
input column, in which each eight rows of W stand in the order 0 2 4 6 1 3 5 7. Zero points
are Z = z + 2^(b−1) (z if unsigned); ``gptq`` ("v1") stores Z − 1, which has no room for Z =
0; ``gptq_v2`` stores Z.

8-bit floats (float-quantized, fp8) are in ``float_layouts``.

Sources: the compressed-tensors library; AutoGPTQ's and GPTQModel's QuantLinear; AutoAWQ's
WQLinear_GEMM.

Left out: AWQ's GEMV layouts and TinyChat's v2, Marlin's (made by kernels when they load),
experts, scales in blocks, zero points in a float type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from refllm.backend import Array, bitcast, namespace
from refllm.formats.packing import pack, store_scale, store_zero, unpack, words_per_row
from refllm.formats.quantized_linear import ActOrderLinear, QuantizedLinear, column_order
from refllm.formats.uniform import Scheme
from refllm.formats.w8a8_linear import W8A8Linear

FLOATS = ("float-quantized", "fp8")
LAYOUTS = ("pack-quantized", "int-quantized", "naive-quantized", "gptq_v2", "gptq", "awq", *FLOATS)
FLOAT = "float"  # in a spec: the floating-point type that the checkpoint is stored in
FLOAT8 = "float8_e4m3fn"
GPTQ_BITS = (2, 3, 4, 8)

Spec = tuple[str, tuple[int, ...]]  # dtype's name, shape


@dataclass(frozen=True)
class WeightLayout:
    """How a weight is stored: what a reader must know besides the tensors.

    ``group_size`` None is one scale a row; ``reordered`` says that groups need not be of
    neighbouring columns.
    """

    layout: str
    bits: int
    group_size: int | None = None
    symmetric: bool = True
    reordered: bool = False
    plain_inputs: bool = False  # float-quantized: activations as they are

    def __str__(self) -> str:
        if self.group_size is None:
            share = "a scale a row"
        else:
            share = f"groups of {self.group_size}"
        if self.floats and self.group_size:
            share = f"blocks of {self.group_size} × {self.group_size}"
        else:
            share = share
        return f"{self.layout}, {self.bits} bits, {share}" + (
            ", activations in 8 bits" if self.activations else ""
        )

    @property
    def activations(self) -> bool:
        """Whether the inputs are quantised too, 8 bits, a scale a token."""
        return self.layout == "int-quantized" or (self.floats and not self.plain_inputs)

    @property
    def floats(self) -> bool:
        """Whether codes are 8-bit floats."""
        return self.layout in FLOATS

    @property
    def transposed(self) -> bool:
        """GPTQ's and AWQ's tensors run from inputs to outputs."""
        return self.layout in ("gptq_v2", "gptq", "awq")

    def groups(self, columns: int) -> int:
        """G"""
        if self.group_size is None:
            return 1
        return columns // self.group_size


def layout_for(
    scheme: Scheme, layout: str, *, activations: bool = False, reordered: bool = False
) -> WeightLayout:
    """How weights of ``scheme`` are stored in ``layout``.

    ``activations`` says that their inputs are quantised too, 8 bits a token; ``reordered``
    that columns are grouped in another order than their own (GPTQ's act-order without
    static groups).

    Raises
    ------
    ValueError
        if the layout cannot hold them; the sentence says which layouts can.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
    reordered = reordered and scheme.granularity == "group"
    reason = _obstacle(scheme, layout, activations, reordered)
    if reason is not None:
        can = [
            other for other in LAYOUTS if _obstacle(scheme, other, activations, reordered) is None
        ]
        instead = f"; what can: {', '.join(can)}" if can else "; no layout can"
        raise ValueError(f"{layout} cannot hold {reason}{instead}")
    if isinstance(scheme.group_size, int):
        group = scheme.group_size
    else:
        group = None
    return WeightLayout(layout, scheme.bits, group, scheme.symmetric, reordered)


def _obstacle(scheme: Scheme, layout: str, activations: bool, reordered: bool) -> str | None:
    """What the layout has no place for; None if it holds all of it."""
    if layout in FLOATS:
        return "whole numbers, only 8-bit floats"
    if scheme.granularity not in ("tensor", "channel", "group"):
        return f"a scale for each {scheme.granularity}"
    if reordered and layout not in ("gptq", "gptq_v2"):
        return "groups of columns in another order (act-order without static groups: there is no g_idx)"
    if activations != (layout == "int-quantized"):
        if activations:
            return "quantised activations"
        return "weights whose activations are not quantised"
    if layout == "awq":
        if scheme.bits == 4:
            return None
        return f"{scheme.bits}-bit weights, only 4-bit ones"
    if layout in ("gptq", "gptq_v2"):
        if scheme.bits not in GPTQ_BITS:
            return f"{scheme.bits}-bit weights, only those of 2, 3, 4 or 8 bits"
        if layout == "gptq" and not scheme.symmetric:
            return "asymmetric weights (a zero point of 0 is lost)"
        return None
    # the library has a place for them, but transformers 5.23 fails to load it
    if not scheme.symmetric:
        return "asymmetric weights (its readers fail on them)"
    if layout == "pack-quantized":
        return None
    if scheme.bits != 8:
        return f"{scheme.bits}-bit weights, only 8-bit ones"
    if scheme.granularity == "group" and activations:
        return "groups"
    return None


def tensor_specs(stored: WeightLayout, shape: tuple[int, int], name: str = "weight") -> dict[str, Spec]:
    """Suffix → (dtype, shape) of the tensors of a weight W[M, N]; a dtype of ``"float"`` is
    the checkpoint's.

    Raises
    ------
    ValueError
        naming ``name`` if the layout has no place for a weight of this shape.
    """
    m, n = shape
    b = stored.bits
    if stored.floats:
        size = stored.group_size
        if size is not None and n % size and stored.layout != "fp8" and stored.activations:
            raise ValueError(
                f"{name}: the readers of {stored.layout} cut activations into whole tiles of {size}, "
                f"which do not divide its {n} columns; fp8 takes any shape"
            )
        steps = (m, 1) if size is None else (-(-m // size), -(-n // size))
        # a multiplier, despite the name
        scale = "weight_scale_inv" if stored.layout == "fp8" else "weight_scale"
        return {"weight": (FLOAT8, (m, n)), scale: (FLOAT, steps)}
    g = stored.groups(n)
    if stored.group_size is not None and n % stored.group_size:
        raise ValueError(f"{name}: groups of {stored.group_size} do not divide its {n} columns")
    if stored.layout == "pack-quantized":
        specs: dict[str, Spec] = {
            "weight_packed": ("int32", (m, words_per_row(n, b))),
            "weight_scale": (FLOAT, (m, g)),
            "weight_shape": ("int64", (2,)),
        }
        if stored.symmetric:
            return specs
        return specs | {"weight_zero_point": ("int32", (words_per_row(m, b), g))}
    if not stored.transposed:
        specs = {"weight": ("int8", (m, n)), "weight_scale": (FLOAT, (m, g))}
        if stored.symmetric:
            return specs
        return specs | {"weight_zero_point": ("int8", (m, g))}
    unit = 8 if stored.layout == "awq" else 32 if b == 3 else 32 // b
    if m % unit or (stored.layout != "awq" and n % unit):
        raise ValueError(
            f"{name}: {stored.layout} packs {unit} codes of {b} bits at once, which does not divide "
            f"{m} × {n}; pack-quantized takes any shape"
        )
    small: dict[str, Spec] = {"qzeros": ("int32", (g, m * b // 32)), "scales": (FLOAT, (g, m))}
    if stored.layout == "awq":
        return {"qweight": ("int32", (n, m // 8)), **small}
    return {"qweight": ("int32", (n * b // 32, m)), **small, "g_idx": ("int32", (n,))}


SCALES = ("weight_scale", "scales")
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight rows of W stands at each place of a word


# --- writing ------------------------------------------------------------------------------


def to_tensors(
    weight: QuantizedLinear | W8A8Linear, stored: WeightLayout, *, dtype: str = "float16", name: str = "weight"
) -> dict[str, Array]:
    """The tensors of a weight by suffix, in the order of ``tensor_specs``; see
    ``to_tensor``.
    """
    return {
        s: to_tensor(weight, stored, s, dtype=dtype)
        for s in tensor_specs(stored, weight.shape, name)
    }


def to_tensor(
    weight: QuantizedLinear | W8A8Linear, stored: WeightLayout, suffix: str, *, dtype: str = "float16"
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
    if suffix == "weight":
        # C − 128 = q − z, whatever the rule
        return bitcast(unpack(inner.packed(), 8, n) - 128, xp.int8)
    if suffix in SCALES:
        scale = store_scale(_by_row(inner.scale, m), dtype, name="scale")
        if stored.transposed:
            return xp.ascontiguousarray(scale.T)
        return scale
    if suffix == "qweight":
        if stored.layout == "awq":
            return _interleaved(xp.ascontiguousarray(unpack(inner.packed(), 4, n).T))
        return bitcast(xp.ascontiguousarray(_own_order(inner).T), xp.int32)
    if suffix == "qzeros":
        zeros = xp.astype(_by_row(inner.zero_point, m) + inner.scheme.offset, xp.uint8)
        zeros = xp.ascontiguousarray(zeros.T)  # Z[G, M]
        if stored.layout == "awq":
            return _interleaved(zeros)
        return bitcast(pack(zeros - _lost(stored), stored.bits), xp.int32)
    if suffix == "g_idx":
        g_idx = inner.g_idx if isinstance(inner, ActOrderLinear) else None
        if g_idx is None:
            return xp.astype(xp.arange(n) // (stored.group_size or n), xp.int32)
        return g_idx
    raise ValueError(f"{stored.layout} has no tensor {suffix!r}")


def _own_order(weight: QuantizedLinear) -> Array:
    """Its words with the columns in the weight's own order."""
    if not isinstance(weight, ActOrderLinear) or weight.order is None:
        return weight.packed()
    codes = unpack(weight.packed(), weight.scheme.bits, weight.shape[1])
    xp = namespace(codes)
    return pack(xp.ascontiguousarray(codes[:, xp.argsort(weight.order)]), weight.scheme.bits)


def _by_row(parameter: Array, rows: int) -> Array:
    """A scale or zero point of () as one for each row, [M, 1]; others as they are."""
    xp = namespace(parameter)
    if parameter.ndim:
        return parameter
    return xp.ascontiguousarray(xp.broadcast_to(parameter, (rows, 1)))


def _lost(stored: WeightLayout) -> int:
    """What GPTQ's first version takes off its zero points."""
    return 1 if stored.layout == "gptq" else 0


def _interleaved(codes: Array) -> Array:
    """4-bit codes[K, M] → AWQ's words, int32 [K, M/8]."""
    xp = namespace(codes)
    k, m = codes.shape
    # indexed by a list of Python ints: eight slices that CuPy and NumPy both take
    eights = xp.reshape(codes, (k, m // 8, 8))
    placed = xp.stack([eights[:, :, row] for row in AWQ_ORDER], axis=2)
    return bitcast(pack(xp.reshape(placed, (k, m)), 4), xp.int32)


# --- reading ------------------------------------------------------------------------------


def from_tensors(
    tensors: Mapping[str, Array],
    stored: WeightLayout,
    shape: tuple[int, int],
    *,
    scale_dtype: str | None = None,
    dtype: str = "float32",
    name: str = "weight",
) -> QuantizedLinear | W8A8Linear:
    """A weight W[M, N] from its tensors by suffix, of the shapes of ``tensor_specs``;
    scales in float32 or float64.

    ``scale_dtype`` is what the scales were stored in (they are held so again), ``dtype``
    what the weight comes back in. Zero points that are all 2^(b−1) are not kept: the weight
    is symmetric then.

    Raises
    ------
    ValueError
        naming ``name`` if the tensors contradict each other, or ask for what is left out.
    """
    m, n = shape
    if stored.transposed:
        scale = tensors["scales"].T
    else:
        scale = tensors["weight_scale"]
    half = 1 << (stored.bits - 1)
    xp = namespace(scale)
    if not bool(xp.all(scale >= 0)):
        raise ValueError(f"{name}: a scale is negative: the file is damaged")
    words = _stream(tensors, stored, shape, name)
    zero = _zeros(tensors, stored, m)
    order = None
    if "g_idx" in tensors:
        order = _order(tensors["g_idx"], stored.groups(n), name)
    if order is not None:
        words = pack(unpack(words, stored.bits, n)[:, order], stored.bits)
    symmetric = zero is None or bool(xp.all(zero == half))  # codes are stored as C either way
    granularity = ("channel", None) if stored.group_size is None else ("group", stored.group_size)
    scheme = Scheme(stored.bits, "half_integer" if symmetric else "asymmetric", *granularity)
    kept = None if symmetric else store_zero(zero, scheme, None)
    scale = xp.ascontiguousarray(scale)
    held = store_scale(scale, scale_dtype, name=f"{name}'s scale")
    held = xp.where(scale > 0, held, 0)  # some writers give groups of zeros a scale of zero
    made = (QuantizedLinear if order is None else ActOrderLinear)(
        words, held, kept, scheme, (m, n), getattr(xp, dtype)
    )
    if isinstance(made, ActOrderLinear):
        made.order = order
    if stored.activations:
        return W8A8Linear(made, name=f"the input of {name}")
    return made


def _order(g_idx: Array, groups: int, name: str) -> Array | None:
    """The order of the columns that puts groups together; None if it is their own."""
    xp = namespace(g_idx)
    columns = int(g_idx.shape[0])
    if bool(xp.all(g_idx == xp.arange(columns) // (columns // groups))):
        return None
    return column_order(g_idx, groups, name=name)


def _stream(
    tensors: Mapping[str, Array], stored: WeightLayout, shape: tuple[int, int], name: str
) -> Array:
    """C as a bit stream a row, uint32 [M, ⌈N·b/32⌉]."""
    m, n = shape
    if stored.layout == "pack-quantized":
        said = [int(size) for size in tensors["weight_shape"]]
        if said != [m, n]:
            raise ValueError(f"{name}: weight_shape says {said}, but the network needs {[m, n]}")
        return _words(tensors["weight_packed"])
    if not stored.transposed:
        return pack(bitcast(tensors["weight"], "uint8") + 128, 8)
    if stored.layout != "awq":
        return _words(tensors["qweight"].T)
    codes = _separated(tensors["qweight"])
    return pack(namespace(codes).ascontiguousarray(codes.T), 4)


def _zeros(tensors: Mapping[str, Array], stored: WeightLayout, rows: int) -> Array | None:
    """Z[M, G], int32; None where the layout stores none."""
    if stored.transposed:
        words = tensors["qzeros"]
        xp = namespace(words)
        if stored.layout == "awq":
            zeros = _separated(words)
        else:  # what was −1 came back as the largest code
            zeros = (unpack(_words(words), stored.bits, rows) + _lost(stored)) & (
                (1 << stored.bits) - 1
            )
        return xp.ascontiguousarray(xp.astype(zeros.T, xp.int32))
    if stored.symmetric:
        return None
    given = tensors["weight_zero_point"]
    xp = namespace(given)
    if stored.layout != "pack-quantized":
        return xp.astype(given, xp.int32) + 128
    return xp.ascontiguousarray(xp.astype(unpack(_words(given.T), stored.bits, rows).T, xp.int32))


def _separated(words: Array) -> Array:
    """AWQ's words, int32 [K, M/8] → codes[K, M], the inverse of ``_interleaved``."""
    xp = namespace(words)
    k, eighth = words.shape
    placed = xp.reshape(unpack(_words(words), 4, 8 * eighth), (k, eighth, 8))
    eights = xp.stack([placed[:, :, AWQ_ORDER.index(row)] for row in range(8)], axis=2)
    return xp.reshape(eights, (k, 8 * eighth))


def _words(tensor: Array) -> Array:
    """int32 words as the uint32 that ``packing`` speaks."""
    xp = namespace(tensor)
    return bitcast(xp.ascontiguousarray(tensor), xp.uint32)
