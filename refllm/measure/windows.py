"""Which token is predicted from which context: documents, their bytes, and the sliding
windows over them.

A document is <bos> followed by its tokens, as in training. Windows of at most W inputs
start every S tokens; the first scores all of its rows, each later one only the tokens that
no earlier window has scored, so that every token but the document's first is predicted
exactly once, from at least min(its index, W − S + 1) tokens of context.

| symbol | name                                 | shape     |
|--------|--------------------------------------|-----------|
| W, S   | ``window``, ``stride``, 1 ≤ S ≤ W    |           |
| n      | tokens of a document, <bos> included |           |
| T      | scored tokens of all documents       | Σ (n − 1) |

Left out: packing several documents into one context; a last window moved back to be full
(more context, but the same tokens read twice as often).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from refllm.checkpoints.tokenizer import Tokenizer
from refllm.corpus import Document
from refllm.errors import InputError
from refllm.model.config import ModelConfig
from refllm.model.llama import Weights

DocumentLike = str | Document | Sequence[int] | np.ndarray  # a text, or its token ids
_WINDOW = 1024
_BATCH = 1024  # tokens of short windows that share one forward pass


class LanguageModel(Protocol):
    """What is measured: any record of configuration, weight tree and tokenizer."""

    @property
    def config(self) -> ModelConfig:
        """Sizes of the network."""

    @property
    def weights(self) -> Weights:
        """The weight tree that ``model.llama.forward`` takes."""

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to token ids and back."""


class Window(NamedTuple):
    """Inputs [begin, end) of a document; the rows r ≥ ``first`` are scored, and row r
    predicts token begin + r + 1.
    """

    document: int
    begin: int
    end: int
    first: int


@dataclass(frozen=True, eq=False)
class WindowPlan:
    """Every window, and for each scored token, in order: its id, its bytes and its place."""

    names: tuple[str, ...]
    tokens: tuple[np.ndarray, ...]  # of each document, <bos> included
    windows: tuple[Window, ...]
    targets: np.ndarray  # [T] token ids
    token_bytes: np.ndarray  # [T] bytes of UTF-8 that each stands for
    context: np.ndarray  # [T] tokens seen before each, within its window
    document: np.ndarray  # [T] index into ``names``

    def batches(self) -> Iterator[list[Window]]:
        """Consecutive windows that share a forward pass: short ones together, long ones alone."""
        batch: list[Window] = []
        for w in self.windows:
            if batch and sum(v.end - v.begin for v in batch) + w.end - w.begin > _BATCH:
                yield batch
                batch = []
            batch.append(w)
        if batch:
            yield batch

    def describe(self, index: int) -> str:
        """Name the scored token ``index`` by its document, for an error message."""
        document = int(self.document[index])
        nth = index - int(np.searchsorted(self.document, document)) + 1
        return f"token {nth} of document {self.names[document]!r}"


def default_windows(positions: int) -> tuple[int, int]:
    """(window, stride) for a model of ``positions``: 1,024 tokens at most, every half of them.

    >>> default_windows(4096), default_windows(256)
    ((1024, 512), (256, 128))
    """
    window = min(_WINDOW, positions)
    return window, max(1, window // 2)


def checked_windows(
    model: LanguageModel, window: int | None, stride: int | None
) -> tuple[int, int]:
    """(window, stride), by default those of ``default_windows``, and half of the window.

    ValueError for a window beyond the model's positions: what it computes there, it has never
    been trained for, and a score would say nothing of it.
    """
    positions = model.config.max_position_embeddings
    if window is None:
        window = default_windows(positions)[0]
    if window > positions:
        raise InputError(
            f"a window of {window} tokens is longer than the model's {positions} positions: "
            f"take window={positions} or less"
        )
    return window, max(1, window // 2) if stride is None else stride


def windows(length: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, end, first) of every window over a document of ``length`` tokens; none if it
    has fewer than two.

    The last token is a target only, so a document of 10 tokens has 9 inputs:

    >>> windows(10, window=6, stride=3)
    [(0, 6, 0), (3, 9, 3)]

    Raises
    ------
    ValueError
        unless 1 ≤ stride ≤ window.
    """
    if not 1 <= stride <= window:
        raise InputError(
            f"windows: stride must be within 1..window, got stride {stride} and window {window}"
        )
    found = []
    scored = 0  # targets 1..scored have been predicted
    for begin in range(0, max(0, length - 1), stride):
        end = min(begin + window, length - 1)
        found.append((begin, end, scored - begin))
        scored = end
        if end == length - 1:
            break
    return found


def plan_windows(
    model: LanguageModel,
    documents: Iterable[DocumentLike] | DocumentLike,
    window: int,
    stride: int,
    max_tokens: int | None = None,
) -> WindowPlan:
    """Tokenise ``documents``, cut them into windows, and lay out the scored tokens.

    Raises
    ------
    ValueError
        if there is nothing to score, a token lies outside the vocabulary, or ``max_tokens``
        is below 1.
    """
    names, tokens, sizes = _tokenize_all(model, documents, max_tokens)
    found = [
        Window(d, *w) for d, ids in enumerate(tokens) for w in windows(len(ids), window, stride)
    ]
    if not found:
        raise InputError(
            "nothing to score: no document has two tokens, the beginning token included"
        )
    spans = [(w.document, slice(w.begin + w.first + 1, w.end + 1)) for w in found]
    return WindowPlan(
        tuple(names),
        tuple(tokens),
        tuple(found),
        targets=np.concatenate([tokens[d][s] for d, s in spans]),
        token_bytes=np.concatenate([sizes[d][s] for d, s in spans]),
        context=np.concatenate([np.arange(w.first + 1, w.end - w.begin + 1) for w in found]),
        document=np.concatenate([np.full(s.stop - s.start, d) for d, s in spans]),
    )


def _tokenize_all(
    model: LanguageModel, documents: Iterable[DocumentLike] | DocumentLike, max_tokens: int | None
) -> tuple[list[str], list[np.ndarray], list[np.ndarray]]:
    """Names, token ids and bytes of each document, up to ``max_tokens`` scored tokens."""
    bos = model.config.bos_token_id
    if max_tokens is not None and max_tokens < 1:
        raise InputError(f"max_tokens must be at least 1, got {max_tokens}")
    if bos is not None and bos >= model.config.vocab_size:
        raise InputError(f"bos_token_id {bos} lies outside the model's vocabulary")
    lengths_of = token_bytes(model.tokenizer, model.config.vocab_size)
    names = []
    tokens = []
    sizes = []
    budget = max_tokens
    for i, document in enumerate(as_documents(documents)):
        name, ids, size = _tokenize(model, document, f"document {i + 1}", lengths_of)
        if budget is not None:
            ids = ids[: budget + 1]
            size = size[: budget + 1]
            budget -= max(0, len(ids) - 1)
        names.append(name)
        tokens.append(ids)
        sizes.append(size)
        if budget == 0:
            break
    return names, tokens, sizes


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
    # ids of a vocabulary that is padded beyond the tokenizer's stand for no bytes
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


def as_documents(documents: Iterable[DocumentLike] | DocumentLike) -> list[DocumentLike]:
    """A list of documents; one text, or one array of token ids, is a list of one.

    >>> as_documents("one text")
    ['one text']
    >>> [document.tolist() for document in as_documents([5, 6, 7])]
    [[5, 6, 7]]
    """
    if isinstance(documents, (str, Document)) or (
        isinstance(documents, np.ndarray) and documents.ndim == 1
    ):
        return [documents]
    # bytes would pass for ids
    if isinstance(documents, (bytes, bytearray)) or not isinstance(documents, Iterable):
        raise InputError(
            f"documents are texts or token ids, not {type(documents).__name__}: "
            "read or decode it first"
        )
    items: list[DocumentLike] = list(documents)  # type: ignore[arg-type]
    if items and all(isinstance(x, (int, np.integer)) for x in items):
        return [np.asarray(items)]
    return items


def _tokenize(
    model: LanguageModel, document: DocumentLike, name: str, sizes: np.ndarray
) -> tuple[str, np.ndarray, np.ndarray]:
    """Name, token ids with <bos> in front (if the model has one), and their bytes."""
    bos = model.config.bos_token_id
    vocab = model.config.vocab_size
    text: str | Sequence[int] | np.ndarray
    if isinstance(document, Document):
        name = document.name
        text = document.text
    else:
        text = document
    ids = np.asarray(model.tokenizer.encode(text) if isinstance(text, str) else text)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise InputError(
            f"{name}: expected a text or a 1-D array of token ids, "
            f"got {ids.dtype} of shape {ids.shape}"
        )
    # the table below is indexed with these, and CuPy wraps a wrong index silently
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab:
        raise InputError(f"{name}: a token lies outside the model's vocabulary of {vocab}")
    ids = ids.astype(np.int64)
    size = sizes[ids]
    if isinstance(text, str) and len(ids):
        # what the table cannot know (a space that the tokenizer puts before the text) counts
        # for the first token
        size[0] += len(text.encode()) - int(size.sum())
    if bos is not None and (isinstance(text, str) or not len(ids) or ids[0] != bos):
        ids = np.concatenate(([bos], ids))
        size = np.concatenate(([0], size))  # mutate: equivalent (never scored)
    return name, ids, size
