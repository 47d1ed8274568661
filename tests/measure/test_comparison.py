"""KL, agreement and difference of loss against brute force, and that a reference need run only
once.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import to_host
from refllm.measure.comparison import compare, kl_divergence, precompute_reference
from refllm.measure.perplexity import evaluate
from refllm.model.attention import CausalAttend
from refllm.model.llama import forward, logits
from strategies import seeds
from tiny_models import tiny_model

EPS = np.finfo(np.float64).eps
# A loss passes through 2 layers of 7 products of up to 24 terms, and magnitudes of up to
# about 50.
TOLERANCE = 50 * 2 * 7 * 24 * EPS
token_lists = st.lists(st.integers(1, 256), min_size=1, max_size=40)
windowings = st.tuples(st.integers(1, 16), st.integers(1, 16)).map(
    lambda t: {"window": max(t), "stride": min(t)}
)


@given(st.integers(1, 6), st.integers(1, 9), seeds, st.sampled_from([0.0, 1e-9, 1.0, 30.0, 300.0]))
@pytest.mark.theorem("KL(p ‖ q) ≥ 0, and = 0 where p = q", source="Gibbs' inequality")
def test_divergence_is_that_of_brute_force(rows, vocab, seed, spread):
    rng = np.random.default_rng(seed)
    log_p = rng.standard_normal((rows, vocab)) * 5
    log_q = log_p + spread * rng.standard_normal((rows, vocab))
    log_p, log_q = (z - np.logaddexp.reduce(z, axis=-1, keepdims=True) for z in (log_p, log_q))
    kl = kl_divergence(log_p, log_q)
    exact = [
        math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
        for p, q in zip(log_p, log_q, strict=True)
    ]
    assert (kl >= 0).all()
    # each of V terms is rounded to eps of its own size, and their sum to V·eps of the sum
    # of sizes
    size = (np.exp(log_p) * np.abs(log_p - log_q)).sum(axis=-1)
    assert (np.abs(kl - exact) <= (vocab + 4) * EPS * (size + np.abs(log_p).max())).all()
    assert (kl_divergence(log_p, log_p) == 0).all()


def test_divergence_is_not_symmetric():
    """KL(reference ‖ model) weighs by the reference: p = (1/2, 1/2), q = (1/4, 3/4)."""
    p = np.log([[0.5, 0.5]])
    q = np.log([[0.25, 0.75]])
    assert kl_divergence(p, q)[0] == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert kl_divergence(q, p)[0] == pytest.approx(0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2))


@given(token_lists, seeds, windowings)
def test_comparison_is_token_by_token(tokens, seed, shape):
    model = tiny_model(seed)
    reference = tiny_model(seed + 1)
    c = compare(
        model, reference, tokens, rng=np.random.default_rng(0), resamples=50, block=4, **shape
    )
    for score, of in ((c.model, model), (c.reference, reference)):
        np.testing.assert_allclose(
            score.nats, evaluate(of, tokens, **shape).nats, rtol=0, atol=TOLERANCE
        )
    assert c.difference.mean == pytest.approx(
        (c.model.nats - c.reference.nats).mean(), abs=TOLERANCE
    )
    assert c.kl.mean == pytest.approx(c.token_kl.mean())
    assert c.agreement.mean == pytest.approx(c.token_agreement.mean())
    # the last token of the first window, by hand
    last = min(shape["window"], len(tokens))
    rows = [_last_log_probabilities(m, [0, *tokens][:last]) for m in (reference, model)]
    expected = math.fsum(math.exp(a) * (a - b) for a, b in zip(*rows, strict=True))
    assert c.token_kl[last - 1] == pytest.approx(expected, abs=50 * TOLERANCE)
    assert c.token_agreement[last - 1] == (int(np.argmax(rows[0])) == int(np.argmax(rows[1])))


def _last_log_probabilities(model, tokens):
    ids = np.asarray(tokens)
    hidden = forward(
        model.weights, model.config, ids, np.arange(len(ids)), CausalAttend([len(ids)])
    )
    z = logits(model.weights, hidden)[-1]
    return z - np.logaddexp.reduce(z)


@given(token_lists, seeds)
def test_a_model_does_not_differ_from_itself(tokens, seed):
    model = tiny_model(seed)
    c = compare(model, model, tokens, rng=np.random.default_rng(0), resamples=20, block=2)
    assert (c.token_kl == 0).all()
    assert c.token_agreement.all()
    for interval, value in ((c.kl, 0.0), (c.difference, 0.0), (c.agreement, 1.0)):
        assert interval.mean == value
        assert len(tokens) <= 2 or (interval.low, interval.high) == (value, value)


@given(st.lists(token_lists, min_size=1, max_size=3), seeds, windowings)
def test_a_reference_that_was_kept_is_the_reference(documents, seed, shape):
    model = tiny_model(seed)
    reference = tiny_model(seed ^ 1)
    kept = precompute_reference(reference, documents, **shape)
    for first in (model, tiny_model(seed ^ 2)):  # one run of the reference, several comparisons
        plain, again = (
            compare(first, other, documents, rng=np.random.default_rng(0), **shape)
            for other in (reference, kept)
        )
        np.testing.assert_allclose(again.token_kl, plain.token_kl, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(
            again.reference.nats, plain.reference.nats, rtol=0, atol=TOLERANCE
        )
        assert again.difference.mean == pytest.approx(plain.difference.mean, abs=TOLERANCE)
        assert again.kl.high == pytest.approx(plain.kl.high, abs=TOLERANCE)


def test_a_reference_that_was_kept_otherwise_is_rejected():
    model = tiny_model()
    tokens = list(range(1, 30))
    rng = np.random.default_rng(0)
    kept = precompute_reference(model, tokens, window=8, stride=4)
    with pytest.raises(ValueError, match="run with another window or stride"):
        compare(model, kept, tokens, rng=rng, window=8, stride=8)
    with pytest.raises(ValueError, match="read different tokens"):
        compare(model, kept, tokens[:-1], rng=rng, window=8, stride=4)


def test_the_unit_of_the_interval_is_stated():
    texts = ["some text that is long enough", "another text", "a third"]
    rng = np.random.default_rng(0)
    # a generator is read once
    by_block = compare(tiny_model(0), tiny_model(1), iter(texts), rng=rng, block=16)
    by_text = compare(
        tiny_model(0), tiny_model(1), texts, rng=rng, block=None, confidence=0.9, resamples=100
    )
    assert "4 blocks of 16 consecutive tokens" in by_block.method
    assert by_text.method == "90% percentile bootstrap, 100 resamples of 3 documents"
    assert by_block.kl.low < by_block.kl.mean < by_block.kl.high


def test_models_that_read_different_tokens_are_rejected():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="different tokens"):
        compare(tiny_model(vocab_size=257), tiny_model(vocab_size=300), "return self", rng=rng)
    # the beginning token decides what is scored
    with pytest.raises(ValueError, match="different tokens"):
        compare(tiny_model(), tiny_model(bos_token_id=None), "return self", rng=rng)


@given(seeds)
def test_divergence_in_the_array_standard(pure_xp, seed):
    z = np.random.default_rng(seed).standard_normal((2, 3, 5))
    log_p, log_q = (a - np.logaddexp.reduce(a, axis=-1, keepdims=True) for a in (z[0], z[1]))
    there = to_host(kl_divergence(pure_xp.asarray(log_p), pure_xp.asarray(log_q)))
    np.testing.assert_allclose(there, kl_divergence(log_p, log_q), rtol=1e-14)
