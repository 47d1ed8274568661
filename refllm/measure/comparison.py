"""How far a model is from a reference model: KL divergence, top-1 agreement and difference of
loss, token by token, with paired intervals.

| symbol  | name                                      | shape     |
|---------|-------------------------------------------|-----------|
| p, q    | softmax(z) of the reference, of the model | [rows, V] |
| KL(p‖q) | Σ p (log p − log q), in nats              | [T]       |

Sources: KL and top-1 agreement with the unquantised model as llama.cpp's perplexity tool;
intervals, see ``bootstrap``.

Left out: comparing models of different vocabularies (bits per byte do that, see
``perplexity``).
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from refllm.array_types import Array
from refllm.backend import namespace, to_numpy
from refllm.errors import InputError
from refllm.measure.bootstrap import Interval, blocks, bootstrap_intervals
from refllm.measure.perplexity import (
    AttendFactory,
    Progress,
    Score,
    hidden_chunks,
    hidden_states,
    log_softmax,
    summarise,
    target_loss,
)
from refllm.measure.windows import (
    DocumentLike,
    LanguageModel,
    WindowPlan,
    as_documents,
    checked_windows,
    plan_windows,
)


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
class PrecomputedReference:
    """A reference model with its hidden states on some text, so that it runs once however
    many models are compared with it.
    """

    model: LanguageModel
    plan: WindowPlan
    hidden: Array  # [T, N] of the scored tokens


@dataclass(frozen=True, eq=False)
class _TokenValues:
    """What is compared, for each of the T tokens."""

    kl: np.ndarray  # [T]
    agreement: np.ndarray  # [T] bool
    model_nats: np.ndarray  # [T]
    reference_nats: np.ndarray  # [T]


def precompute_reference(
    reference: LanguageModel,
    documents: Iterable[DocumentLike] | DocumentLike,
    *,
    window: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
) -> PrecomputedReference:
    """Run ``reference`` once, for several calls of ``compare(model, …)`` on the same
    documents, window, stride and ``max_tokens``.
    """
    window, stride = checked_windows(reference, window, stride)
    plan = plan_windows(reference, documents, window, stride, max_tokens)
    parts = [hidden_states(reference, plan, batch, None) for batch in plan.batches()]
    return PrecomputedReference(reference, plan, namespace(*parts).concat(parts, axis=0))


def compare(
    model: LanguageModel,
    reference: LanguageModel | PrecomputedReference,
    documents: Iterable[DocumentLike] | DocumentLike,
    *,
    rng: np.random.Generator,
    window: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    block: int | None = 128,
    resamples: int = 2000,
    confidence: float = 0.95,
    progress: Progress | None = None,
    attend: AttendFactory | None = None,
) -> Comparison:
    """KL(reference ‖ model), top-1 agreement and difference of loss, each a mean over
    tokens with its interval.

    The intervals resample runs of ``block`` consecutive tokens, or whole documents if
    ``block`` is None (wider, and useful from a dozen documents on). ``attend`` is the
    attention of ``model``; the reference has the plain one. Both models must live in the
    same array library. ``reference`` may be what ``precompute_reference`` returned.

    Raises
    ------
    ValueError
        as ``evaluate``, and if the two disagree about the vocabulary or the tokens of a
        document.
    """
    began = time.perf_counter()
    items = as_documents(documents)
    window, stride = checked_windows(model, window, stride)
    if not isinstance(reference, PrecomputedReference):
        checked_windows(reference, window, stride)
    plan = plan_windows(model, items, window, stride, max_tokens)
    if isinstance(reference, PrecomputedReference):
        _check_same_tokens(model, reference.model, plan, reference.plan)
    else:
        other = plan_windows(reference, items, window, stride, max_tokens)
        _check_same_tokens(model, reference, plan, other)
    values = _compare_tokens(model, reference, plan, progress, attend)
    if block is None:
        units = plan.document
        unit = "documents"
    else:
        units = blocks(plan.document, block)
        unit = f"blocks of {block} consecutive tokens"
    over = (values.kl, values.agreement, values.model_nats - values.reference_nats)
    intervals = bootstrap_intervals(over, units, rng, resamples=resamples, confidence=confidence)
    count = len(set(units.tolist()))
    method = f"{confidence:.0%} percentile bootstrap, {resamples} resamples of {count} {unit}"
    seconds = time.perf_counter() - began
    return Comparison(
        kl=intervals[0],
        agreement=intervals[1],
        difference=intervals[2],
        model=summarise(plan, values.model_nats, window, stride, seconds),
        reference=summarise(plan, values.reference_nats, window, stride, seconds),
        token_kl=values.kl,
        token_agreement=values.agreement,
        method=method,
    )


def kl_divergence(log_p: Array, log_q: Array) -> Array:
    """KL(p ‖ q) = Σ p (log p − log q) in nats, over the last axis: log-probabilities [...,
    V] → [...].

    Rounding can leave −1e−16 where p and q are nearly equal; KL ≥ 0 (Gibbs), so that
    becomes 0.

    >>> kl_divergence(np.log([0.5, 0.5]), np.log([0.25, 0.75])).round(4).item()
    0.1438
    """
    xp = namespace(log_p, log_q)
    return xp.maximum(xp.sum(xp.exp(log_p) * (log_p - log_q), axis=-1), 0.0)


def _check_same_tokens(
    model: LanguageModel, reference: LanguageModel, plan: WindowPlan, other: WindowPlan
) -> None:
    """Reject a reference that reads other tokens, or was run with another window or stride."""
    same_vocabulary = model.config.vocab_size == reference.config.vocab_size
    if not same_vocabulary or not np.array_equal(plan.targets, other.targets):
        raise InputError(
            "compare: the two models read different tokens; KL needs one vocabulary and tokenizer"
        )
    if plan.windows != other.windows:
        raise InputError("compare: the reference was run with another window or stride")


def _compare_tokens(
    model: LanguageModel,
    reference: LanguageModel | PrecomputedReference,
    plan: WindowPlan,
    progress: Progress | None,
    attend: AttendFactory | None,
) -> _TokenValues:
    """Run both models (or only ``model``) and compare their predictions, a few rows at a time."""
    if isinstance(reference, PrecomputedReference):
        network = reference.model
        runs = [(model, attend)]
    else:
        network = reference
        runs = [(model, attend), (network, None)]
    count = len(plan.targets)
    found = _TokenValues(np.empty(count), np.empty(count, bool), np.empty(count), np.empty(count))
    for rows, hidden in hidden_chunks(plan, progress, runs):
        if isinstance(reference, PrecomputedReference):
            hidden_p = reference.hidden[rows]
        else:
            hidden_p = hidden[1]
        xp = namespace(hidden[0], hidden_p)
        log_q = log_softmax(model, hidden[0], plan, rows.start)  # [rows, V]
        log_p = log_softmax(network, hidden_p, plan, rows.start)
        targets = plan.targets[rows]
        found.model_nats[rows] = to_numpy(target_loss(log_q, targets))
        found.reference_nats[rows] = to_numpy(target_loss(log_p, targets))
        found.kl[rows] = to_numpy(kl_divergence(log_p, log_q))
        found.agreement[rows] = to_numpy(xp.argmax(log_q, axis=-1) == xp.argmax(log_p, axis=-1))
    return found
