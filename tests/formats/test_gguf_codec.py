"""GGUF's block formats: golden digests, ggml's and gguf's bytes, what repeats and what does
not, what is rejected.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from conftest import ROOT, oracle, to_host
from gguf_data import (
    BLOCKS,
    DIGESTS,
    FLOATS,
    K_QUANTS,
    LEGACY,
    SPECIAL,
    USUAL,
    digest,
    edge_inputs,
    ggml_quantize,
    golden_importance,
    golden_input,
    importances,
    matrices,
)
from refllm.formats.gguf import codec
from refllm.formats.gguf.codec import dequantize, quantize
from refllm.formats.gguf.nonlinear import VALUES
from refllm.formats.gguf.types import FIELDS, TYPES, row_bytes
from strategies import build, seeds


def encode(xp, x, type, importance=None):
    return to_host(
        quantize(xp.asarray(x), type, None if importance is None else xp.asarray(importance))
    )


def decode(raw, type):
    return dequantize(raw, type)


# --- the bytes ----------------------------------------------------------------------------


def test_the_golden_input_is_what_the_digests_were_made_of():
    assert (digest(golden_input()), digest(golden_importance())) == ("06fa75bb3ea9", "63fabbd6be2d")


@pytest.mark.theorem(
    "Encoders give llama.cpp's bytes, with and without importance", source="ggml's quantisers"
)
@pytest.mark.parametrize("type", BLOCKS)
def test_golden_digests(xp, type):
    x = golden_input()
    w = golden_importance()
    assert (digest(encode(xp, x, type)), digest(encode(xp, x, type, w))) == DIGESTS[type]


@pytest.mark.parametrize("name", edge_inputs())
def test_golden_digests_of_edges(xp, name):
    """Ties, zeros of both signs, denormals, the ends of float32: recorded by
    ``tests/golden/make_gguf.py``.
    """
    x = edge_inputs()[name]
    w = golden_importance()
    for type, recorded in json.loads((ROOT / "tests" / "golden" / "gguf.json").read_text())[
        name
    ].items():
        found = [digest(encode(xp, x, type, weights)) for weights in (None, w)[: len(recorded)]]
        assert found == recorded, type


@pytest.mark.parametrize(
    "type", ["Q4_K", "Q3_K", "Q4_0", "Q5_1", "Q8_0", "MXFP4", "IQ4_NL", "BF16"]
)
def test_pieces_change_no_byte(type, monkeypatch):
    x = golden_input()
    w = golden_importance()
    whole = quantize(x, type)
    weighted = quantize(x, type, w)
    monkeypatch.setattr(codec, "TILE", (512, 512))
    np.testing.assert_array_equal(quantize(x, type), whole)
    np.testing.assert_array_equal(quantize(x, type, w), weighted)
    np.testing.assert_array_equal(
        dequantize(whole, type), np.concatenate([dequantize(r[None], type) for r in whole])
    )


@pytest.mark.llamacpp
@settings(max_examples=60)
@given(matrices(), st.none() | importances(), st.sampled_from(BLOCKS))
def test_bytes_equal_ggmls(x, importance, type):
    np.testing.assert_array_equal(quantize(x, type, importance), ggml_quantize(x, type, importance))


@pytest.mark.llamacpp
@pytest.mark.parametrize("type", BLOCKS)
def test_bytes_equal_ggmls_where_float32_ends(type):
    """Sums and scales overflow, and and the result is infinite or NaN: equal all the
    same.
    """
    for seed in range(5):
        for x in (
            build("extreme", (2, 512), seed),
            build("normal", (2, 512), seed) * np.float32(1e37),
        ):
            np.testing.assert_array_equal(quantize(x, type), ggml_quantize(x, type))


@pytest.mark.oracle
@given(
    matrices(kinds=("normal", "one_sided", "ties", "signed_zeros", "zero", "sparse")),
    st.sampled_from(BLOCKS),
)
def test_decoding_equals_ggufs(xp, x, type):
    gguf = oracle("gguf")
    raw = quantize(x, type)
    theirs = gguf.quants.dequantize(raw, getattr(gguf.GGMLQuantizationType, type))
    ours = to_host(dequantize(xp.asarray(raw), type))
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


@pytest.mark.oracle
@given(seeds, st.sampled_from(BLOCKS))
def test_decoding_any_bytes_equals_ggufs(seed, type):
    """Files may hold any codes and scales, not only those that an encoder writes; scales are
    kept finite here.
    """
    gguf = oracle("gguf")
    raw = np.random.default_rng(seed).integers(0, 256, (3, row_bytes(type, 512)), dtype=np.uint8)
    with np.errstate(all="ignore"):
        theirs = gguf.quants.dequantize(raw, getattr(gguf.GGMLQuantizationType, type))
    finite = np.isfinite(theirs)
    np.testing.assert_array_equal(dequantize(raw, type)[finite], theirs[finite])
    np.testing.assert_array_equal(np.isfinite(dequantize(raw, type)), finite)


@pytest.mark.oracle
@given(
    matrices(kinds=("normal", "one_sided", "ties", "sparse", "sign_runs", "outlier_column")),
    st.sampled_from((*LEGACY, *FLOATS, "MXFP4")),
)
def test_encoding_equals_ggufs_where_it_encodes(x, type):
    gguf = oracle("gguf")
    theirs = gguf.quants.quantize(x, getattr(gguf.GGMLQuantizationType, type))
    np.testing.assert_array_equal(quantize(x, type), theirs.view(np.uint8).reshape(x.shape[0], -1))


def test_q8_0_of_a_block_whose_largest_value_is_127(xp):
    """d = 1, so codes are the values, halves rounded away from zero; bytes as gguf's."""
    values = [127, -127, 0.5, -0.5, 1.5, -1.5, 2.5, 126.5, -126.5, 0.49999997, -0.49999997, 1]
    codes = [127, -127, 1, -1, 2, -2, 3, 127, -127, 0, 0, 1]
    x = np.zeros((2, 32), np.float32)
    x[0, :12] = values
    x[1, 31] = -127  # the largest size is that of a negative value
    raw = encode(xp, x, "Q8_0")
    np.testing.assert_array_equal(raw[:, :2], [[0x00, 0x3C]] * 2)
    np.testing.assert_array_equal(raw[0, 2:].view(np.int8), codes + [0] * 20)
    np.testing.assert_array_equal(raw[1, 2:].view(np.int8), [0] * 31 + [-127])


@pytest.mark.theorem(
    "IQ4_NL's codes are the values nearest to x/s, of two the upper one, and s is the best of "
    "sixteen scales for Σ w (x − s·v)²",
    source="ggml's quantiser",
)
@given(
    matrices(columns=64, kinds=("normal", "outlier_column", "one_sided", "ties", "sign_runs")),
    st.none() | importances(columns=64),
)
def test_iq4_nl_by_definition(xp, x, importance):
    """Block by block in float64: the sixteen candidates, each code by looking at all values."""
    values = np.array(VALUES, dtype=np.float64)
    upper = values[::-1]  # argmin takes the first of two that are equally near
    raw = encode(xp, x, "IQ4_NL", importance).reshape(-1, 18)
    weights = np.ones_like(x) if importance is None else np.broadcast_to(importance, x.shape)
    for block, w, data in zip(x.reshape(-1, 32), weights.reshape(-1, 32), raw, strict=True):
        block = block.astype(np.float64)
        if importance is None:
            w = block**2
        else:
            w = w * np.sqrt(2 * np.mean(block**2) + block**2)

        def nearest(t):
            return upper[np.abs(t[:, None] - upper).argmin(axis=1)]

        largest = block[np.abs(block).argmax()]
        if largest == 0:
            continue
        scores = []
        for inverse in (-127 / -largest, *((i - 127) / largest for i in range(-7, 8))):
            v = nearest(block * inverse)
            scores.append(((w * v * block).sum(), (w * v * v).sum()))
        d = float(data[:2].view(np.float16)[0])
        v = values[np.concatenate([data[2:] & 15, data[2:] >> 4])]
        best = max((sx * sx / sq for sx, sq in scores if sq > 0), default=0.0)
        # the codes are made once more with the scale: they can only come nearer
        error = (w * (block - d * v) ** 2).sum()
        total = (w * block**2).sum()
        assert error <= total - best + 1e-3 * total
        if d != 0 and abs(d) >= 2.0**-14:
            assert np.abs(block / d - v).max() <= np.abs(block / d - nearest(block / d)).max() + 0.1


def test_iq4_nl_of_a_block_of_its_own_values(xp):
    """Values times −½ have the extreme 63.5: the first candidate finds the scale −½ exactly."""
    x = np.zeros((1, 64), np.float32)
    x[0, :16] = np.array(VALUES) * -0.5
    x[0, 32:48] = np.array(VALUES[::-1]) * 0.25
    raw = encode(xp, x, "IQ4_NL").reshape(2, 18)
    assert [float(b[:2].view(np.float16)[0]) for b in raw] == [-0.5, 0.25]
    codes = np.arange(16)
    np.testing.assert_array_equal(raw[0, 2:], codes | 0x80)  # 0 is code 8: the value 1
    np.testing.assert_array_equal(raw[1, 2:], codes[::-1] | 0x80)
    np.testing.assert_array_equal(decode(raw.reshape(1, -1), "IQ4_NL")[0, :16], x[0, :16])


@pytest.mark.parametrize("divisor", [1, 2, 3, 127, 1024])
def test_q8_0_of_other_blocks_by_definition(xp, divisor):
    """d = largest/127 and d's inverse are float32, the product is rounded half away from 0."""
    x = (np.arange(-64, 64, dtype=np.float32) * 1.984375 / np.float32(divisor)).reshape(2, 64)
    blocks = x.reshape(4, 32)
    d = np.abs(blocks).max(axis=1) / np.float32(127)
    t = blocks * (np.float32(1) / d)[:, None]
    codes = np.trunc(t.astype(np.float64) + np.copysign(0.5, t)).astype(np.int8)
    raw = encode(xp, x, "Q8_0").reshape(4, 34)
    np.testing.assert_array_equal(raw[:, 2:].view(np.int8), codes)
    np.testing.assert_array_equal(
        np.ascontiguousarray(raw[:, :2]).view(np.float16)[:, 0], d.astype(np.float16)
    )


@pytest.mark.parametrize(
    ("type", "largest", "beyond"),
    [("F16", 0x7BFF, 0x7C00), ("BF16", 0x7F7F, 0x7F80)],
)
def test_16_bit_floats_at_the_end_of_their_range(xp, type, largest, beyond):
    """The largest value, the value below the tie above it, the tie; both signs."""
    top = {"F16": 65504.0, "BF16": 2.0**128 * (1 - 2.0**-8)}[type]
    tie = np.float32({"F16": 65520.0, "BF16": 2.0**128 * (1 - 2.0**-9)}[type])
    x = np.array([[top, np.nextafter(tie, np.float32(0)), tie, -top, -tie, 0.0, -0.0, 1e-45]])
    raw = encode(xp, x.astype(np.float32), type)
    minus = 0x8000
    codes = [largest, largest, beyond, largest | minus, beyond | minus, 0, minus, 0]
    np.testing.assert_array_equal(raw.view(np.uint16)[0], codes)


# --- again --------------------------------------------------------------------------------


def steps(raw, type):
    """float32 [R, B, 1 or 2]: scale, and offset, of each block of a legacy type."""
    blocks = raw.reshape(raw.shape[0], -1, TYPES[type].size)
    count = 4 if type.endswith("_1") else 2
    return np.ascontiguousarray(blocks[:, :, :count]).view(np.float16).astype(np.float32)


def levels(raw, type):
    """float32 [R, B, 2^bits]: the values that a block's codes can have."""
    codes = np.arange(16 if type == "Q4_1" else 32, dtype=np.float32)
    d, m = (steps(raw, type)[..., i, None] for i in (0, 1))
    with np.errstate(all="ignore"):
        return d * codes + m


def repeats(x, type):
    """The exact condition, by block [R, B]: is the block encoded to the same bytes again
    after it was decoded?

    A stored scale that is 0 though the numbers are not has lost them. With an offset it must
    be told from the levels q·d + m, which are rounded to float32: they give back d, and
    each code that is used.
    """
    raw = quantize(x, type)
    blocks = x.reshape(x.shape[0], -1, 32)
    d = steps(raw, type)[..., 0]
    if not type.endswith("_1"):
        codes = raw.reshape(*d.shape, -1)[..., 2:]
        nothing = codes == quantize(np.zeros((1, 32), np.float32), type)[0, 2:]
        return np.isfinite(d) & ((d != 0) | nothing.all(axis=2))
    m = steps(raw, type)[..., 1]
    known = levels(raw, type)
    with np.errstate(all="ignore"):
        told = (known[..., -1] - m) / np.float32(known.shape[-1] - 1)
        codes = np.trunc((known - m[..., None]) * (1 / told)[..., None] + np.float32(0.5))
        same = (told.astype(np.float16).astype(np.float32) == d) & (d != 0)
        back = dequantize(raw, type).reshape(blocks.shape)
    right = codes == np.arange(known.shape[-1])
    used = (back[..., None] == known[..., None, :]).any(axis=2)
    constant = blocks.max(axis=2) == blocks.min(axis=2)
    minus = (m == 0) & np.signbit(m)  # d·0 + (−0) = +0
    return (
        np.isfinite(d) & np.isfinite(m) & ~minus & (constant | (same & (right | ~used).all(axis=2)))
    )


@pytest.mark.theorem(
    "Q4_0, Q5_0 and Q8_0: quantize(dequantize(quantize(x))) = quantize(x) exactly where the "
    "stored scale is finite, and not 0 "
    "unless all codes are those of zeros; Q4_1 and Q5_1: where the levels q·d + m, rounded "
    "to float32, give back d and "
    "each q that is used",
    source="ggml's quantisers; the condition is refllm's",
)
@settings(max_examples=100)
@given(matrices(columns=64, kinds=(*USUAL, *SPECIAL, "offset")), st.sampled_from(LEGACY))
def test_legacy_types_repeat_exactly_where_the_scale_survives(x, type):
    raw = quantize(x, type)
    expected = repeats(x, type)
    back = dequantize(raw, type)
    finite = np.isfinite(back.reshape(*expected.shape, 32)).all(axis=2)
    again = quantize(np.where(np.isfinite(back), back, 0), type)
    same = (raw.reshape(*expected.shape, -1) == again.reshape(*expected.shape, -1)).all(axis=2)
    np.testing.assert_array_equal(same & finite, expected)


@pytest.mark.theorem(
    "Q4_1 and Q5_1 repeat where d ≠ 0, m is finite and not −0, and the levels q·d + m are exact in "
    "float32",
    source="float32 arithmetic",
)
@given(matrices(columns=64, kinds=(*USUAL, *SPECIAL, "offset")), st.sampled_from(["Q4_1", "Q5_1"]))
def test_exact_levels_repeat(x, type):
    raw = quantize(x, type)
    d, m = (steps(raw, type)[..., i].astype(np.float64) for i in (0, 1))
    with np.errstate(all="ignore"):
        true = d[..., None] * np.arange(levels(raw, type).shape[-1]) + m[..., None]
        exact = (
            (true == levels(raw, type)).all(axis=2)
            & np.isfinite(d + m)
            & (d != 0)
            & ~((m == 0) & np.signbit(m))
        )
    assert (repeats(x, type) | ~exact).all()


def test_where_idempotence_breaks():
    """A scale that rounds to 0; an offset in whose float32 the levels are not where the scale
    puts them.
    """
    tiny = np.linspace(-1e-7, 1e-7, 32, dtype=np.float32)[None]
    for type in ("Q8_0", "Q4_0", "Q5_0"):
        assert not repeats(tiny, type).any()
    u = np.spacing(np.float32(1.5))
    # a scale of u/3, a float32 is u
    near = (np.float32(1.552804) + np.arange(32) % 6 * u)[None].astype(np.float32)
    assert steps(quantize(near, "Q4_1"), "Q4_1")[..., 0] != 0
    assert (
        quantize(dequantize(quantize(near, "Q4_1"), "Q4_1"), "Q4_1").tobytes()
        != quantize(near, "Q4_1").tobytes()
    )


@pytest.mark.theorem(
    "MXFP4: quantize(dequantize(quantize(x))) = quantize(x) where the largest value is at "
    "least 2^−125",
    source="OCP MX 1.0; ggml",
)
@given(
    matrices(
        columns=64,
        kinds=("normal", "one_sided", "ties", "sparse", "zero", "tiny_steps", "outlier_column"),
    )
)
def test_mxfp4_repeats(x):
    raw = quantize(x, "MXFP4")
    np.testing.assert_array_equal(quantize(dequantize(raw, "MXFP4"), "MXFP4"), raw)


AGAIN = {"Q2_K": 0.92, "Q3_K": 0.58, "Q4_K": 0.965, "Q5_K": 0.78, "Q6_K": 0.78}


@pytest.mark.parametrize("type", K_QUANTS)
def test_k_quants_do_not_repeat(type):
    """Recorded fact: the search may find another fit for its own output. The share of
    blocks that come out the same.
    """
    # a few large numbers, as in weights
    x = np.random.default_rng(0).standard_t(3, size=(16, 4096)).astype(np.float32)
    raw = quantize(x, type).reshape(-1, TYPES[type].size)
    again = quantize(dequantize(raw.reshape(16, -1), type), type).reshape(raw.shape)
    share = float((raw == again).all(axis=1).mean())
    assert share < 1
    assert share == pytest.approx(AGAIN[type], abs=0.06)


# --- errors -------------------------------------------------------------------------------


@pytest.mark.theorem(
    "|x − x̂| ≤ 0.563 d for Q8_0; ≤ 1.01 d for Q4_0 and Q5_0 (the opposite extreme is "
    "clipped); ≤ 0.52 d and half a "
    "float16 ulp of m for Q4_1 and Q5_1",
    source="ggml",
)
@given(
    matrices(columns=64, kinds=("normal", "one_sided", "outlier_column", "sparse", "sign_runs")),
    st.sampled_from(LEGACY),
)
def test_errors_of_the_legacy_types(x, type):
    raw = quantize(x, type)
    d = steps(raw, type)
    error = np.abs(dequantize(raw, type) - x).reshape(x.shape[0], -1, 32)
    # half a scale, and 2⁻¹¹ of the float16 scale times the largest code: 127, 16, 8; an extreme
    # that has no code: one scale
    bound = {"Q8_0": 0.563, "Q4_0": 1.01, "Q5_0": 1.01, "Q4_1": 0.52, "Q5_1": 0.52}[type] * np.abs(
        d[..., 0]
    )
    if type.endswith("_1"):
        bound = bound + 2.0**-11 * np.abs(d[..., 1])
    assert (error <= bound[..., None] + 2.0**-25).all()


RMSE = {
    "Q2_K": 0.297,
    "Q3_K": 0.152,
    "Q4_0": 0.0864,
    "Q4_1": 0.0784,
    "Q4_K": 0.0716,
    "Q5_0": 0.0429,
    "Q5_1": 0.0381,
    "Q5_K": 0.0364,
    "Q6_K": 0.0178,
    "Q8_0": 0.0054,
    "MXFP4": 0.116,
    "IQ4_NL": 0.077,
}


@pytest.mark.parametrize("type", BLOCKS)
def test_relative_errors_on_normal_numbers(type):
    """The figures of ggml's encoders; two digits are theirs, the third is chance."""
    x = build("normal", (16, 4096), 1)
    error = np.sqrt(np.mean((dequantize(quantize(x, type), type) - x) ** 2) / np.mean(x**2))
    assert error == pytest.approx(RMSE[type], rel=0.02)


def normal_halves(raw: np.ndarray, type: str) -> bool:
    """Whether the float16 scales and offsets of all blocks are 0 or normal values."""
    blocks = raw.reshape(-1, TYPES[type].size)
    at = 0
    found = []
    for field in FIELDS[type]:
        if field.role in ("step", "offset") and field.size == 2:
            found.append(
                np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)
            )
        at += field.size
    sizes = np.abs(np.concatenate([f.reshape(-1) for f in found])) if found else np.zeros(0)
    return bool(np.all((sizes == 0) | ((sizes >= 2.0**-14) & np.isfinite(sizes))))


@pytest.mark.theorem(
    "quantize(2x) is quantize(x) with scales and offsets doubled, while these are normal "
    "float16 values",
    source="powers of two are exact",
)
@given(
    matrices(kinds=("normal", "one_sided", "outlier_column")),
    st.sampled_from(BLOCKS),
    st.integers(-3, 3),
)
def test_powers_of_two_pass_through(x, type, power):
    factor = np.float32(2.0**power)
    raw = {1.0: quantize(x, type), float(factor): quantize(x * factor, type)}
    assume(all(normal_halves(r, type) for r in raw.values()))
    np.testing.assert_array_equal(
        dequantize(raw[float(factor)], type), dequantize(raw[1.0], type) * factor
    )


@pytest.mark.theorem(
    "quantize(−x) dequantises to −dequantize(quantize(x)) for Q4_0, Q5_0, Q8_0 and Q6_K; not "
    "for Q3_K and Q4_K",
    source="ggml's quantisers",
)
@given(matrices(kinds=("normal", "outlier_column", "sign_runs")))
def test_signs_pass_through_where_the_scale_is_signed(x):
    for type in ("Q4_0", "Q5_0", "Q6_K"):
        np.testing.assert_array_equal(
            dequantize(quantize(-x, type), type), -dequantize(quantize(x, type), type)
        )
    np.testing.assert_array_equal(
        dequantize(quantize(-x, "Q8_0"), "Q8_0"), -dequantize(quantize(x, "Q8_0"), "Q8_0")
    )


def test_signs_do_not_pass_through_elsewhere():
    x = build("normal", (4, 512), 3)
    for type in ("Q3_K", "Q4_K"):
        assert (dequantize(quantize(-x, type), type) != -dequantize(quantize(x, type), type)).any()


def test_importance_moves_the_error_to_where_it_costs_nothing():
    x = build("normal", (16, 512), 5)
    w = np.where(np.arange(512) % 2, np.float32(100), np.float32(0.01))
    for type in (*K_QUANTS, "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL"):
        plain, weighted = ((dequantize(quantize(x, type, i), type) - x) ** 2 @ w for i in (None, w))
        assert weighted.sum() < plain.sum(), type


# --- fields -------------------------------------------------------------------------------

# What a byte of a field holds, by the sentence that the figure shows: byte → numbers of the
# block
HOLDS = {
    "low half: number j, high half: number j + 16": lambda j: {j, j + 16},
    "bit i of the 32: number i": lambda j: set(range(8 * j, 8 * j + 8)),
    "number j, signed": lambda j: {j},
    "byte 32c + l: numbers 64c + l and 64c + 32 + l": lambda j: {
        j // 32 * 64 + j % 32 + t for t in (0, 32)
    },
    "byte 32h + l: numbers 128h + l + 0, 32, 64, 96": lambda j: {
        j // 32 * 128 + j % 32 + t for t in (0, 32, 64, 96)
    },
    "byte 32h + l: 128h + l + 0, 32, 64, 96": lambda j: {
        j // 32 * 128 + j % 32 + t for t in (0, 32, 64, 96)
    },
    "byte l, bit t: number 32t + l": lambda j: set(range(j, 256, 32)),
    "byte 64h + l: numbers 128h + l and 128h + 64 + l": lambda j: {
        j // 64 * 128 + j % 64 + t for t in (0, 64)
    },
}


@pytest.mark.theorem(
    "A byte of a block's codes changes the numbers that its field names, and no others",
    source="ggml's block structures",
)
@given(st.sampled_from(list(FIELDS)), seeds)
def test_fields_hold_what_they_document(type, seed):
    rng = np.random.default_rng(seed)
    at = 0
    raw = quantize(
        rng.uniform(1, 2, (1, TYPES[type].block)).astype(np.float32) * rng.choice([-1, 1]), type
    )
    plain = decode(raw, type)[0]
    for field in FIELDS[type]:
        place = int(rng.integers(field.size))
        changed = raw.copy()
        changed[0, at + place] ^= 0xFF
        with np.errstate(all="ignore"):
            numbers = set(np.flatnonzero(decode(changed, type)[0] != plain).tolist())
        if field.holds in HOLDS:
            assert numbers <= HOLDS[field.holds](place)
            assert len(numbers) >= len(HOLDS[field.holds](place)) - 1  # −0 and 0 of MXFP4 are equal
        elif field.role == "scales" and field.size == 16:  # one sub-block of 16 each
            assert numbers <= set(range(16 * place, 16 * place + 16))
        else:
            assert field.role in ("step", "offset", "scales")
        at += field.size
    assert at == TYPES[type].size


def test_without_a_scale_only_the_offset_is_left():
    x = build("normal", (1, 256), 0)
    for type, fields in FIELDS.items():
        raw = quantize(x, type).reshape(-1, TYPES[type].size)
        at = 0
        for field in fields:
            if field.role == "step" or (field.role == "offset" and type.endswith("_K")):
                raw[:, at : at + field.size] = 0
            at += field.size
        values = np.abs(decode(raw.reshape(1, -1), type)).reshape(-1, TYPES[type].block)
        assert (values.max(axis=1) < 1e-30).all() or (
            type.endswith("_1") and (np.ptp(values, axis=1) == 0).all()
        ), type


# --- plain floats, edges, rejections --------------------------------------------------------


def test_zeros(xp):
    """What each type stores for zeros; −0 counts as 0."""
    for zeros in (np.zeros((1, 256), np.float32), np.full((1, 256), -0.0, np.float32)):
        for type in BLOCKS:
            raw = encode(xp, zeros, type)
            assert not decode(raw, type).any()
            block = raw[0, : TYPES[type].size].tobytes()
            if type == "Q4_0":
                assert block == bytes.fromhex("0080") + b"\x88" * 16  # d = 0/−8 = −0
            elif type == "Q5_0":
                assert block == bytes.fromhex("0080") + b"\xff" * 4 + b"\x00" * 16
            elif type == "IQ4_NL":
                assert block == bytes(2) + b"\x88" * 16  # 1 is the value nearest to 0
            elif not np.signbit(zeros).any() or not type.endswith(
                "_1"
            ):  # the offset keeps the sign of a zero
                assert not any(block), type
            weighted = encode(xp, zeros, type, np.ones(256, np.float32))
            assert not decode(weighted, type).any()
            assert not weighted.any() or np.signbit(zeros).any() or type == "IQ4_NL"


@given(st.integers(0, 2**32 - 1))
def test_bfloat16_is_the_nearest_upper_half(xp, bits):
    x = np.array([[bits]], dtype=np.uint32).view(np.float32)
    if np.isfinite(x).all():
        back = decode(encode(xp, x, "BF16"), "BF16")
        low = (np.uint32(bits) & np.uint32(0xFFFF0000)).reshape(1, 1).view(np.float32)
        high = (
            (np.uint32(min(bits | 0xFFFF, 2**32 - 2)) + np.uint32(1)).reshape(1, 1).view(np.float32)
        )
        wide = np.abs(np.array([back, low, high], dtype=np.float64) - np.float64(x))
        assert np.isinf(back).all() or wide[0] <= wide[1:].min()


def test_a_scale_beyond_float16_is_infinite_or_rejected():
    x = build("normal", (2, 256), 0)
    x[1] *= 1e9
    assert np.isinf(steps(quantize(x, "Q8_0"), "Q8_0")[1]).all()
    with pytest.raises(
        ValueError,
        match=r"Q4_K cannot hold row 1 near column 0: its scale, for values up to .*65504",
    ):
        quantize(x, "Q4_K", overflow="raise")
    assert (quantize(x[:1], "Q4_K", overflow="raise") == quantize(x, "Q4_K")[:1]).all()
    x = build("normal", (3, 512), 0)
    x[2, 300] = 1e12  # in the last row's second block of 256, and its tenth of 32
    for type, column in (("Q4_K", 256), ("Q6_K", 256), ("Q8_0", 288), ("Q4_1", 288)):
        with pytest.raises(ValueError, match=f"{type} cannot hold row 2 near column {column}:"):
            quantize(x, type, overflow="raise")
    assert not np.isfinite(dequantize(quantize(x, "Q8_0"), "Q8_0")).all()


@pytest.mark.parametrize(
    ("type", "value", "message"),
    [
        (
            "F16",
            -65520.0,
            "F16 cannot hold row 1, column 3: -65520 is beyond its largest value, 65504",
        ),
        (
            "BF16",
            3.4e38,
            "BF16 cannot hold row 1, column 3: 3.4e[+]38 is beyond .* 3.39e38; choose F32",
        ),
    ],
)
def test_16_bit_floats_say_their_own_overflow(xp, type, value, message):
    x = np.ones((2, 5), np.float32)
    x[1, 3] = value
    with pytest.raises(ValueError, match=message):
        quantize(xp.asarray(x), type, overflow="raise")
    x[1, 3] = 65504.0
    quantize(xp.asarray(x), type, overflow="raise")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_rejected_with_their_index(xp, bad):
    x = np.zeros((3, 256), np.float32)
    x[2, 17] = bad
    for type in TYPES:
        with pytest.raises(
            ValueError, match=r"quantize: x: holds NaN or infinity, first at index \(2, 17\)"
        ):
            quantize(xp.asarray(x), type)
    with pytest.raises(
        ValueError, match=r"importance: holds NaN or infinity, first at index \(17,\)"
    ):
        quantize(xp.asarray(np.zeros((1, 256), np.float32)), "Q4_K", xp.asarray(x[2]))


def test_invalid_arguments_are_rejected(xp):
    x = xp.asarray(np.zeros((2, 96), np.float32))
    with pytest.raises(
        ValueError, match="Q4_K stores blocks of 256 elements, which do not divide a row of 96"
    ):
        quantize(x, "Q4_K")
    with pytest.raises(ValueError, match="unknown GGUF type 'Q4_K_M'; choose one of F32"):
        quantize(x, "Q4_K_M")
    with pytest.raises(ValueError, match=r"float matrix \[R, K\], got float32 \(192,\)"):
        quantize(xp.reshape(x, (192,)), "Q4_0")
    with pytest.raises(ValueError, match=r"float matrix \[R, K\], got int32 \(2, 96\)"):
        quantize(xp.astype(x, xp.int32), "Q4_0")
    with pytest.raises(ValueError, match=r"one value per column, \[96\], got \(1, 96\)"):
        quantize(x, "Q4_0", xp.asarray(np.ones((1, 96), np.float32)))
    for raw in (np.zeros(18, np.uint8), np.zeros((1, 18), np.int8)):
        with pytest.raises(ValueError, match=r"raw Q4_0 is uint8 \[R, a multiple of 18\]"):
            dequantize(xp.asarray(raw), "Q4_0")
    with pytest.raises(
        ValueError, match=r"importance has one value per column, \[96\], got \(95,\)"
    ):
        quantize(x, "Q4_0", xp.asarray(np.ones(95, np.float32)))
    with pytest.raises(ValueError, match="importance is negative somewhere"):
        quantize(x, "Q4_0", xp.asarray(-np.ones(96, np.float32)))
    with pytest.raises(ValueError, match="overflow is 'inf' or 'raise', not 'clip'"):
        quantize(x, "Q4_0", overflow="clip")
    with pytest.raises(
        ValueError, match=r"raw Q4_0 is uint8 \[R, a multiple of 18\], got uint8 \(1, 17\)"
    ):
        dequantize(xp.asarray(np.zeros((1, 17), np.uint8)), "Q4_0")


def test_nothing_and_narrow_and_wide_floats(xp):
    for type in TYPES:
        assert quantize(xp.asarray(np.zeros((0, 256), np.float32)), type).shape == (
            0,
            row_bytes(type, 256),
        )
        assert dequantize(xp.asarray(np.zeros((3, 0), np.uint8)), type).shape == (3, 0)
    x = build("normal", (2, 256), 0).astype(np.float16)
    for wide in (np.float32, np.float64):
        np.testing.assert_array_equal(encode(xp, x, "Q4_K"), encode(xp, x.astype(wide), "Q4_K"))
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize(xp.asarray(np.full((1, 256), 1e300)), "Q4_K")
