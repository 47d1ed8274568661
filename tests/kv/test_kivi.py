"""KIVI's quantiser and what a query reads: against loops, the published bookkeeping, and
attention query by query.
"""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import to_host
from kv_caches import kivis, quantized_by_loops
from refllm.formats.packing import pack
from refllm.kv.kivi import Kivi, dequantize, quantize
from refllm.kv.kivi_attend import KiviAttend, attend_as_decoded
from refllm.model.attention import CausalAttend, attention
from refllm.model.config import ModelConfig
from strategies import KINDS, arrays, build, seeds

EPS32, EPS64 = (float(np.finfo(dtype).eps) for dtype in ("float32", "float64"))
# max − min of ± the largest finite value is infinite
FINITE = [kind for kind in KINDS if kind != "extreme"]
LLAMA_70B = ModelConfig("llama", 32000, 8192, 28672, 80, 64, 8, 128)
H = 4
G = 2
D = 8

# --- quantising groups --------------------------------------------------------------------


@pytest.mark.theorem(
    "|x̂ − x| ≤ s/2 for every value of a group", source="Liu et al. 2024, section 2; rounding"
)
@given(
    x=arrays(st.integers(1, 4), st.sampled_from([8, 16, 24]), kinds=FINITE),
    bits=st.integers(1, 8),
    group=st.sampled_from([1, 2, 4, 8]),
)
def test_bound_of_the_error_is_half_a_scale(xp, x, bits, group):
    codes, step, low = quantize(xp.asarray(x), bits, group)
    assert codes.dtype == "uint8"
    assert int(to_host(codes).max()) < 1 << bits
    back = to_host(dequantize(codes, step, low)).astype(float)
    width = np.repeat(to_host(step).astype(float), group, axis=-1)
    # the quotient is off by (x + min)/s · eps, x̂ by as much again; subnormal numbers by
    # their spacing (a scale below the smallest of them is 1, and its group all minimum)
    slack = 4 * EPS32 * (np.abs(x).max() + width * (1 << bits)) + 2.0**bits * float(
        np.finfo("float32").smallest_subnormal
    )
    assert np.all(np.abs(back - x) <= width / 2 + slack)


@given(x=arrays(st.integers(1, 3), 16, kinds=FINITE), bits=st.sampled_from([2, 4, 8]))
def test_exact_value_codes_are_those_of_the_published_formula(xp, x, bits):
    """rint(clamp((x − mn) / s, 0, 2^b − 1)) with mn, s in the type of x; groups that are
    constant have s = 0 there.
    """
    codes, step, low = (to_host(a) for a in quantize(xp.asarray(x), bits, 8))
    for r in range(len(x)):
        for i in range(0, 16, 8):
            group = x[r, i : i + 8]
            most = np.float32((1 << bits) - 1)
            mn = group.min()
            s = (group.max() - group.min()) / most
            assert low[r, i // 8] == mn
            if s == 0:
                assert (step[r, i // 8], codes[r, i : i + 8].max()) == (1, 0)
                continue
            assert step[r, i // 8] == s
            assert np.array_equal(codes[r, i : i + 8], np.rint(np.clip((group - mn) / s, 0, most)))


@given(seed=seeds, bits=st.sampled_from([2, 4, 8]))
def test_exact_value_words_are_packed_as_the_published_code_does(xp, seed, bits):
    """32/b codes per int32, the first in the lowest bits."""
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (3, 64)).astype("uint8")
    each = 32 // bits
    words = np.zeros((3, 64 // each), dtype="int32")
    for i in range(each):
        words |= np.left_shift(codes[:, i::each].astype("int32"), bits * i)
    assert np.array_equal(to_host(pack(xp.asarray(codes), bits)), words.view("uint32"))


def test_degenerate_equal_values_and_the_minimum_of_a_group_are_restored_exactly(xp):
    for value in (0.0, -3.7, 1e-45, 1e30):
        x = np.full((2, 8), value, dtype="float32")
        codes, step, low = quantize(xp.asarray(x), 2, 4)
        assert not to_host(codes).any()
        assert np.array_equal(to_host(dequantize(codes, step, low)), x)
    x = build("normal", (5, 16), 3)
    back = to_host(dequantize(*quantize(xp.asarray(x), 3, 4))).reshape(5, 4, 4)
    assert np.array_equal(back.min(axis=-1), x.reshape(5, 4, 4).min(axis=-1))


@given(x=arrays(2, 16, kinds=FINITE), bits=st.integers(1, 8))
def test_codes_are_computed_with_the_scales_that_are_stored(xp, x, bits):
    """Scales in float16: the nearest of the values that these scales can represent, not
    those of finer scales.
    """
    x = np.clip(x, -1e3, 1e3)
    codes, step, low = quantize(xp.asarray(x), bits, 8, "float16")
    assert step.dtype == low.dtype == "float16"
    s, least = (np.repeat(to_host(a).astype("float32"), 8, axis=-1) for a in (step, low))
    every = s[..., None] * np.arange(1 << bits, dtype="float32") + least[..., None]
    best = np.abs(every - x[..., None]).min(axis=-1)
    error = np.abs(s * to_host(codes) + least - x)
    assert np.all(error <= best + 8 * EPS32 * (np.abs(x).max() + np.abs(every).max(axis=-1)))


def test_rows_of_incomplete_groups_are_rejected(xp):
    with pytest.raises(ValueError, match="rows of 10 do not divide into groups of 4"):
        quantize(xp.zeros((2, 10)), 2, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 2, 32, 128), "key_bits is an integer, 1 or more, got 0"),
        ((2, 2.0, 32, 128), "value_bits is an integer, 1 or more, got 2.0"),
        ((2, True, 32, 128), "value_bits is an integer, 1 or more, got True"),
        ((2, 2, np.array([32]), 128), r"group is an integer, 1 or more, got array\(\[32\]\)"),
        ((9, 2, 32, 128), "codes have 1 to 8 bits, got 9 and 2"),
        ((2, 2, 32, 100), "residual 100 is no multiple of group 32; take 96"),
        ((2, 2, 8, 8), "8 keys of 2 bits fill no whole 32-bit words; take residual 16"),
        ((1, 1, 8, 20), "20 is no multiple of group 8; take 32"),
        ((3, 2, 20, 20), "take residual 160"),
    ],
)
def test_impossible_settings_are_rejected_with_a_possible_one(arguments, message):
    with pytest.raises(ValueError, match=message):
        Kivi(*arguments)


# --- how many tokens are quantised --------------------------------------------------------


def published(prompt: int, steps: int, size: int) -> list[tuple[int, int]]:
    """(quantised keys, quantised values) after the prompt and after each step, by the
    published bookkeeping.
    """
    keys_waiting = prompt % size
    keys = prompt - keys_waiting
    values = max(0, prompt - size)
    values_waiting = prompt - values
    history = [(keys, values)]
    for _ in range(steps):
        keys_waiting += 1
        if keys_waiting == size:
            keys = keys + size
            keys_waiting = 0
        values_waiting += 1
        if values_waiting > size:
            values = values + 1
            values_waiting = values_waiting - 1
        history.append((keys, values))
    return history


@pytest.mark.theorem(
    "How much is quantised is a function of the length alone: keys ⌊s/R⌋ R, values max(0, s − R)",
    source="Liu et al. 2024, algorithm 1",
)
@pytest.mark.parametrize("size", [32, 64])
def test_invariance_the_published_bookkeeping_does_not_depend_on_the_prompt_length(size):
    kivi = Kivi(2, 2, 32, size)
    for prompt in range(3 * size):
        for steps, counted in enumerate(published(prompt, 2 * size + 3, size)):
            s = prompt + steps
            assert counted == (kivi.quantized_keys(s), kivi.quantized_values(s))


def test_exact_value_bits_and_bytes_of_the_specification():
    assert Kivi(2, 2, 32).bits_per_value() == 3.0
    assert Kivi(2, 2, 128, 128).bits_per_value() == 2.25
    assert Kivi(4, 2, 64).bits_per_value() == 3.5
    # 80 layers of 8 heads of 128 in float16: 320 KiB a token in full
    assert Kivi(2, 2, 32, 128).nbytes(LLAMA_70B, 100) == 100 * 320 * 1024
    # 4096 = 32 · 128: the residual window holds no key and 128 values; the rest has 3 of 16 bits
    per_side = 160 * 1024
    expected = (4096 + (4096 - 128)) * per_side * 3 / 16 + 128 * per_side
    assert Kivi(2, 2, 32, 128).nbytes(LLAMA_70B, 4096) == expected
    # keys and values of other widths: 128 · 2 / 32 words a channel, 1 · 128 · 8 / 32 a
    # token
    one = ModelConfig("llama", 8, 128, 128, 1, 1, 1, 128)
    assert Kivi(2, 8, 32, 128).nbytes(one, 129) == 4 * (128 * 8 + 32) + 2 * (
        2 * 129 * 4 + 1 * 128 + 128 * 128
    )
    # 3-bit values leave the end of a row's last word unused: 8 · 3 = 24 of 32 bits
    small = ModelConfig("llama", 8, 16, 16, 1, 2, 1, 8)
    assert Kivi(4, 3, 8, 8).nbytes(small, 9) == 4 * (8 * 1 + 1) + 2 * (2 * 9 + (18 - 9) * 8)


# --- what a query reads -------------------------------------------------------------------


def one_by_one(q, k, v, kivi: Kivi, window: int | None, keys: str, values: str) -> np.ndarray:
    """Each query over keys and values that are prepared for it alone."""
    coded = kivi.quantized_values if values == "token" else kivi.quantized_keys
    rows = []
    for t in range(len(q)):
        seen = quantized_by_loops(
            k[: t + 1], kivi.key_bits, kivi.group, keys, kivi.quantized_keys(t)
        )
        read = quantized_by_loops(v[: t + 1], kivi.value_bits, kivi.group, values, coded(t))
        rows.append(attention(q[t : t + 1], seen, read, start=t, window=window)[0])
    return np.concatenate(rows)


def sequence(seed: int, length: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((length, heads, D)) for heads in (H, G, G)]


@pytest.mark.theorem(
    "A sequence computed at once, with a boundary for each query, equals the sequence decoded "
    "token by token",
    source="the boundary is a function of the query's position alone",
)
@given(
    seed=seeds,
    length=st.integers(1, 150),
    kivi=kivis,
    window=st.sampled_from([None, 5, 70]),
    keys=st.sampled_from(["channel", "token"]),
    values=st.sampled_from(["channel", "token"]),
)
def test_equality_a_whole_sequence_is_one_query_after_the_other(
    xp, seed, length, kivi, window, keys, values
):
    q, k, v = sequence(seed, length)
    expected = one_by_one(q, k, v, kivi, window, keys, values)
    got = attend_as_decoded(
        *(xp.asarray(a) for a in (q, k, v)), kivi, window=window, keys=keys, values=values
    )
    assert np.abs(to_host(got) - expected).max() <= 1e3 * D * EPS64 * np.abs(v).max()


@given(
    seed=seeds,
    lengths=st.lists(st.integers(1, 31), min_size=1, max_size=3),
    window=st.sampled_from([None, 6]),
)
def test_equality_with_plain_attention_within_the_residual_window(xp, seed, lengths, window):
    q, k, v = (xp.asarray(a) for a in sequence(seed, sum(lengths)))
    plain = CausalAttend(lengths, window)(0, q, k, v)
    for keys in ("channel", "token"):
        got = KiviAttend(lengths, Kivi(1, 1, 8, 32), window, keys=keys)(0, q, k, v)
        assert np.abs(to_host(got) - to_host(plain)).max() <= 1e3 * D * EPS64 * float(
            np.abs(to_host(v)).max()
        )


def test_a_query_reads_codes_from_the_step_after_they_were_quantised(xp):
    """Of R = 32: token 32 is the first that reads quantised keys, token 33 the first that
    reads a quantised value.
    """
    q, k, v = (xp.asarray(a) for a in sequence(5, 40))
    plain = to_host(CausalAttend([40])(0, q, k, v))
    coarse_keys = to_host(attend_as_decoded(q, k, v, Kivi(1, 8, 8, 32)))
    coarse_values = to_host(attend_as_decoded(q, k, v, Kivi(8, 1, 8, 32)))
    changed = [np.abs(a - plain).max(axis=(1, 2)) > 0.02 for a in (coarse_keys, coarse_values)]
    assert changed[0].tolist() == [t >= 32 for t in range(40)]
    assert not changed[1][:33].any()
    assert changed[1][33:].any()


def test_large_channels_need_scales_per_channel_and_large_tokens_per_token(xp):
    """KIVI's observation on real keys, and its mirror image, where KIVI's choice is the
    wrong one.
    """
    channels = np.arange(D) == 3
    tokens = (np.arange(128) % 8 == 3)[:, None, None]
    for seed, (large, better, worse) in product(
        range(5), [(channels, "channel", "token"), (tokens, "token", "channel")]
    ):
        factor = np.broadcast_to(np.where(large, 50.0, 1.0), (128, G, D))
        k = sequence(seed, 128)[1] * factor
        error = {}
        for by in ("channel", "token"):
            columns = xp.asarray(
                np.ascontiguousarray(k.transpose(1, 2, 0) if by == "channel" else k)
            )
            back = to_host(dequantize(*quantize(columns, 2, 8)))
            back = back.transpose(2, 0, 1) if by == "channel" else back
            assert np.allclose(back, quantized_by_loops(k, 2, 8, by, 128), rtol=0, atol=1e3 * EPS64)
            # the large ones are quantised as well either way
            error[by] = np.square(back - k)[factor == 1].mean()
        assert error[worse] > 20 * error[better]


def test_large_scores_do_not_overflow(xp):
    """exp of a score of a thousand is infinite, so the largest score is subtracted first."""
    q, k, v = sequence(1, 50)
    expected = one_by_one(1e3 * q, k, v, Kivi(2, 2, 8, 32), None, "channel", "token")
    got = to_host(attend_as_decoded(*(xp.asarray(a) for a in (1e3 * q, k, v)), Kivi(2, 2, 8, 32)))
    assert np.isfinite(got).all()
    # scores of up to 10⁴, each with an error of 10⁴ eps
    assert np.abs(got - expected).max() <= 1e-8


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int64, np.uint64])
def test_settings_may_be_numpy_integers(kind):
    kivi = Kivi(*(kind(value) for value in (2, 4, 8, 32)))
    assert [type(value) for value in vars(kivi).values()] == [int] * 4
    assert kivi == Kivi(2, 4, 8, 32)
    assert (kivi.quantized_values(5), kivi.quantized_keys(70)) == (0, 64)
    assert kivi.nbytes(LLAMA_70B, 32768) == Kivi(2, 4, 8, 32).nbytes(LLAMA_70B, 32768) > 2**32


def test_bad_shapes_are_rejected(xp):
    q, k, v = (xp.asarray(a) for a in sequence(0, 4))
    with pytest.raises(ValueError, match="a head of 8 channels does not divide into groups of 3"):
        attend_as_decoded(q, k, v, Kivi(8, 8, 3, 12))
    with pytest.raises(ValueError, match="lengths sum to 3, the batch has 4 tokens"):
        KiviAttend([3], Kivi(2, 2, 8, 32))(0, q, k, v)
    with pytest.raises(
        ValueError, match="keys share a scale by 'channel' or by 'token', got 'head'"
    ):
        KiviAttend([4], Kivi(2, 2, 8, 32), keys="head")
    assert attend_as_decoded(q[:0], k[:0], v[:0], Kivi(2, 2, 8, 32)).shape == (0, H, D)
    assert math.isfinite(float(to_host(attend_as_decoded(q, k, v, Kivi(2, 2, 8, 32))).sum()))
