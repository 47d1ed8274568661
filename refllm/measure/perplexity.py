"""How well a model predicts text: loss, perplexity and bits per byte.

Every token but a document's first is scored exactly once, in sliding windows (see
``windows``).

| symbol    | name                                    | shape                           |
|-----------|-----------------------------------------|---------------------------------|
| z         | logits                                  | [rows, V], a few rows at a time |
| nats      | −log softmax(z)[target]                 | [T], T scored tokens            |
| bits/byte | Σ nats / (ln 2 · bytes of UTF-8 scored) |                                 |
| ppl       | exp(Σ nats / T)                         |                                 |

Perplexity depends on the tokenizer, bits per byte do not: compare models of different
vocabularies by bits per byte alone.

Sources: sliding windows as in Hugging Face's guide "Perplexity of fixed-length models";
bits per byte as in The Pile, Gao et al. 2020, §3.1.

Left out: normalising by words, downstream tasks. Losses are taken in float64 from the
model's own logits.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from refllm.array_types import Array
from refllm.backend import asarray_like, namespace, to_numpy
from refllm.errors import InputError
from refllm.measure.windows import (
    DocumentLike,
    LanguageModel,
    Window,
    WindowPlan,
    checked_windows,
    plan_windows,
)
from refllm.model.attention import Attend, CausalAttend
from refllm.model.llama import forward, logits

# lengths of the windows in a ragged batch → their ``attend``
AttendFactory = Callable[[list[int]], Attend]
Progress = Callable[[int, int], None]  # (tokens scored so far, tokens in all)
_ROWS = 128  # rows of logits at a time: 128 × V float64 values are a few megabytes


@dataclass(frozen=True)
class DocumentScore:
    """The summed loss of one document."""

    name: str
    tokens: int
    bytes: int
    nats: float

    @property
    def bits_per_byte(self) -> float:
        """NaN for a document of which no byte was scored."""
        if self.bytes:
            return self.nats / math.log(2) / self.bytes
        return math.nan


@dataclass(frozen=True, eq=False)
class Score:
    """The loss of every scored token, in the order of the text, and the sums over it."""

    nats: np.ndarray  # [T] float64
    token_bytes: np.ndarray  # [T] bytes of UTF-8 that each token stands for
    context: np.ndarray  # [T] tokens that the model saw before each
    document: np.ndarray  # [T] index into ``documents``
    documents: tuple[DocumentScore, ...]
    window: int
    stride: int
    seconds: float
    python: str  # held-out text may be the interpreter's own library, so its version counts

    @property
    def tokens(self) -> int:
        """T, the number of scored tokens."""
        return len(self.nats)

    @property
    def bytes(self) -> int:
        """Bytes of UTF-8 that the scored tokens stand for."""
        return int(self.token_bytes.sum())

    @property
    def nats_per_token(self) -> float:
        """Mean loss, as in training."""
        return float(self.nats.sum()) / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(nats per token); infinite where that overflows."""
        if self.nats_per_token < 709:
            return math.exp(self.nats_per_token)
        return math.inf

    @property
    def bits_per_byte(self) -> float:
        """NaN if the scored tokens stand for no byte at all (special tokens only)."""
        if self.bytes:
            return float(self.nats.sum()) / math.log(2) / self.bytes
        return math.nan


class PositionBin(NamedTuple):
    """The tokens that were predicted from ``low`` to ``high`` (inclusive) tokens of context."""

    low: int
    high: int
    tokens: int
    nats_per_token: float
    bits_per_byte: float


def evaluate(
    model: LanguageModel,
    documents: Iterable[DocumentLike] | DocumentLike,
    *,
    window: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    progress: Progress | None = None,
    attend: AttendFactory | None = None,
) -> Score:
    """Score texts (``str`` or ``corpus.Document``) or 1-D arrays of token ids; a single one
    is fine too.

    ``window`` is the most tokens that the model reads at once (default: its positions, 1,024
    at most), ``stride`` ≤ window how far the next window moves (default: half of it).
    ``max_tokens`` scores only that many, the first ones.
    ``attend(lengths)`` replaces the plain causal attention over a ragged batch of windows
    (to measure a lossy cache, for example). Needs ``_ROWS`` rows of logits in memory, not T.

    Raises
    ------
    ValueError
        if nothing can be scored, the window exceeds the model's positions, a token lies
        outside the vocabulary, or a logit is not finite (the message says where).
    """
    began = time.perf_counter()
    window, stride = checked_windows(model, window, stride)
    plan = plan_windows(model, documents, window, stride, max_tokens)
    nats = np.empty(len(plan.targets))
    for rows, hidden in hidden_chunks(plan, progress, [(model, attend)]):
        log_q = log_softmax(model, hidden[0], plan, rows.start)
        nats[rows] = to_numpy(target_loss(log_q, plan.targets[rows]))
    return summarise(plan, nats, window, stride, time.perf_counter() - began)


def bits_by_position(score: Score, edges: Sequence[int] | None = None) -> list[PositionBin]:
    """Loss by the length of the context: what more context gains.

    ``edges`` are the shortest contexts of each bin (default 1, 2, 3, 5, 9 …, so that bins
    end at powers of two); empty bins are left out. Score with ``stride = window``: every
    context length then occurs equally often, all through the text. With overlap the short
    contexts come from the beginnings of documents alone.
    """
    longest = int(score.context.max())
    if edges is None:
        edges = [1, *(2**k + 1 for k in range(longest.bit_length()))]
    else:
        edges = sorted(edges)
    bins = []
    for low, beyond in zip(edges, [*edges[1:], longest + 1], strict=True):
        inside = (score.context >= low) & (score.context < beyond)
        tokens = int(inside.sum())
        size = int(score.token_bytes[inside].sum())
        nats = float(score.nats[inside].sum())
        if tokens:
            bits = nats / math.log(2) / size if size else math.nan
            bins.append(PositionBin(low, beyond - 1, tokens, nats / tokens, bits))
    return bins


def hidden_chunks(
    plan: WindowPlan,
    progress: Progress | None,
    models: Sequence[tuple[LanguageModel, AttendFactory | None]],
) -> Iterator[tuple[slice, list[Array]]]:
    """Run the windows, and yield chunks of at most ``_ROWS`` scored tokens: their slice of
    the T tokens, and the hidden states [rows, N] of each model there.
    """
    at = 0
    for batch in plan.batches():
        hidden = [hidden_states(model, plan, batch, attend) for model, attend in models]
        for start in range(0, hidden[0].shape[0], _ROWS):
            part = [h[start : start + _ROWS] for h in hidden]  # [rows, N] each
            rows = slice(at, at + part[0].shape[0])
            yield rows, part
            at = rows.stop
            if progress is not None:
                progress(at, len(plan.targets))


def hidden_states(
    model: LanguageModel, plan: WindowPlan, batch: list[Window], attend: AttendFactory | None
) -> Array:
    """One forward pass over a ragged batch of windows → hidden states of the scored rows,
    [rows, N].
    """
    like = model.weights["norm"]
    lengths = [w.end - w.begin for w in batch]
    tokens = np.concatenate([plan.tokens[w.document][w.begin : w.end] for w in batch])
    positions = np.concatenate([np.arange(n) for n in lengths])
    # row indices in the batch: each window gives those from `first` on
    ends = np.cumsum(lengths)
    scored = np.concatenate(
        [np.arange(e - n + w.first, e) for w, n, e in zip(batch, lengths, ends, strict=True)]
    )
    if attend is None:
        attention: Attend = CausalAttend(lengths, model.config.sliding_window)
    else:
        attention = attend(lengths)
    move = [asarray_like(x, like) for x in (tokens, positions, scored)]
    hidden = forward(model.weights, model.config, move[0], move[1], attention)  # [tokens, N]
    return hidden[move[2]]  # [rows, N]


def log_softmax(model: LanguageModel, hidden: Array, plan: WindowPlan, first: int) -> Array:
    """hidden[rows, N] → log softmax of the logits, [rows, V] float64.

    ``first`` is the place of the first row among the T scored tokens. ValueError, which
    names the token, for a logit that is not finite.
    """
    xp = namespace(hidden)
    z = xp.astype(logits(model.weights, hidden), xp.float64)  # [rows, V]
    finite = xp.isfinite(z)
    if not bool(xp.all(finite)):
        bad = int(xp.argmin(xp.all(finite, axis=-1)))
        raise InputError(f"a logit is not finite where {plan.describe(first + bad)} is predicted")
    # the exponentials stay within [0, 1], their sum within [1, V]
    z -= xp.max(z, axis=-1, keepdims=True)
    z -= xp.log(xp.sum(xp.exp(z), axis=-1, keepdims=True))
    return z


def target_loss(log_q: Array, targets: np.ndarray) -> Array:
    """−log q[target]: log_q[rows, V], host targets[rows] → [rows].

    >>> target_loss(np.log([[0.25, 0.75], [0.5, 0.5]]), np.array([1, 0])).round(3).tolist()
    [0.288, 0.693]
    """
    xp = namespace(log_q)
    wanted = asarray_like(targets, log_q)[:, None]
    return -xp.take_along_axis(log_q, wanted, axis=-1)[:, 0]


def summarise(
    plan: WindowPlan, nats: np.ndarray, window: int, stride: int, seconds: float
) -> Score:
    """Sum up by document; a document of one token or none has a row of zeros."""
    count = len(plan.names)
    tokens = np.bincount(plan.document, minlength=count)
    size = np.bincount(plan.document, weights=plan.token_bytes, minlength=count)
    loss = np.bincount(plan.document, weights=nats, minlength=count)
    documents = tuple(
        DocumentScore(name, int(tokens[d]), int(size[d]), float(loss[d]))
        for d, name in enumerate(plan.names)
    )
    return Score(
        nats,
        plan.token_bytes,
        plan.context,
        plan.document,
        documents,
        window,
        stride,
        seconds,
        platform.python_version(),
    )
