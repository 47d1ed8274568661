"""A sample of every window is the evaluation; a smaller one draws without replacement."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.api import Model
from refllm.corpus import Document
from refllm.measure.perplexity import evaluate
from refllm.measure.sampled_loss import sample_bits_per_byte
from tiny_models import tiny_model


def network(**changes) -> Model:
    made = tiny_model(**changes)
    return Model(made.config, made.weights, made.tokenizer)


@pytest.mark.theorem(
    "A sample of every window has the mean that the full evaluation has",
    source="sampling without replacement",
)
@given(st.lists(st.text("def return self\n", min_size=1, max_size=80), min_size=1, max_size=4))
def test_a_sample_of_all_windows_is_the_evaluation(items):
    # tokens of one byte, and of several
    model = network(max_position_embeddings=16, vocab_size=290)
    documents = [Document(str(i), text) for i, text in enumerate(items)]
    whole = evaluate(model, documents, window=16, stride=8)
    sample = sample_bits_per_byte(model, documents, 10_000, np.random.default_rng(0))
    assert (sample.tokens, sample.bytes, sample.windows) == (whole.tokens, whole.bytes, sample.of)
    # a float64 sum of n bytes against one of tokens: n · eps, and the forward passes of
    # other batches
    assert sample.bits.mean == pytest.approx(whole.bits_per_byte, rel=1e-10)


def test_a_smaller_sample_draws_windows_without_replacement():
    model = network(max_position_embeddings=16)
    documents = [Document("x", "def f(x):\n    return x\n" * 20)]
    rng = np.random.default_rng(0)
    samples = [sample_bits_per_byte(model, documents, 5, rng) for _ in range(2)]
    for s in samples:
        assert s.windows == 5 < s.of
        assert s.tokens <= 16 + 4 * 8  # only a document's first window scores all of its rows
        assert s.bits.low <= s.bits.mean <= s.bits.high
        assert math.isfinite(s.bits.low)
    assert samples[0].bits != samples[1].bits
