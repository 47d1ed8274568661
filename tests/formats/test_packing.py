"""Bit streams against arithmetic on Python's integers, and against compressed-tensors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import oracle, to_host
from refllm.formats.packing import pack, unpack, words_per_row
from strategies import seeds

widths = st.integers(1, 8)
counts = st.integers(0, 70)
leads = st.sampled_from([(), (1,), (3,), (0,), (2, 3)])


def codes_of(bits, lead, count, seed, dtype="uint8"):
    return np.random.default_rng(seed).integers(0, 1 << bits, (*lead, count)).astype(dtype)


@pytest.mark.theorem(
    "unpack(pack(q)) = q for 1 to 8 bits, any row length and any shape",
    source="formats/packing.py, definition of the stream",
)
@given(widths, leads, counts, seeds, st.sampled_from(["uint8", "int8", "int32", "int64"]))
def test_round_trip(xp, bits, lead, count, seed, dtype):
    codes = codes_of(bits, lead, count, seed, "uint8" if bits == 8 and dtype == "int8" else dtype)
    words = pack(xp.asarray(codes), bits)
    assert words.dtype == xp.uint32
    assert words.shape == (*lead, words_per_row(count, bits))
    back = unpack(words, bits, count)
    assert back.dtype == xp.uint8
    np.testing.assert_array_equal(to_host(back), codes)


@pytest.mark.theorem(
    "A row of words, read as one number, is Σ q_i 2^(i·b): dense, little end first, unused "
    "bits zero",
    source="compressed-tensors pack-quantized",
)
@given(widths, counts, seeds)
def test_a_row_is_one_number(xp, bits, count, seed):
    codes = codes_of(bits, (2,), count, seed)
    words = to_host(pack(xp.asarray(codes), bits))
    for row, stream in zip(codes, words, strict=True):
        assert sum(int(w) << (32 * k) for k, w in enumerate(stream)) == sum(
            int(q) << (bits * i) for i, q in enumerate(row)
        )


@given(widths, counts)
def test_words_are_as_few_as_can_be(bits, count):
    words = words_per_row(count, bits)
    assert 32 * words >= count * bits > 32 * (words - 1)


def test_every_code_at_every_place(xp):
    """All codes of all widths, each alone among zeros and alone among ones: 33 places meet
    every straddle.
    """
    for bits in range(1, 9):
        for background in (0, (1 << bits) - 1):
            codes = np.full((1 << bits, 33, 33), background, dtype=np.uint8)
            codes[:, np.arange(33), np.arange(33)] = np.arange(1 << bits)[:, None]
            np.testing.assert_array_equal(
                to_host(unpack(pack(xp.asarray(codes), bits), bits, 33)), codes
            )


def test_views_that_are_not_contiguous(xp):
    codes = xp.asarray(codes_of(5, (8,), 40, 0))
    for view in (codes.T, codes[:, ::2], codes[::2, 3:35]):
        np.testing.assert_array_equal(
            to_host(unpack(pack(view, 5), 5, view.shape[-1])), to_host(view)
        )
    words = xp.asarray(to_host(pack(codes, 5)).T.copy()).T
    np.testing.assert_array_equal(to_host(unpack(words, 5, 40)), to_host(codes))


@pytest.mark.parametrize("bad", [8, -1])
def test_a_code_that_does_not_fit_is_rejected(xp, bad):
    with pytest.raises(ValueError, match=r"pack: 3-bit codes lie in 0\.\.7"):
        pack(xp.asarray(np.array([[0, 1, bad]])), 3)


@pytest.mark.parametrize("bits", [0, 9, -1, 4.0])
def test_other_widths_are_rejected(xp, bits):
    codes = xp.asarray(np.zeros(4, dtype=np.uint8))
    for call in (lambda: pack(codes, bits), lambda: words_per_row(4, bits)):
        with pytest.raises(ValueError, match=r"bits is an integer in 1\.\.8"):
            call()


def test_other_types_and_lengths_are_rejected(xp):
    with pytest.raises(TypeError, match="integers, got float32"):
        pack(xp.asarray(np.zeros(4, dtype=np.float32)), 4)
    with pytest.raises(TypeError, match="words are uint32, got int32"):
        unpack(xp.asarray(np.zeros(1, dtype=np.int32)), 4, 8)
    with pytest.raises(ValueError, match="9 codes of 4 bits take 2 words per row, got 1"):
        unpack(xp.asarray(np.zeros(1, dtype=np.uint32)), 4, 9)


@pytest.mark.oracle
@given(widths, st.integers(1, 5), st.integers(1, 70), seeds)
def test_words_equal_compressed_tensors(bits, rows, count, seed):
    torch = oracle("torch")
    helpers = oracle("compressed_tensors.compressors.pack_quantized.helpers")
    codes = codes_of(bits, (rows,), count, seed)
    signed = torch.from_numpy((codes.astype(np.int16) - (1 << (bits - 1))).astype(np.int8))
    theirs = helpers.pack_to_int32(signed, bits).numpy()
    np.testing.assert_array_equal(pack(codes, bits).view(np.int32), theirs)
    back = helpers.unpack_from_int32(
        torch.from_numpy(pack(codes, bits).view(np.int32)), bits, signed.shape
    )
    np.testing.assert_array_equal(back.numpy(), signed.numpy())
