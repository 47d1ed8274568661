"""Byte layouts: each bit where its definition puts it, equal to the libraries' own packing,
and back again.
"""

from __future__ import annotations

import importlib.util
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import oracle, to_host
from refllm.formats.layouts import (
    AWQ_ORDER,
    LAYOUTS,
    WeightLayout,
    from_tensors,
    layout_for,
    tensor_specs,
    to_tensor,
    to_tensors,
)
from refllm.formats.quantized_linear import ActOrderLinear, QuantizedLinear, column_order, quantize
from refllm.formats.uniform import Scheme
from refllm.formats.w8a8_linear import W8A8Linear
from strategies import seeds

GOLDEN = Path(__file__).parents[1] / "golden" / "layouts.npz"
_spec = importlib.util.spec_from_file_location("make_layouts", GOLDEN.with_name("make_layouts.py"))
assert _spec is not None
assert _spec.loader is not None
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)

M = 32
N = 96
SCHEMES = [
    Scheme(b, rule, *g)
    for b, rule, g in product(
        (2, 3, 4, 8),
        (
            "half_integer",
            "restricted",
            "half_integer_unsigned",
            "power",
            "asymmetric",
            "asymmetric_signed",
            "awq",
        ),
        (("group", 32), ("channel", None), ("tensor", None)),
    )
]


def fits(scheme: Scheme, layout: str, activations: bool) -> bool:
    try:
        layout_for(scheme, layout, activations=activations)
    except ValueError:
        return False
    return True


HELD = [
    (s, layout, a)
    for s in SCHEMES
    for layout in LAYOUTS
    for a in (False, True)
    if fits(s, layout, a)
]


def weight(seed: int, xp=np, m=M, n=N):
    return xp.asarray(np.random.default_rng(seed).standard_normal((m, n)).astype("float32") - 0.1)


def read_bits(words: np.ndarray, bits: int, count: int) -> list[int]:
    """Codes of a row of 32-bit words, as the definition has it: one Python int of all bits."""
    whole = sum(
        int(word) << (32 * i) for i, word in enumerate(np.asarray(words).view(np.uint32).tolist())
    )
    return [(whole >> (bits * i)) & ((1 << bits) - 1) for i in range(count)]


def there_and_back(w, stored: WeightLayout, **more):
    tensors = to_tensors(w, stored)
    specs = tensor_specs(stored, w.shape)
    assert list(tensors) == list(specs)
    for suffix, tensor in tensors.items():
        kind, shape = specs[suffix]
        assert tuple(tensor.shape) == shape, suffix
        assert to_host(tensor).dtype == ("float16" if kind == "float" else kind), suffix
    wide = {s: t.astype("float32") if t.dtype == "float16" else t for s, t in tensors.items()}
    return from_tensors(wide, stored, w.shape, scale_dtype="float16", **more)


# --- there and back -----------------------------------------------------------------------


@pytest.mark.theorem(
    "each layout that holds a scheme gives the weight back: codes, scales (float16) and zero "
    "points, bit for bit",
    source="the formats' definitions",
)
@given(st.sampled_from(HELD), seeds)
def test_round_trip_of_every_scheme_in_every_layout_that_holds_it(xp, held, seed):
    scheme, layout, activations = held
    made = quantize(weight(seed, xp), scheme, scale_dtype="float16")
    written = W8A8Linear(made) if activations else made
    back = there_and_back(written, layout_for(scheme, layout, activations=activations))
    assert isinstance(back, W8A8Linear) == activations
    np.testing.assert_array_equal(to_host(back.dequantize()), to_host(made.dequantize()))


@given(seeds, st.sampled_from([8, 32]), st.sampled_from(["gptq", "gptq_v2"]))
def test_round_trip_of_reordered_groups(xp, seed, group, layout):
    rng = np.random.default_rng(seed)
    g_idx = rng.permutation(np.arange(N) // group).astype(np.int32)
    order = column_order(xp.asarray(g_idx), N // group)
    w = weight(seed, xp)
    made = quantize(w[:, order], Scheme(4, "half_integer", "group", group), scale_dtype="float16")
    act_order = ActOrderLinear(
        made._words, made._scale, made._zero, made.scheme, made.shape, made.dtype
    )
    act_order.order = order
    np.testing.assert_array_equal(to_host(act_order.g_idx), g_idx)
    np.testing.assert_array_equal(
        to_host(act_order.dequantize())[:, to_host(order)], to_host(made.dequantize())
    )
    x = xp.asarray(rng.standard_normal((3, N)).astype("float32"))
    product_ = to_host(x).astype("float64") @ to_host(act_order.dequantize()).astype("float64").T
    # N products of float32 are summed, in any order
    limit = 2 * N * 2.0**-24 * (np.abs(to_host(x)) @ np.abs(to_host(act_order.dequantize())).T)
    assert (np.abs(to_host(act_order.matmul(x)) - product_) <= limit).all()
    assert act_order.nbytes == made.nbytes + 4 * N
    back = there_and_back(act_order, layout_for(made.scheme, layout, act_order=True))
    np.testing.assert_array_equal(to_host(back.dequantize()), to_host(act_order.dequantize()))
    np.testing.assert_array_equal(to_host(back.g_idx), g_idx)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_scales_come_back_in_the_type_they_were_stored_in(xp, dtype):
    scheme = Scheme(4, "half_integer", "group", 32)
    made = quantize(weight(0, xp), scheme, scale_dtype=dtype)
    tensors = to_tensors(made, layout_for(scheme, "pack-quantized"), dtype=dtype)
    assert to_host(tensors["weight_scale"]).dtype == ("uint16" if dtype == "bfloat16" else dtype)
    back = from_tensors(
        tensors | {"weight_scale": made.scale},
        layout_for(scheme, "pack-quantized"),
        (M, N),
        scale_dtype=dtype,
    )
    assert back.nbytes == made.nbytes
    np.testing.assert_array_equal(to_host(back.dequantize()), to_host(made.dequantize()))


# --- each bit by definition ---------------------------------------------------------------


@pytest.mark.theorem(
    "pack-quantized: code q + 2^(b−1) of column i takes the bits [i·b, i·b + b) of its row, "
    "for 1 to 8 bits",
    source="compressed-tensors, pack_to_int32",
)
@pytest.mark.parametrize("bits", range(1, 9))
def test_pack_quantized_by_definition(bits):
    scheme = Scheme(bits, "half_integer", "channel")
    made = quantize(weight(bits, n=41), scheme)
    words = to_tensor(made, layout_for(scheme, "pack-quantized"), "weight_packed")
    for row, codes in zip(words, made.codes, strict=True):
        assert read_bits(row, bits, 41) == [int(q) + (1 << (bits - 1)) for q in codes]


@pytest.mark.theorem(
    "GPTQ: code of (o, i) is number i of the bit stream that is column o of qweight; Z of "
    "(g, o) is number o of row g "
    "of qzeros, less 1 in version 1",
    source="AutoGPTQ, GPTQModel: QuantLinear",
)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_gptq_by_definition(bits, layout):
    scheme = Scheme(
        bits, "asymmetric" if layout == "gptq_v2" else "half_integer_unsigned", "group", 32
    )
    made = quantize(weight(bits), scheme)
    tensors = to_tensors(made, layout_for(scheme, layout))
    for o in range(M):
        assert (
            read_bits(np.ascontiguousarray(tensors["qweight"][:, o]), bits, N)
            == made.codes[o].tolist()
        )
    for g in range(N // 32):
        lost = layout == "gptq"
        assert read_bits(tensors["qzeros"][g], bits, M) == (made.zero_point[:, g] - lost).tolist()
    np.testing.assert_array_equal(tensors["g_idx"], np.arange(N) // 32)
    if bits == 4 and layout == "gptq":
        assert (tensors["qzeros"] == 0x77777777).all()


@pytest.mark.theorem(
    "AWQ GEMM: nibble n of word c of row i is the code of output 8c + (0 2 4 6 1 3 5 7)[n] "
    "and input i; zeros alike",
    source="AutoAWQ, WQLinear_GEMM",
)
def test_awq_by_definition():
    scheme = Scheme(4, "awq", "group", 32)
    made = quantize(weight(4), scheme)
    tensors = to_tensors(made, layout_for(scheme, "awq"))
    assert sorted(AWQ_ORDER) == list(range(8))
    order = [8 * c + k for c in range(M // 8) for k in (0, 2, 4, 6, 1, 3, 5, 7)]
    for i in range(N):
        assert read_bits(tensors["qweight"][i], 4, M) == made.codes[order, i].tolist()
    for g in range(N // 32):
        assert read_bits(tensors["qzeros"][g], 4, M) == made.zero_point[order, g].tolist()


# --- the libraries' own packing -----------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.theorem(
    "pack-quantized words = compressed-tensors' pack_to_int32, 1 to 8 bits, any row length",
    source="compressed-tensors 0.20",
)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("n", [1, 31, 32, 96])
def test_packing_equals_compressed_tensors(bits, n):
    torch = oracle("torch")
    helpers = oracle("compressed_tensors.compressors.pack_quantized.helpers")
    scheme = Scheme(bits, "half_integer", "channel")
    made = quantize(weight(bits, n=n), scheme)
    ours = to_tensor(made, layout_for(scheme, "pack-quantized"), "weight_packed")
    codes = torch.from_numpy(np.ascontiguousarray(made.codes))
    np.testing.assert_array_equal(helpers.pack_to_int32(codes, bits).numpy(), ours)
    back = helpers.unpack_from_int32(torch.from_numpy(ours), bits, torch.Size((M, n)))
    np.testing.assert_array_equal(back.numpy(), made.codes)


def golden_weight(name: str) -> tuple[QuantizedLinear, WeightLayout]:
    """The case's weight as ours, made of the codes that the script drew too."""
    case = golden.CASES[name]
    codes, scales, zeros, g_idx = golden.draw(case)
    order = np.argsort(g_idx, kind="stable")
    scheme = Scheme(case.bits, "asymmetric", "group", case.group)
    made = QuantizedLinear.from_codes(
        codes[:, order].astype(np.uint8), scales, zeros, scheme, scale_dtype="float16"
    )
    if case.act_order:
        made = ActOrderLinear(made._words, made._scale, made._zero, scheme, made.shape, made.dtype)
        made.order = order
    return made, layout_for(scheme, case.layout, act_order=case.act_order)


@pytest.mark.theorem(
    "qweight, qzeros, scales, g_idx = GPTQModel's (2, 3, 4, 8 bits, with g_idx) and AWQ's, "
    "word for word, and what is "
    "read of its files is the weight that it computes with",
    source="gptqmodel 7.6.0, recorded",
)
@pytest.mark.parametrize("name", golden.CASES)
def test_tensors_equal_gptqmodels(name):
    made, stored = golden_weight(name)
    with np.load(GOLDEN) as file:
        theirs = {
            key.partition("/")[2]: file[key] for key in file.files if key.startswith(f"{name}/")
        }
    back = theirs.pop("weight")
    ours = to_tensors(made, stored)
    assert set(ours) == set(theirs)
    for key in ours:
        np.testing.assert_array_equal(ours[key], theirs[key].astype(ours[key].dtype), err_msg=key)
    read = from_tensors(
        theirs | {"scales": theirs["scales"].astype("float32")},
        stored,
        made.shape,
        scale_dtype="float16",
    )
    np.testing.assert_array_equal(read.dequantize(), golden.weight_of(golden.CASES[name]))
    # it multiplies in float16: half a unit in the last place of 11 bits
    assert (np.abs(back - read.dequantize()) <= 2.0**-11 * np.abs(read.dequantize())).all()


# --- what is odd --------------------------------------------------------------------------


def test_version_one_reads_its_lost_zero_as_the_largest_code():
    made = quantize(np.abs(weight(0)), Scheme(4, "asymmetric", "group", 32))
    assert not made.zero_point.any()  # the case in which readers of version 1 disagree
    with pytest.raises(
        ValueError, match=r"gptq cannot hold asymmetric weights \(a zero point of 0 is lost\)"
    ):
        layout_for(made.scheme, "gptq")
    tensors = to_tensors(made, layout_for(made.scheme, "gptq_v2"))
    assert not tensors["qzeros"].any()
    tensors |= {
        "scales": tensors["scales"].astype("float32"),
        "qzeros": np.full_like(tensors["qzeros"], -1),
    }
    back = from_tensors(
        tensors, WeightLayout("gptq", 4, 32, symmetric=False), made.shape, scale_dtype="float16"
    )
    np.testing.assert_array_equal(back.zero_point, made.zero_point)
    np.testing.assert_array_equal(back.codes, made.codes)


@pytest.mark.parametrize("scale_dtype", [None, "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("layout", ["pack-quantized", "gptq", "gptq_v2", "awq"])
def test_scales_of_zero_and_negative_ones(xp, layout, scale_dtype):
    """A scale of zero is kept, though scales that are stored never round to zero."""
    scheme = Scheme(4, "half_integer", "group", 32)
    stored = layout_for(scheme, layout)
    tensors = to_tensors(quantize(weight(0, xp), scheme), stored)
    key = "scales" if stored.transposed else "weight_scale"
    at = (2, 3) if stored.transposed else (3, 2)  # row 3, the last of three groups

    def read(value):
        scale = to_host(tensors[key]).astype("float32")
        scale[at] = value
        changed = tensors | {key: xp.asarray(scale)}
        return from_tensors(changed, stored, (M, N), scale_dtype=scale_dtype, name="q_proj")

    back = to_host(read(0.0).dequantize())
    assert not back[3, 64:].any()
    assert back[3, :64].any()
    for bad in (-1.0, np.nan, np.inf, -np.inf, -1e-45):
        with pytest.raises(ValueError, match="q_proj: a scale is negative or not finite"):
            read(bad)


# --- asymmetric compressed-tensors weights, which are only read ---------------------------


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group", [8, None])
def test_packed_zero_points_are_read_column_by_column(xp, bits, group):
    """Z of (o, g) is number o of the stream that is column g of weight_zero_point; 13 rows
    end within a word.
    """
    m, n = 13, 24
    scheme = Scheme(bits, "asymmetric", *(("group", group) if group else ("channel",)))
    made = quantize(weight(bits, xp, m, n), scheme)
    stored = WeightLayout("pack-quantized", bits, group, symmetric=False)
    zeros = to_host(made.zero_point)
    words = np.zeros((-(-m * bits // 32), zeros.shape[1]), dtype=np.int64)
    for g in range(zeros.shape[1]):
        whole = sum(int(z) << (bits * o) for o, z in enumerate(zeros[:, g]))
        words[:, g] = [(whole >> (32 * i)) & (2**32 - 1) for i in range(words.shape[0])]
    tensors = {
        "weight_packed": made.packed().view(xp.int32),
        "weight_scale": made.scale,
        "weight_shape": xp.asarray(np.array([m, n])),
        "weight_zero_point": xp.asarray(words.astype(np.uint32).view(np.int32)),
    }
    specs = tensor_specs(stored, (m, n))
    assert {s: tuple(t.shape) for s, t in tensors.items()} == {s: v[1] for s, v in specs.items()}
    back = from_tensors(tensors, stored, (m, n))
    np.testing.assert_array_equal(to_host(back.zero_point), zeros)
    np.testing.assert_array_equal(to_host(back.dequantize()), to_host(made.dequantize()))
    assert back.nbytes == made.nbytes


@pytest.mark.oracle
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_packed_zero_points_are_those_of_compressed_tensors(bits):
    torch = oracle("torch")
    helpers = oracle("compressed_tensors.compressors.pack_quantized.helpers")
    made = quantize(weight(bits, m=13), Scheme(bits, "asymmetric_signed", "group", 32))
    zeros = torch.from_numpy(made.zero_point.astype(np.int8))
    tensors = {
        "weight_packed": made.packed().view(np.int32),
        "weight_scale": made.scale,
        "weight_shape": np.array([13, N]),
        "weight_zero_point": helpers.pack_to_int32(zeros, bits, packed_dim=0).numpy(),
    }
    back = from_tensors(tensors, WeightLayout("pack-quantized", bits, 32, False), (13, N))
    np.testing.assert_array_equal(back.dequantize(), made.dequantize())


@pytest.mark.parametrize("layout", ["int-quantized", "naive-quantized"])
def test_asymmetric_8_bit_weights_are_read(xp, layout):
    """Codes and zero points are int8; each is stored as what it is plus 128."""
    made = quantize(weight(0, xp), Scheme(8, "asymmetric_signed", "channel"))
    tensors = {
        "weight": made.codes,
        "weight_scale": made.scale,
        "weight_zero_point": xp.astype(made.zero_point, xp.int8),
    }
    stored = WeightLayout(layout, 8, symmetric=False)
    assert list(tensor_specs(stored, (M, N))) == list(tensors)
    back = from_tensors(tensors, stored, (M, N))
    assert isinstance(back, W8A8Linear) == (layout == "int-quantized")
    inner = back.weight if layout == "int-quantized" else back
    np.testing.assert_array_equal(to_host(inner.zero_point), to_host(made.zero_point) + 128)
    np.testing.assert_array_equal(to_host(back.dequantize()), to_host(made.dequantize()))


def test_zero_points_are_dropped_only_where_all_are_the_middle():
    made = quantize(weight(0), Scheme(4, "half_integer_unsigned", "group", 32))
    stored = WeightLayout("gptq_v2", 4, 32, symmetric=False)
    tensors = to_tensors(made, stored) | {"scales": made.scale.T}
    assert (tensors["qzeros"].view(np.uint32) == 0x88888888).all()
    same = from_tensors(tensors, stored, (M, N))
    assert same.scheme.rule == "half_integer"
    np.testing.assert_array_equal(same.dequantize(), made.dequantize())
    other = tensors["qzeros"].view(np.uint32).copy()
    other[2, 3] += 1  # row 24, the last group
    back = from_tensors(tensors | {"qzeros": other.view(np.int32)}, stored, (M, N))
    assert back.scheme.rule == "asymmetric"
    expected = np.full((M, 3), 8)
    expected[24, 2] = 9
    np.testing.assert_array_equal(back.zero_point, expected)


# --- which class, which type --------------------------------------------------------------


def test_an_order_is_kept_only_where_groups_need_it():
    scheme = Scheme(4, "half_integer", "group", 32)
    stored = WeightLayout("gptq_v2", 4, 32, act_order=True)
    tensors = to_tensors(quantize(weight(0), scheme), stored)
    tensors |= {"scales": tensors["scales"].astype("float32")}
    plain = from_tensors(tensors, stored, (M, N))
    assert type(plain) is QuantizedLinear
    np.testing.assert_array_equal(tensors["g_idx"], np.arange(N) // 32)
    swapped = tensors["g_idx"].copy()
    swapped[[31, 32]] = swapped[[32, 31]]  # the two columns at the first edge
    back = from_tensors(tensors | {"g_idx": swapped}, stored, (M, N))
    assert type(back) is ActOrderLinear
    np.testing.assert_array_equal(back.g_idx, swapped)
    np.testing.assert_array_equal(back.codes, plain.codes)
    scale = np.repeat(plain.scale, 32, axis=1)
    scale[:, [31, 32]] = scale[:, [32, 31]]
    np.testing.assert_array_equal(back.dequantize(), scale * back.codes)


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_one_scale_per_row_is_one_group(layout):
    made = quantize(weight(0), Scheme(4, "half_integer", "channel"))
    tensors = to_tensors(made, layout_for(made.scheme, layout))
    np.testing.assert_array_equal(tensors["g_idx"], np.zeros(N, np.int32))
    assert tensors["qzeros"].shape == (1, M // 8)


def test_the_weight_comes_back_in_the_dtype_that_is_asked_for():
    scheme = Scheme(8, "half_integer", "channel")
    made = quantize(weight(0), scheme)
    for layout, activations in (("naive-quantized", False), ("int-quantized", True)):
        stored = layout_for(scheme, layout, activations=activations)
        tensors = to_tensors(made, stored, dtype="float32")
        back = from_tensors(tensors, stored, (M, N), dtype="float64", name="q_proj")
        assert back.dequantize().dtype == np.float64
        exact = made.scale.astype("float64") * made.codes
        np.testing.assert_array_equal(back.dequantize(), exact)
    with pytest.raises(ValueError, match="the input of q_proj: holds NaN"):
        back.matmul(np.full((1, N), np.nan))


def test_a_scale_that_does_not_fit_its_type_is_named():
    scheme = Scheme(4, "half_integer", "channel")
    stored = layout_for(scheme, "pack-quantized")
    tensors = to_tensors(quantize(weight(0), scheme), stored, dtype="float32")
    tensors["weight_scale"][1] = 1e6
    with pytest.raises(ValueError, match=r"k_proj's scale: a scale of 1e\+06 does not fit float16"):
        from_tensors(tensors, stored, (M, N), scale_dtype="float16", name="k_proj")
    with pytest.raises(ValueError, match="scale: a scale of 1e\\+06 does not fit float16"):
        to_tensors(from_tensors(tensors, stored, (M, N)), stored)


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        (WeightLayout("awq", 4, 128), "awq, 4 bits, groups of 128"),
        (WeightLayout("pack-quantized", 3), "pack-quantized, 3 bits, one scale per row"),
        (
            WeightLayout("int-quantized", 8),
            "int-quantized, 8 bits, one scale per row, activations in 8 bits",
        ),
        (
            WeightLayout("fp8", 8, 128),
            "fp8, 8 bits, blocks of 128 × 128, activations in 8 bits",
        ),
        (
            WeightLayout("float-quantized", 8, weight_only=True),
            "float-quantized, 8 bits, one scale per row",
        ),
        (
            WeightLayout("float-quantized", 8),
            "float-quantized, 8 bits, one scale per row, activations in 8 bits",
        ),
    ],
)
def test_layouts_say_what_they_are(layout, text):
    assert str(layout) == text


@pytest.mark.parametrize(
    ("layout", "shape", "specs"),
    [
        (
            WeightLayout("pack-quantized", 3, 8, symmetric=False),
            (13, 24),
            {
                "weight_packed": ("int32", (13, 3)),
                "weight_scale": ("float", (13, 3)),
                "weight_shape": ("int64", (2,)),
                "weight_zero_point": ("int32", (2, 3)),
            },
        ),
        (
            WeightLayout("naive-quantized", 8, 12, symmetric=False),
            (13, 24),
            {
                "weight": ("int8", (13, 24)),
                "weight_scale": ("float", (13, 2)),
                "weight_zero_point": ("int8", (13, 2)),
            },
        ),
        (
            WeightLayout("gptq", 3),
            (32, 64),
            {
                "qweight": ("int32", (6, 32)),
                "qzeros": ("int32", (1, 3)),
                "scales": ("float", (1, 32)),
                "g_idx": ("int32", (64,)),
            },
        ),
        (
            WeightLayout("float-quantized", 8, 128),
            (130, 256),
            {"weight": ("float8_e4m3fn", (130, 256)), "weight_scale": ("float", (2, 2))},
        ),
        (
            WeightLayout("float-quantized", 8, 128, weight_only=True),
            (128, 130),
            {"weight": ("float8_e4m3fn", (128, 130)), "weight_scale": ("float", (1, 2))},
        ),
        (
            WeightLayout("float-quantized", 8),
            (3, 130),
            {"weight": ("float8_e4m3fn", (3, 130)), "weight_scale": ("float", (3, 1))},
        ),
        (
            WeightLayout("fp8", 8, 64),
            (65, 130),
            {"weight": ("float8_e4m3fn", (65, 130)), "weight_scale_inv": ("float", (2, 3))},
        ),
    ],
)
def test_names_and_shapes_of_tensors_by_hand(layout, shape, specs):
    assert tensor_specs(layout, shape) == specs


def test_a_tensor_that_the_layout_does_not_have():
    scheme = Scheme(4, "half_integer", "channel")
    with pytest.raises(ValueError, match="awq has no tensor 'bias'"):
        to_tensor(quantize(weight(0), scheme), layout_for(scheme, "awq"), "bias")


# --- what is rejected ---------------------------------------------------------------------


def test_tensors_that_contradict_each_other_are_rejected():
    scheme = Scheme(4, "half_integer", "group", 32)
    made = quantize(weight(0), scheme)
    stored = layout_for(scheme, "pack-quantized")
    tensors = to_tensors(made, stored)
    with pytest.raises(
        ValueError, match=r"weight_shape is \[32, 95\], but the network needs \[32, 96\]"
    ):
        from_tensors(tensors | {"weight_shape": np.array([32, 95])}, stored, (M, N))
    stored = layout_for(scheme, "gptq_v2")
    tensors = to_tensors(made, stored)
    uneven = np.zeros(N, np.int32)
    with pytest.raises(ValueError, match="g_idx does not put 32 columns into each of 3 groups"):
        from_tensors(tensors | {"g_idx": uneven}, stored, (M, N))


@pytest.mark.parametrize(
    ("scheme", "layout", "more", "sentence"),
    [
        (
            Scheme(3, "half_integer", "channel"),
            "awq",
            {},
            "3-bit weights, only 4-bit ones; what can: pack-quantized",
        ),
        (
            Scheme(5, "half_integer", "channel"),
            "gptq",
            {},
            "only those of 2, 3, 4 or 8 bits; what can: pack-quantized",
        ),
        (
            Scheme(4, "asymmetric", "channel"),
            "pack-quantized",
            {},
            r"readers fail on them\); what can: gptq_v2, awq",
        ),
        (Scheme(5, "asymmetric", "channel"), "gptq_v2", {}, "no layout can"),
        (
            Scheme(4, "half_integer", "block", 8),
            "gptq",
            {},
            "one scale per block; no layout can",
        ),
        (
            Scheme(8, "half_integer", "channel"),
            "gptq",
            {"activations": True},
            "what can: int-quantized",
        ),
        (
            Scheme(8, "half_integer", "channel"),
            "int-quantized",
            {},
            "not quantised; what can: pack-quantized, naive",
        ),
        (
            Scheme(8, "half_integer", "group", 8),
            "int-quantized",
            {"activations": True},
            "groups; no layout can",
        ),
        (
            Scheme(4, "half_integer", "group", 8),
            "pack-quantized",
            {"act_order": True},
            "what can: gptq_v2, gptq",
        ),
        (
            Scheme(4, "half_integer", "channel"),
            "gguf",
            {},
            "unknown layout 'gguf'; choose one of pack-quantized",
        ),
    ],
)
def test_what_a_layout_cannot_hold_is_rejected_with_what_can(scheme, layout, more, sentence):
    with pytest.raises(ValueError, match=sentence):
        layout_for(scheme, layout, **more)


def test_shapes_that_a_layout_has_no_words_for_are_rejected():
    assert tensor_specs(WeightLayout("awq", 4), (8, 31))["qweight"] == ("int32", (31, 1))
    for shape in ((32, 32), (64, 96)):
        tensor_specs(WeightLayout("gptq", 3), shape)
    for shape in ((16, 64), (64, 48), (33, 32)):
        with pytest.raises(ValueError, match="gptq packs 32 codes of 3 bits at once"):
            tensor_specs(WeightLayout("gptq", 3), shape)
    for layout, shape in (("awq", (12, 32)), ("gptq_v2", (32, 36)), ("gptq_v2", (12, 32))):
        with pytest.raises(
            ValueError, match=rf"o_proj: {layout} packs 8 codes .* pack-quantized takes any shape"
        ):
            tensor_specs(WeightLayout(layout, 4), shape, "o_proj")
    with pytest.raises(ValueError, match="o_proj: groups of 7 do not divide its 32 columns"):
        tensor_specs(WeightLayout("pack-quantized", 4, 7), (8, 32), "o_proj")
