"""Losses against the plain loss and against brute force; KL, agreement and their guards."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.measure import perplexity
from refllm.measure.comparison import compare
from refllm.measure.perplexity import bits_by_position, evaluate
from refllm.model.attention import CausalAttend
from refllm.model.llama import build, forward, logits
from refllm.train.backward import mean_loss
from strategies import seeds
from tiny_models import Record, byte_tokenizer, tiny_config, tiny_model, tiny_params, uniform_model

EPS = np.finfo(np.float64).eps
# A loss passes through 2 layers of 7 products of up to 24 terms, and magnitudes of up to
# about 50.
TOLERANCE = 50 * 2 * 7 * 24 * EPS
token_lists = st.lists(st.integers(1, 256), min_size=1, max_size=40)
windowings = st.tuples(st.integers(1, 16), st.integers(1, 16)).map(
    lambda t: {"window": max(t), "stride": min(t)}
)


def brute_force(model, tokens, begin):
    """−log softmax of every token after the first, by one full forward over tokens[begin:]."""
    ids = np.asarray(tokens[begin:])
    hidden = forward(
        model.weights, model.config, ids, np.arange(len(ids)), CausalAttend([len(ids)])
    )
    z = logits(model.weights, hidden)
    return [
        _loss(row, t)
        for row, t in zip(z, ids[1:])  # noqa: B905
    ]


@given(token_lists, seeds, st.booleans())
@pytest.mark.theorem(
    "With a window of at least the document's length the score is the plain loss of one "
    "forward pass",
    source="refllm/measure/perplexity.py",
)
def test_one_window_is_the_plain_loss(tokens, seed, tied):
    config = tiny_config(tie_word_embeddings=tied)
    params = tiny_params(config, seed)
    model = Record(config, build(config, params), byte_tokenizer())
    score = evaluate(model, tokens, window=len(tokens), stride=1)
    assert score.nats_per_token == pytest.approx(
        mean_loss(params, config, np.asarray([[0, *tokens]])), abs=TOLERANCE
    )
    assert score.tokens == len(tokens)
    assert score.perplexity == pytest.approx(math.exp(score.nats_per_token))


@given(token_lists, windowings)
@pytest.mark.theorem(
    "The loss of a token in sliding windows is its loss in a forward pass over exactly its window",
    source="refllm/measure/perplexity.py",
)
def test_each_loss_is_that_of_its_window(tokens, shape):
    model = tiny_model()
    score = evaluate(model, tokens, **shape)
    document = [0, *tokens]
    expected = []
    for index in range(1, len(document)):
        # the first window that reaches the token: k with k·S + W ≥ index
        begin = max(0, -(-(index - shape["window"]) // shape["stride"])) * shape["stride"]
        expected.append(brute_force(model, document, begin)[index - begin - 1])
        assert score.context[index - 1] == index - begin
    np.testing.assert_allclose(score.nats, expected, rtol=0, atol=TOLERANCE)


@given(
    st.lists(token_lists, min_size=1, max_size=5),
    windowings,
    st.integers(1, 40),
    st.integers(1, 30),
)
def test_sharing_a_forward_pass_changes_nothing(documents, shape, batch, rows):
    """Invariance: documents scored together equal each scored alone, whatever the batch and
    chunk of rows.
    """
    model = tiny_model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("refllm.measure.windows._BATCH", batch)
        patch.setattr("refllm.measure.perplexity._ROWS", rows)
        together = evaluate(model, documents, **shape)
    alone = [evaluate(model, tokens, **shape) for tokens in documents]
    np.testing.assert_allclose(
        together.nats, np.concatenate([s.nats for s in alone]), rtol=0, atol=TOLERANCE
    )
    for row, score in zip(together.documents, alone, strict=True):
        assert (row.tokens, row.bytes) == (score.tokens, score.bytes)
        assert row.nats == pytest.approx(score.nats.sum(), abs=TOLERANCE * row.tokens)
        assert row.bits_per_byte == pytest.approx(score.bits_per_byte, abs=TOLERANCE * row.tokens)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60), windowings)
@pytest.mark.theorem(
    "A uniform model over the 256 bytes needs exactly 8 bits per byte, for any text and windows",
    source="Shannon 1948",
)
def test_uniform_bytes_cost_eight_bits(text, shape):
    # <bos> is an ordinary byte here: it is given, never predicted
    model = uniform_model(vocab_size=256)
    # one id a byte, without <|endoftext|>'s
    spelled = np.asarray(byte_tokenizer().encode(text)) - 1
    assert len(spelled) == len(text.encode())
    score = evaluate(model, np.concatenate(([0], spelled)), **shape)
    np.testing.assert_allclose(score.nats / math.log(2), 8.0, rtol=4 * EPS)
    assert score.tokens == len(text.encode())


@given(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60),
    st.integers(257, 300),
)
@pytest.mark.theorem(
    "A uniform model over V tokens scores log2(V) · tokens / bytes bits per byte, whatever the "
    "tokenisation",
    source="Shannon 1948",
)
def test_uniform_tokens_cost_log_v(text, vocab):
    score = evaluate(uniform_model(vocab_size=vocab), text, window=8, stride=3)
    assert score.bytes == len(text.encode())
    rounding = (score.tokens + 4) * EPS  # of a sum of equal terms; exp(x) multiplies it by x
    assert score.bits_per_byte == pytest.approx(
        math.log2(vocab) * score.tokens / score.bytes, rel=rounding
    )
    assert score.perplexity == pytest.approx(vocab, rel=rounding * math.log(vocab))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite_is_rejected_with_its_place(value):
    model = tiny_model()
    head = np.zeros((257, 16))
    bad = Record(
        model.config,
        model.weights | {"lm_head": _Poisoned(head, row=4, value=value)},
        model.tokenizer,
    )
    with pytest.raises(ValueError, match="not finite where token 2 of document 'document 2'"):
        evaluate(bad, ["abc", "defg"])  # rows 0–2 predict a, b, c; row 4 predicts e


@pytest.mark.parametrize(
    ("row", "place"),
    [
        (127, "token 128 of document 'document 1'"),
        (130, "token 131 of document 'document 1'"),
        (149, "token 150 of document 'document 1'"),
        (150, "token 1 of document 'document 2'"),
        (299, "token 150 of document 'document 2'"),
    ],
)
def test_the_place_of_a_bad_logit_counts_the_chunks_before_it(row, place):
    """Logits are computed for 128 tokens at a time."""
    model = tiny_model()
    head = _Poisoned(np.zeros((257, 16)), row, np.nan)
    bad = Record(model.config, model.weights | {"lm_head": head}, model.tokenizer)
    with pytest.raises(ValueError, match=f"not finite where {place} is predicted"):
        evaluate(bad, ["a" * 150, "b" * 150])
    head.done = 0
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=f"not finite where {place} is predicted"):
        compare(bad, model, ["a" * 150, "b" * 150], rng=rng)


class _Poisoned:
    """A head whose logits are 0 but for one entry of one row, counted over all calls."""

    def __init__(self, weight, row, value):
        self.weight = weight
        self.row = row
        self.value = value
        self.done = 0

    def matmul(self, x):
        z = x @ self.weight.T
        if 0 <= self.row - self.done < len(z):
            z[self.row - self.done, 7] = self.value
        self.done += len(z)
        return z


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_losses_are_float64_of_the_model_s_own_logits(scale):
    """float32 logits are exact in float64; a log softmax in float32 would be 1e-7 off."""
    model = tiny_model(dtype="float32")
    head = _Kept(model.weights["lm_head"], np.float32(scale))
    scaled = Record(model.config, model.weights | {"lm_head": head}, model.tokenizer)
    tokens = list(range(1, 120))
    score = evaluate(scaled, tokens)
    assert head.logits.dtype == np.float32
    assert score.nats.dtype == np.float64
    expected = [_loss(row, t) for row, t in zip(head.logits, tokens, strict=True)]
    # V + 4 roundings of float64 in the sum and its logarithm, and one of the result
    np.testing.assert_allclose(score.nats, expected, rtol=300 * EPS, atol=300 * EPS)


def _loss(logits_of_row, target):
    row = logits_of_row.astype(np.float64)
    return math.log(math.fsum(np.exp(row - row.max()))) + row.max() - row[target]


class _Kept:
    """A head that multiplies its logits and keeps the last ones."""

    def __init__(self, head, scale):
        self.head = head
        self.scale = scale

    def matmul(self, x):
        self.logits = self.head.matmul(x) * self.scale
        return self.logits.copy()


def test_documents_without_a_token_have_a_row_of_zeros():
    score = evaluate(tiny_model(), ["", "ab", "", "c", ""])
    assert [(d.tokens, d.bytes) for d in score.documents] == [
        (0, 0),
        (2, 2),
        (0, 0),
        (1, 1),
        (0, 0),
    ]
    for empty in (0, 2, 4):
        assert math.isnan(score.documents[empty].bits_per_byte)
        assert score.documents[empty].nats == 0
    assert sum(d.nats for d in score.documents) == pytest.approx(score.nats.sum())


def test_special_tokens_alone_have_no_bits_per_byte():
    # ids 257 … are in the model's padded vocabulary, not in the tokenizer's
    config = tiny_config(vocab_size=260)
    model = Record(config, tiny_model(vocab_size=260).weights, byte_tokenizer())
    score = evaluate(model, [258, 259])
    assert score.tokens == 2
    assert math.isnan(score.bits_per_byte)
    assert math.isnan(bits_by_position(score)[0].bits_per_byte)


def test_another_memory_can_be_measured():
    """``attend`` replaces the attention: one that returns zeros predicts from the last
    token alone.
    """
    model = tiny_model()
    seen = []

    def forgetful(lengths):
        seen.append(lengths)
        return lambda layer, q, k, v: np.zeros_like(q)

    ids = [5, 6, 5, 6, 5]
    score = evaluate(model, [ids, ids], attend=forgetful)
    assert seen == [[5, 5]]
    assert score.nats[1] == pytest.approx(score.nats[3])  # 6 after 5, twice
    c = compare(model, model, ids, rng=np.random.default_rng(0), attend=forgetful)
    assert c.kl.mean > 0  # the reference keeps its plain attention


def test_progress_counts_tokens():
    calls = []
    evaluate(
        tiny_model(),
        [1] * 300,
        window=200,
        stride=100,
        progress=lambda done, total: calls.append((done, total)),
    )
    # two windows share a pass, in chunks of 128 rows
    assert calls == [(128, 300), (256, 300), (300, 300)]


def test_the_interpreter_is_named(monkeypatch):
    monkeypatch.setattr(perplexity.platform, "python_version", lambda: "3.99.1")
    score = evaluate(tiny_model(), "abc", window=7, stride=5)
    assert (score.python, score.window, score.stride) == ("3.99.1", 7, 5)
    assert score.seconds > 0


def test_the_loss_is_the_same_on_every_backend(xp):
    text = "def f(x):\n    return x\n"
    there = evaluate(tiny_model(xp=xp, dtype="float32"), text, window=16, stride=4)
    here = evaluate(tiny_model(dtype="float32"), text, window=16, stride=4)
    assert isinstance(there.nats, np.ndarray)
    np.testing.assert_allclose(
        there.nats, here.nats, rtol=0, atol=TOLERANCE * np.finfo(np.float32).eps / EPS
    )
    c = compare(
        tiny_model(1, xp=xp), tiny_model(0, xp=xp), text, rng=np.random.default_rng(0), resamples=10
    )
    d = compare(tiny_model(1), tiny_model(0), text, rng=np.random.default_rng(0), resamples=10)
    np.testing.assert_allclose(c.token_kl, d.token_kl, rtol=0, atol=50 * TOLERANCE)
