"""Calibration data: drawn with a seed from training documents, and rejected where it is not
token ids.
"""

from __future__ import annotations

import numpy as np
import pytest

from refllm.corpus import Document, held_out_documents, training_documents
from refllm.quant.calibration_data import calibration_windows, sequences
from tiny_models import byte_tokenizer


def test_windows_are_whole_and_depend_on_the_seed_alone():
    tokenizer = byte_tokenizer()
    windows = calibration_windows(tokenizer, 5, 32, 7)
    assert windows.shape == (5, 32)
    assert windows.dtype == np.int64
    np.testing.assert_array_equal(
        windows, calibration_windows(tokenizer, 5, 32, np.random.default_rng(7))
    )
    assert not np.array_equal(windows, calibration_windows(tokenizer, 5, 32, 8))


def test_windows_are_training_text_and_never_held_out():
    tokenizer = byte_tokenizer()
    rng = 11
    training = "\0".join(d.text for d in training_documents())
    held_out = "\0".join(d.text for d in held_out_documents())
    inside = [tokenizer.decode(w.tolist()) for w in calibration_windows(tokenizer, 20, 200, rng)]
    assert all(
        text in training
        for text in inside
        if "\ufffd" not in text and _one_document(text, training)
    )
    assert not any(text in held_out for text in inside)
    assert sum(text in training for text in inside) >= 15  # the others span two documents


def _one_document(text: str, training: str) -> bool:
    return text[:100] in training and text[100:] in training and text in training


def test_a_window_begins_with_a_line_and_goes_on_into_the_next_document():
    tokenizer = byte_tokenizer()
    documents = [Document("a", "x = 1\ny = 2\n"), Document("empty", ""), Document("b", "z\n")]
    for begin, between in ((None, ""), (0, "<|endoftext|>")):
        parts = [
            between.join(["x = 1\ny = 2\n", *["z\n", "x = 1\ny = 2\n"] * 9])[i:] for i in (0, 6)
        ]
        parts.append(between.join(["z\n", "x = 1\ny = 2\n"] * 9))
        seen = set()
        for w in calibration_windows(tokenizer, 60, 30, 0, documents=documents, begin=begin):
            text = tokenizer.decode(w.tolist())
            (start,) = [i for i, part in enumerate(parts) if part.startswith(text)]
            seen.add(start)
        assert seen == {0, 1, 2}


def test_every_character_is_drawn_equally_often():
    documents = [Document("a", "a" * 30), Document("b", "b" * 10)]
    windows = calibration_windows(byte_tokenizer(), 4000, 1, 0, documents=documents)
    share = float(np.mean(windows[:, 0] == windows[:, 0].max()))  # begins in the document of b
    assert abs(share - 0.25) < 4 * np.sqrt(0.25 * 0.75 / 4000)


def test_a_long_token_stream_is_encoded_as_far_as_it_is_needed():
    """Tokens longer than the eight characters that are tried first."""
    tokenizer = byte_tokenizer(300)
    text = "        continue" * 40
    documents = [Document("a", text), Document("b", "other\n")]
    whole = tokenizer.encode(text)
    for length in (1, 5, len(whole)):
        window = calibration_windows(tokenizer, 1, length, 3, documents=documents)[0]
        assert window.tolist() == whole[:length]


@pytest.mark.parametrize(
    ("count", "length", "texts"), [(0, 4, ["a"]), (4, 0, ["a"]), (1, 1, []), (1, 1, [""])]
)
def test_windows_of_nothing_are_rejected(count, length, texts):
    with pytest.raises(ValueError, match="calibration_windows: no"):
        calibration_windows(
            byte_tokenizer(), count, length, 0, documents=[Document("x", t) for t in texts]
        )


def test_token_ids_of_every_kind_become_lists():
    expected = [[1, 2, 3], [4, 5, 6]]
    for given in (
        expected,
        np.array(expected),
        [np.array(r, np.uint16) for r in expected],
        map(tuple, expected),
    ):
        assert sequences(given, 7) == expected
    assert all(type(t) is int for row in sequences(np.array(expected), 7) for t in row)


@pytest.mark.parametrize(
    ("calibration", "why"),
    [
        ([], "there is no sequence"),
        ([[1], []], "sequence 1 must be a non-empty"),
        ([[1.0, 2.0]], "sequence 0 must be"),
        (np.ones((2, 3)), "sequence 0 must be"),
        ([[True]], "sequence 0 must be"),
        (["text"], "sequence 0 must be"),
        ("text", "sequence 0 must be"),
        (np.array([1, 2]), "sequence 0 must be"),
        (np.ones((1, 2, 3), int), "sequence 0 must be"),
        ([[1], [7]], "sequence 1 holds a token outside the vocabulary of 7"),
        ([[-1]], "sequence 0 holds a token outside"),
    ],
)
def test_what_is_no_text_is_rejected(calibration, why):
    with pytest.raises(ValueError, match=why):
        sequences(calibration, 7)
