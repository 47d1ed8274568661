"""Windows cover every token once; the bytes of the tokens are the bytes of the text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Inner
from tokenizers import decoders, models

from refllm.checkpoints.tokenizer import Tokenizer
from refllm.corpus import Document
from refllm.measure.comparison import compare, precompute_reference
from refllm.measure.perplexity import evaluate
from refllm.measure.windows import (
    checked_windows,
    default_windows,
    plan_windows,
    token_bytes,
    windows,
)
from tiny_models import byte_tokenizer, tiny_model

shapes = st.tuples(st.integers(0, 60), st.integers(1, 24), st.integers(1, 24)).map(
    lambda t: (t[0], max(t[1], t[2]), min(t[1], t[2]))
)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@given(shapes)
@pytest.mark.theorem(
    "Sliding windows of W inputs, S apart, predict every token but the first of a document "
    "exactly once, in order",
    source="refllm/measure/windows.py",
)
def test_windows_partition_the_tokens(shape):
    length, window, stride = shape
    targets = [
        t
        for begin, end, first in windows(length, window, stride)
        for t in range(begin + first + 1, end + 1)
    ]
    assert targets == list(range(1, length))


@given(shapes)
@pytest.mark.theorem(
    "A token at index t is predicted from at least min(t, W − S + 1) and at most W tokens of "
    "context",
    source="refllm/measure/windows.py",
)
def test_context_is_bounded_on_both_sides(shape):
    length, window, stride = shape
    for begin, end, first in windows(length, window, stride):
        assert 0 <= first < end - begin <= window
        assert first + 1 >= min(begin + first + 1, window - stride + 1)


@given(shapes.filter(lambda s: s[0] > 1))
def test_window_count_is_the_fewest_at_that_stride(shape):
    length, window, stride = shape
    assert len(windows(length, window, stride)) == 1 + max(0, -(-(length - 1 - window) // stride))


@pytest.mark.parametrize(("window", "stride"), [(4, 0), (4, -1), (4, 5), (0, 0)])
def test_a_stride_outside_the_window_is_rejected(window, stride):
    with pytest.raises(ValueError, match="stride"):
        windows(10, window, stride)


@given(st.lists(texts, min_size=1, max_size=4), shapes, st.integers(257, 280))
def test_plan_bytes_are_the_bytes_of_the_text(documents, shape, vocab):
    """With a beginning token all of a text is scored, however it is tokenised and windowed."""
    model = tiny_model(vocab_size=vocab)
    if not any(documents):
        with pytest.raises(ValueError, match="nothing to score"):
            plan_windows(model, documents, shape[1], shape[2])
        return
    p = plan_windows(model, documents, shape[1], shape[2])
    for d, text in enumerate(documents):
        inside = p.document == d
        assert p.token_bytes[inside].sum() == len(text.encode())
        assert model.tokenizer.decode(p.targets[inside]) == text


@given(st.lists(texts, min_size=1, max_size=4).filter(any), shapes, st.integers(1, 200))
def test_max_tokens_keeps_a_prefix(documents, shape, most):
    model = tiny_model()
    whole, cut = (plan_windows(model, documents, shape[1], shape[2], n) for n in (None, most))
    count = min(most, len(whole.targets))
    for name in ("targets", "token_bytes", "context", "document"):
        np.testing.assert_array_equal(getattr(cut, name), getattr(whole, name)[:count])


@given(texts)
def test_byte_lengths_are_exact_for_every_token_of_a_byte_level_vocabulary(text):
    tokenizer = byte_tokenizer(280)
    ids = np.asarray(tokenizer.encode(text), dtype=np.int64)
    lengths = token_bytes(tokenizer, 300)
    cuts = np.cumsum(lengths[ids])
    raw = text.encode()
    # a prefix of tokens is that prefix of bytes, whole characters or not
    for n, cut in enumerate(cuts, start=1):
        assert tokenizer.decode(ids[:n]) == raw[:cut].decode(errors="replace")
    assert (lengths[280:] == 0).all()


def test_byte_lengths_of_a_sentencepiece_spelling():
    vocabulary = {"<unk>": 0, "<s>": 1, "<0x0A>": 2, "<0xE6>": 3, "▁def": 4, "é": 5, "▁": 6, "Ġ": 7}
    inner = Inner(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    inner.add_special_tokens(["<s>"])
    assert token_bytes(Tokenizer(inner), 8).tolist() == [5, 3, 1, 1, 4, 2, 1, 2]


def test_an_added_token_counts_the_bytes_of_its_text():
    """In a byte-level vocabulary, too, where each character of another token is one byte."""
    trained = byte_tokenizer()
    inner = Inner.from_str(trained.inner.to_str())
    inner.add_special_tokens(["<é漢>"])
    inner.add_tokens(["\N{THUMBS UP SIGN}"])
    lengths = token_bytes(Tokenizer(inner), 259)
    assert lengths[257:].tolist() == [1 + 2 + 3 + 1, 4]
    assert lengths[0] == len("<|endoftext|>")
    assert lengths[1:257].tolist() == [1] * 256


def test_documents_are_texts_records_or_token_arrays_alone_or_in_lists():
    model = tiny_model()
    text = "for x in y"
    ids = model.tokenizer.encode(text)
    same = [
        text,
        [text],
        Document("a.py", text),
        ids,
        [ids],
        np.asarray(ids, np.int32),
        iter([[0, *ids]]),
    ]
    for documents in same:
        p = plan_windows(model, documents, 8, 4)
        # one beginning token, also where the array brought its own
        assert p.tokens[0].tolist() == [0, *ids]
        assert p.token_bytes.sum() == len(text)
    assert plan_windows(model, Document("a.py", text), 8, 4).names == ("a.py",)


def test_without_a_beginning_token_the_first_token_is_context_only():
    model = tiny_model(bos_token_id=None)
    p = plan_windows(model, "abc", 8, 4)
    assert model.tokenizer.decode(p.targets) == "bc"
    assert p.token_bytes.sum() == 2


@pytest.mark.parametrize("documents", [[], "", ["", ""], [[]], [[0]]])
def test_nothing_to_score_is_rejected(documents):
    with pytest.raises(ValueError, match="nothing to score"):
        plan_windows(tiny_model(), documents, 8, 4)


@pytest.mark.parametrize("ids", [[1, 257], [1, -1]])
def test_a_token_outside_the_vocabulary_is_rejected_by_document(ids):
    with pytest.raises(ValueError, match=r"document 2.*vocabulary of 257"):
        plan_windows(tiny_model(), ["fine", ids], 8, 4)


def test_an_array_of_the_wrong_kind_is_rejected():
    with pytest.raises(ValueError, match="1-D array of token ids"):
        plan_windows(tiny_model(), [np.zeros((2, 3), np.int64)], 8, 4)
    with pytest.raises(ValueError, match="float64"):
        plan_windows(tiny_model(), [np.zeros(3)], 8, 4)


@pytest.mark.parametrize(
    "documents", [b"ab", bytearray(b"ab"), [b"ab"], ["ab\ud800"], [None], None, 5, Path("x")]
)
def test_what_is_neither_text_nor_ids_is_rejected(documents):
    """Bytes would pass for token ids, a byte each."""
    with pytest.raises(ValueError, match="texts or token ids, not|expected a text|no Unicode"):
        plan_windows(tiny_model(), documents, 8, 4)


@pytest.mark.parametrize("most", [0, -5])
def test_a_budget_without_a_token_is_rejected(most):
    with pytest.raises(ValueError, match="max_tokens must be at least 1"):
        plan_windows(tiny_model(), ["some text", "and more"], 8, 4, most)


def test_a_beginning_token_outside_the_vocabulary_is_rejected():
    with pytest.raises(ValueError, match="bos_token_id 257 lies outside"):
        plan_windows(tiny_model(bos_token_id=257), ["some text"], 8, 4)


@pytest.mark.parametrize(
    ("positions", "expected"),
    [(1, (1, 1)), (3, (3, 1)), (1023, (1023, 511)), (1024, (1024, 512)), (9999, (1024, 512))],
)
def test_windows_are_as_long_as_the_model_reads(positions, expected):
    assert default_windows(positions) == expected


@pytest.mark.parametrize("measure", ["evaluate", "compare", "precompute_reference"])
def test_a_window_beyond_the_models_positions_is_rejected(measure):
    model = tiny_model(max_position_embeddings=32)
    call = {
        "evaluate": lambda **shape: evaluate(model, "a text", **shape),
        "compare": lambda **shape: compare(
            model, model, "a text", rng=np.random.default_rng(0), resamples=10, **shape
        ),
        "precompute_reference": lambda **shape: precompute_reference(model, "a text", **shape),
    }[measure]
    with pytest.raises(ValueError, match="window of 33 tokens is longer than the model's 32"):
        call(window=33, stride=1)
    call(window=32, stride=1)
    call()


def test_a_reference_of_fewer_positions_is_rejected_too():
    long, short = (tiny_model(max_position_embeddings=n) for n in (64, 32))
    with pytest.raises(ValueError, match="window of 64 tokens is longer than the model's 32"):
        compare(long, short, "a text", rng=np.random.default_rng(0), resamples=10)


def test_windows_are_the_default_ones_of_the_model():
    model = tiny_model(max_position_embeddings=32)
    assert checked_windows(model, None, None) == (32, 16)
    assert checked_windows(model, 1, None) == (1, 1)
    assert checked_windows(tiny_model(max_position_embeddings=4096), None, None) == (1024, 512)
