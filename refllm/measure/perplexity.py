"""How well a model predicts text: loss, perplexity, bits per byte, and its distance from a
reference model.

Every token but a document's first is scored exactly once, in sliding windows (see
``windows``).

| symbol   | name                                     | shape                             |
|----------|------------------------------------------|-----------------------------------|
| z        | logits                                   | [rows, V], a few rows at a time   |
| nats     | −log softmax(z)[target]                  | [T], T scored tokens              |
| bits/byte| Σ nats / (ln 2 · bytes of UTF-8 scored)  | comparable between vocabularies   |
| p, q     | softmax(z) of the reference, of the model| [rows, V]                         |
| KL(p‖q)  | Σ p (log p − log q)                      | [T]                               |

Sources: sliding windows as in Hugging Face's guide "Perplexity of fixed-length models";
bits per byte as in The Pile, Gao et al. 2020, §3.1; KL and top-1 agreement with the
unquantised model as llama.cpp's perplexity tool.

Left out: normalising by words, downstream tasks. Losses are taken in float64 from the
model's own logits.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from refllm.backend import Array, asarray_like, namespace, to_numpy
from refllm.measure.bootstrap import Interval, blocks, bootstrap
from refllm.measure.windows import (
    DocumentScore,
    Network,
    Plan,
    PositionBin,
    Score,
    Text,
    Window,
    as_documents,
    bits_by_position,
    plan,
)
from refllm.model.attention import Attend, CausalAttend
from refllm.model.llama import forward, logits

__all__ = [
    "Comparison", "DocumentScore", "Kept", "PositionBin", "Score", "bits_by_position", "compare", "divergence",
    "evaluate", "keep",
]  # fmt: skip

# lengths of the windows in a ragged batch → their ``attend``
Memory = Callable[[list[int]], Attend]
Progress = Callable[[int, int], None]  # (tokens scored so far, tokens in all)
_ROWS = 128  # rows of logits at a time: 128 × V numbers in float64 are a few megabytes


@dataclass(frozen=True, eq=False)
class Comparison:
    """A model against a reference on the same tokens; every interval is paired (see
    ``bootstrap``).
    """

    kl: Interval  # nats, KL(reference ‖ model)
    agreement: Interval  # share of tokens at which both have the same argmax
    difference: Interval  # nats per token: loss of the model − loss of the reference
    model: Score  # ``seconds`` is the time of both together
    reference: Score
    token_kl: np.ndarray  # [T]
    token_agreement: np.ndarray  # [T] bool
    method: str  # how the intervals were made, in words


@dataclass(frozen=True, eq=False)
class Kept:
    """A reference whose hidden states on some text are kept: it runs once, however many
    models are compared.
    """

    network: Network
    plan: Plan
    hidden: Array  # [T, N] of the scored tokens


def keep(
    reference: Network,
    documents: Iterable[Text] | Text,
    *,
    window: int = 1024,
    stride: int = 512,
    max_tokens: int | None = None,
) -> Kept:
    """Run ``reference`` for ``compare(model, kept, …)`` on the same documents, window,
    stride and ``max_tokens``.
    """
    whole = plan(reference, documents, window, stride, max_tokens)
    parts = [_hidden(reference, whole, batch, None) for batch in whole.batches()]
    return Kept(reference, whole, namespace(*parts).concat(parts, axis=0))


def evaluate(
    model: Network,
    documents: Iterable[Text] | Text,
    *,
    window: int = 1024,
    stride: int = 512,
    max_tokens: int | None = None,
    progress: Progress | None = None,
    attend: Memory | None = None,
) -> Score:
    """Score texts (``str`` or ``corpus.Document``) or 1-D arrays of token ids; one of them
    alone is fine too.

    ``window`` is the most tokens that the model reads at once, ``stride`` ≤ window how far
    the next one moves. ``max_tokens`` scores the first so many only. ``attend(lengths)``
    replaces the plain causal attention over a ragged batch of windows (to measure a lossy
    cache, say). Needs ``_ROWS`` rows of logits in memory, not T.

    Raises
    ------
    ValueError
        if nothing can be scored, a token lies outside the vocabulary, or a logit is not
        finite (says where).
    """
    began = time.perf_counter()
    whole = plan(model, documents, window, stride, max_tokens)
    nats = np.empty(len(whole.targets))
    for rows, hidden in _passes(whole, progress, [(model, attend)]):
        log_q = _log_softmax(model, hidden[0], whole, rows.start)
        nats[rows] = to_numpy(_loss(log_q, whole.targets[rows]))
    return _score(whole, nats, window, stride, time.perf_counter() - began)


def compare(
    model: Network,
    reference: Network | Kept,
    documents: Iterable[Text] | Text,
    *,
    rng: np.random.Generator,
    window: int = 1024,
    stride: int = 512,
    max_tokens: int | None = None,
    block: int | None = 128,
    resamples: int = 2000,
    confidence: float = 0.95,
    progress: Progress | None = None,
    attend: Memory | None = None,
) -> Comparison:
    """KL(reference ‖ model), top-1 agreement and difference of loss, each a mean over
    tokens with its interval.

    The intervals resample runs of ``block`` consecutive tokens, or whole documents if
    ``block`` is None (wider, and of use from a dozen documents on). ``attend`` is the
    memory of ``model``; the reference has the plain one. Both models must live in the same
    array library. What ``keep`` returned may stand for the reference.

    Raises
    ------
    ValueError
        as ``evaluate``, and if the two disagree about the vocabulary or the tokens of a
        document.
    """
    began = time.perf_counter()
    texts = as_documents(documents)
    whole = plan(model, texts, window, stride, max_tokens)
    kept = reference if isinstance(reference, Kept) else None
    if isinstance(reference, Kept):
        network = reference.network
    else:
        network = reference
    if kept is None:
        other = plan(network, texts, window, stride, max_tokens)
    else:
        other = kept.plan
    if model.config.vocab_size != network.config.vocab_size or not np.array_equal(
        whole.targets, other.targets
    ):
        raise ValueError(
            "compare: the two models read different tokens; KL needs one vocabulary and tokenizer"
        )
    if whole.windows != other.windows:
        raise ValueError("compare: the reference was kept with another window or stride")
    count = len(whole.targets)
    nats_q = np.empty(count)
    nats_p = np.empty(count)
    kl = np.empty(count)
    same = np.empty(count, bool)
    for rows, hidden in _passes(
        whole, progress, [(model, attend)] if kept else [(model, attend), (network, None)]
    ):
        hidden_p = kept.hidden[rows] if kept else hidden[1]
        xp = namespace(hidden[0], hidden_p)
        targets = whole.targets[rows]
        log_q = _log_softmax(model, hidden[0], whole, rows.start)
        log_p = _log_softmax(network, hidden_p, whole, rows.start)
        nats_q[rows] = to_numpy(_loss(log_q, targets))
        nats_p[rows] = to_numpy(_loss(log_p, targets))
        kl[rows] = to_numpy(divergence(log_p, log_q))
        same[rows] = to_numpy(xp.argmax(log_q, axis=-1) == xp.argmax(log_p, axis=-1))
    if block is None:
        units = whole.document
    else:
        units = blocks(whole.document, block)
    over = (kl, same, nats_q - nats_p)
    intervals = bootstrap(over, units, rng, resamples=resamples, confidence=confidence)
    if block is None:
        unit = "documents"
    else:
        unit = f"blocks of {block} consecutive tokens"
    method = f"{confidence:.0%} percentile bootstrap, {resamples} resamples of {len(set(units.tolist()))} {unit}"
    seconds = time.perf_counter() - began
    score_q, score_p = (_score(whole, nats, window, stride, seconds) for nats in (nats_q, nats_p))
    return Comparison(intervals[0], intervals[1], intervals[2], score_q, score_p, kl, same, method)


def divergence(log_p: Array, log_q: Array) -> Array:
    """KL(p ‖ q) = Σ p (log p − log q) in nats, over the last axis: log-probabilities [...,
    V] → [...].

    Rounding can leave −1e−16 where p and q are nearly equal; KL ≥ 0 (Gibbs), so that
    becomes 0.
    """
    xp = namespace(log_p, log_q)
    return xp.maximum(xp.sum(xp.exp(log_p) * (log_p - log_q), axis=-1), 0.0)


def _passes(
    whole: Plan, progress: Progress | None, models: Sequence[tuple[Network, Memory | None]]
) -> Iterator[tuple[slice, list[Array]]]:
    """Run the windows; yield slices of the T scored tokens, and each model's hidden states
    [rows, N] there.
    """
    at = 0
    for batch in whole.batches():
        hidden = [_hidden(model, whole, batch, attend) for model, attend in models]
        for start in range(0, hidden[0].shape[0], _ROWS):
            part = [h[start : start + _ROWS] for h in hidden]
            rows = slice(at, at + part[0].shape[0])
            yield rows, part
            at = rows.stop
            if progress is not None:
                progress(at, len(whole.targets))


def _hidden(model: Network, whole: Plan, batch: list[Window], attend: Memory | None) -> Array:
    """One forward pass over a ragged batch of windows → hidden states of the scored rows,
    [rows, N].
    """
    like = model.weights["norm"]
    lengths = [w.end - w.begin for w in batch]
    tokens = np.concatenate([whole.tokens[w.document][w.begin : w.end] for w in batch])
    positions = np.concatenate([np.arange(n) for n in lengths])
    # row indices in the batch: each window gives those from `first` on
    ends = np.cumsum(lengths)
    scored = np.concatenate(
        [np.arange(e - n + w.first, e) for w, n, e in zip(batch, lengths, ends, strict=True)]
    )
    memory = (
        CausalAttend(lengths, model.config.sliding_window) if attend is None else attend(lengths)
    )
    move = [asarray_like(x, like) for x in (tokens, positions, scored)]
    return forward(model.weights, model.config, move[0], move[1], memory)[move[2]]


def _log_softmax(model: Network, hidden: Array, whole: Plan, first: int) -> Array:
    """hidden[rows, N] → log softmax of the logits, [rows, V] float64."""
    xp = namespace(hidden)
    z = xp.astype(logits(model.weights, hidden), xp.float64)
    finite = xp.isfinite(z)
    if not bool(xp.all(finite)):
        bad = int(xp.argmin(xp.all(finite, axis=-1)))
        raise ValueError(f"a logit is not finite where {whole.place(first + bad)} is predicted")
    # the exponentials stay within [0, 1], their sum within [1, V]
    z -= xp.max(z, axis=-1, keepdims=True)
    z -= xp.log(xp.sum(xp.exp(z), axis=-1, keepdims=True))
    return z


def _loss(log_q: Array, targets: np.ndarray) -> Array:
    """−log q[target]: [rows, V], host targets[rows] → [rows]."""
    xp = namespace(log_q)
    wanted = asarray_like(targets, log_q)[:, None]
    return -xp.take_along_axis(log_q, wanted, axis=-1)[:, 0]


def _score(whole: Plan, nats: np.ndarray, window: int, stride: int, seconds: float) -> Score:
    """Sum up by document; a document of one token or none has a row of zeros."""
    count = len(whole.names)
    tokens = np.bincount(whole.document, minlength=count)
    size = np.bincount(whole.document, weights=whole.token_bytes, minlength=count)
    loss = np.bincount(whole.document, weights=nats, minlength=count)
    table = tuple(
        DocumentScore(name, int(tokens[d]), int(size[d]), float(loss[d]))
        for d, name in enumerate(whole.names)
    )
    return Score(
        nats,
        whole.token_bytes,
        whole.context,
        whole.document,
        table,
        window,
        stride,
        seconds,
        platform.python_version(),
    )
