"""Calibration data: which token ids a network sees while it is quantised.

Source: the windows of Frantar et al. 2022 (GPTQ), §5: equally long, drawn at random from
training text, with a seed.

Left out: choosing windows by their content, packing short documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np

from refllm.backend import Array, to_numpy
from refllm.checkpoints.tokenizer import Tokenizer
from refllm.corpus import Document, training_documents
from refllm.errors import InputError

# token ids [B, S], or sequences of different lengths
Calibration: TypeAlias = Array | Iterable[Array | Sequence[int]]

# characters that are tokenised first per token that is wanted: source code needs four
CHARACTERS_PER_TOKEN = 8


def calibration_windows(
    tokenizer: Tokenizer,
    count: int,
    length: int,
    seed: int | np.random.Generator,
    *,
    documents: Sequence[Document] | None = None,
    begin: int | None = None,
) -> np.ndarray:
    """``count`` windows of ``length`` tokens of training text, never of the held-out modules:
    int64[count, length].

    Each starts at the beginning of the line that holds a character drawn uniformly from
    ``documents`` (default: the standard library). Where its document ends the window
    continues with the next one, after the id ``begin`` if one is given.
    """
    texts = [d.text for d in (training_documents() if documents is None else documents) if d.text]
    if count < 1 or length < 1 or not texts:
        raise InputError(
            f"calibration_windows: no {count} windows of {length} tokens from {len(texts)} "
            "documents"
        )
    ends = np.cumsum([len(text) for text in texts])
    windows = []
    for place in np.random.default_rng(seed).integers(0, ends[-1], count).tolist():
        at = int(np.searchsorted(ends, place, side="right"))  # the document of that character
        character = place - int(ends[at]) + len(texts[at])
        text = texts[at][texts[at].rfind("\n", 0, character) + 1 :]
        ids = _tokenize(tokenizer, text, length)
        while len(ids) < length:
            at = (at + 1) % len(texts)
            if begin is not None:
                ids.append(begin)
            ids += _tokenize(tokenizer, texts[at], length)
        windows.append(ids[:length])
    return np.asarray(windows, dtype=np.int64)


def sequences(calibration: Calibration, vocab_size: int) -> list[list[int]]:
    """Token ids as lists: ``calibration`` is an integer array [B, S], or an iterable of 1-D
    sequences of token ids.

    Raises
    ------
    ValueError
        if there is no sequence, one is empty or not of integers, or an id lies outside the
        vocabulary.

    >>> sequences([[1, 2, 3], (4,)], vocab_size=5)
    [[1, 2, 3], [4]]
    """
    found = []
    for i, row in enumerate(calibration):
        ids = to_numpy(row).tolist() if hasattr(row, "shape") else row
        if not isinstance(ids, Sequence) or not ids or not all(map(_is_integer, ids)):
            raise InputError(
                f"calibration: sequence {i} must be a non-empty sequence of token ids, got "
                f"{row!r:.60}"
            )
        if not 0 <= min(ids) <= max(ids) < vocab_size:
            raise InputError(
                f"calibration: sequence {i} holds a token outside the vocabulary of {vocab_size}"
            )
        found.append([int(token) for token in ids])
    if not found:
        raise InputError("calibration: there is no sequence; pass at least one of token ids")
    return found


def _tokenize(tokenizer: Tokenizer, text: str, length: int) -> list[int]:
    """At least the first ``length`` tokens of ``text``, or all if it has fewer; a long text is
    not tokenised beyond them.
    """
    size = CHARACTERS_PER_TOKEN * length
    while len(ids := tokenizer.encode(text[:size])) < length and size < len(text):
        size *= 2
    return ids


def _is_integer(token: object) -> bool:
    """Whether ``token`` is an integer of Python or NumPy, and not a bool."""
    return isinstance(token, (int, np.integer)) and not isinstance(token, bool)
