"""Which token is predicted from which context: documents, their bytes, and sliding windows
over them.

A document is <bos> followed by its tokens, as in training. Windows of at most W inputs
start every S tokens; the first scores all of its rows, each later one only what the ones
before left, so that every token but the document's first is predicted exactly once, from at
least min(its index, W − S + 1) tokens of context.

| symbol | name                                             | shape    |
|--------|--------------------------------------------------|----------|
| W, S   | ``window``, ``stride``, 1 ≤ S ≤ W                |          |
| n      | tokens of a document, <bos> included             |          |
| T      | scored tokens of all documents                   | Σ (n − 1)|

Left out: packing several documents into one context; a last window moved back to be full
(more context, but the same tokens read twice as often).

<<MERGED>> The result of scoring text, token by token, and its sums: by document, and by
length of the context.

| symbol    | name                                    | shape |
|-----------|-----------------------------------------|-------|
| nats      | −log q[target] of every scored token    | [T]   |
| bits/byte | Σ nats / (ln 2 · bytes of UTF-8 scored) |       |
| ppl       | exp(Σ nats / T)                         |       |

Source: bits per byte as in The Pile, Gao et al. 2020, §3.1. Perplexity depends on the
tokenizer, bits per byte do not: compare models of different vocabularies by the latter
alone.

Left out: how the losses come about (see ``perplexity``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from refllm.checkpoints.tokenizer import Tokenizer
from refllm.corpus import Document
from refllm.model.config import ModelConfig
from refllm.model.llama import Weights

Text = str | Document | Sequence[int] | np.ndarray
_BATCH = 1024  # tokens of short windows that share one forward pass


class Network(Protocol):
    """What is measured: any record of configuration, weight tree and tokenizer."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def weights(self) -> Weights: ...
    @property
    def tokenizer(self) -> Tokenizer: ...


class Window(NamedTuple):
    """Inputs [begin, end) of a document; row r ≥ ``first`` predicts token begin + r + 1 and
    is scored.
    """

    document: int
    begin: int
    end: int
    first: int


@dataclass(frozen=True, eq=False)
class Plan:
    """Every window, and for each scored token, in order: what it is, and where it stands."""

    names: tuple[str, ...]
    tokens: tuple[np.ndarray, ...]  # of each document, <bos> included
    windows: tuple[Window, ...]
    targets: np.ndarray  # [T] token ids
    token_bytes: np.ndarray  # [T] bytes of UTF-8 that each stands for
    context: np.ndarray  # [T] tokens seen before each, within its window
    document: np.ndarray  # [T] index into ``names``

    def batches(self) -> Iterator[list[Window]]:
        """Consecutive windows that share a forward pass: short ones together, long ones
        alone.
        """
        batch: list[Window] = []
        for w in self.windows:
            if batch and sum(v.end - v.begin for v in batch) + w.end - w.begin > _BATCH:
                yield batch
                batch = []
            batch.append(w)
        if batch:
            yield batch

    def place(self, index: int) -> str:
        """Where the scored token ``index`` stands, for an error message."""
        document = int(self.document[index])
        nth = index - int(np.searchsorted(self.document, document)) + 1
        return f"token {nth} of document {self.names[document]!r}"


def windows(length: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, end, first) of every window over a document of ``length`` tokens; none if it
    has fewer than two.

    Raises
    ------
    ValueError
        unless 1 ≤ stride ≤ window.
    """
    if not 1 <= stride <= window:
        raise ValueError(
            f"windows: stride must be within 1..window, got stride {stride} and window {window}"
        )
    found = []  # targets 1..scored have been predicted
    scored = 0
    for begin in range(0, max(0, length - 1), stride):
        end = min(begin + window, length - 1)  # the last token is a target only
        found.append((begin, end, scored - begin))
        scored = end
        if end == length - 1:
            break
    return found


def plan(
    model: Network,
    documents: Iterable[Text] | Text,
    window: int,
    stride: int,
    max_tokens: int | None = None,
) -> Plan:
    """Tokenise ``documents``, cut them into windows, and lay out the scored tokens.

    Raises
    ------
    ValueError
        if there is nothing to score, a token lies outside the vocabulary, or ``max_tokens``
        is below 1.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    if (
        model.config.bos_token_id is not None
        and model.config.bos_token_id >= model.config.vocab_size
    ):
        raise ValueError(
            f"bos_token_id {model.config.bos_token_id} lies outside the model's vocabulary"
        )
    lengths_of = token_bytes(model.tokenizer, model.config.vocab_size)
    names = []
    tokens = []
    sizes = []
    budget = max_tokens
    for i, text in enumerate(as_documents(documents)):
        name, ids, size = _tokenize(model, text, f"document {i + 1}", lengths_of)
        if budget is not None:
            ids = ids[: budget + 1]
            size = size[: budget + 1]
            budget -= max(0, len(ids) - 1)
        names.append(name)
        tokens.append(ids)
        sizes.append(size)
        if budget == 0:
            break
    found = [
        Window(d, *w) for d, ids in enumerate(tokens) for w in windows(len(ids), window, stride)
    ]
    if not found:
        raise ValueError(
            "nothing to score: no document has two tokens, the beginning token included"
        )
    spans = [(w.document, slice(w.begin + w.first + 1, w.end + 1)) for w in found]
    return Plan(
        tuple(names),
        tuple(tokens),
        tuple(found),
        targets=np.concatenate([tokens[d][s] for d, s in spans]),
        token_bytes=np.concatenate([sizes[d][s] for d, s in spans]),
        context=np.concatenate([np.arange(w.first + 1, w.end - w.begin + 1) for w in found]),
        document=np.concatenate([np.full(s.stop - s.start, d) for d, s in spans]),
    )


def token_bytes(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """Bytes of UTF-8 that each token id stands for, [V]; exact for byte-level vocabularies.

    In a byte-level vocabulary each character of a token's spelling is one byte. In
    SentencePiece's spelling ``▁`` is a space and ``<0x0A>`` a byte. Added tokens count as
    their own text.
    """
    vocabulary: dict[str, int] = tokenizer.inner.get_vocab(with_added_tokens=True)
    added = tokenizer.inner.get_added_tokens_decoder()
    # "Ġ" is how byte-level vocabularies spell the space; elsewhere it is a letter
    byte_level = "Ġ" in vocabulary and tokenizer.decode([vocabulary["Ġ"]]) == " "
    # a vocabulary padded beyond the tokenizer's has ids of no bytes
    sizes = np.zeros(vocab_size, np.int64)
    for spelling, token in vocabulary.items():
        if token >= vocab_size:
            continue
        if byte_level and token not in added:
            sizes[token] = len(spelling)
        elif re.fullmatch("<0x[0-9A-Fa-f]{2}>", spelling):
            sizes[token] = 1
        else:
            sizes[token] = len(spelling.replace("▁", " ").encode())
    return sizes


def as_documents(documents: Iterable[Text] | Text) -> list[Text]:
    """One text, or one array of token ids, alone is a list of one document."""
    if isinstance(documents, (str, Document)) or (
        isinstance(documents, np.ndarray) and documents.ndim == 1
    ):
        return [documents]
    # bytes would pass for ids
    if isinstance(documents, (bytes, bytearray)) or not isinstance(documents, Iterable):
        raise ValueError(
            f"documents are texts or token ids, not {type(documents).__name__}: read or decode it first"
        )
    items: list[Text] = list(documents)  # type: ignore[arg-type]
    if items and all(isinstance(x, (int, np.integer)) for x in items):
        return [np.asarray(items)]
    return items


def _tokenize(
    model: Network, text: Text, name: str, sizes: np.ndarray
) -> tuple[str, np.ndarray, np.ndarray]:
    """Name, token ids with <bos> in front (if the model has one), and their bytes."""
    bos = model.config.bos_token_id
    vocab = model.config.vocab_size
    if isinstance(text, Document):
        name = text.name
        text = text.text
    ids = np.asarray(model.tokenizer.encode(text) if isinstance(text, str) else text)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise ValueError(
            f"{name}: expected a text or a 1-D array of token ids, got {ids.dtype} of shape {ids.shape}"
        )
    # the table below is indexed with these, and CuPy wraps a wrong index silently
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab:
        raise ValueError(f"{name}: a token lies outside the model's vocabulary of {vocab}")
    ids = ids.astype(np.int64)
    size = sizes[ids]
    if isinstance(text, str) and len(ids):
        # what the table cannot know (a space that the tokenizer puts before the text) falls
        # to the first token
        size[0] += len(text.encode()) - int(size.sum())
    if bos is not None and (isinstance(text, str) or not len(ids) or ids[0] != bos):
        ids = np.concatenate(([bos], ids))
        size = np.concatenate(([0], size))
    return name, ids, size


@dataclass(frozen=True)
class DocumentScore:
    """One row of the table by document."""

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
    """The loss of every scored token, in the order of the text, and what follows from it."""

    nats: np.ndarray  # [T] float64
    token_bytes: np.ndarray  # [T] bytes of UTF-8 that each token stands for
    context: np.ndarray  # [T] tokens that the model saw before each
    document: np.ndarray  # [T] index into ``documents``
    documents: tuple[DocumentScore, ...]
    window: int
    stride: int
    seconds: float
    python: str  # the held-out text is the interpreter's own: its version belongs to the number

    @property
    def tokens(self) -> int:
        return len(self.nats)

    @property
    def bytes(self) -> int:
        return int(self.token_bytes.sum())

    @property
    def nats_per_token(self) -> float:
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
    """The tokens that were predicted from ``low`` to ``high`` (inclusive) tokens of
    context.
    """

    low: int
    high: int
    tokens: int
    nats_per_token: float
    bits_per_byte: float


def bits_by_position(score: Score, edges: Sequence[int] | None = None) -> list[PositionBin]:
    """Loss by the length of the context: what more context buys.

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
