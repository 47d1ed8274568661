"""Calibration text: which token ids a network is shown while it is quantised.

Source: the windows of Frantar et al. 2022 (GPTQ), §5: equally long, drawn at random from
training text, by a seed.

Left out: choosing windows by their content, packing short documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from refllm.backend import to_numpy
from refllm.checkpoints.tokenizer import Tokenizer
from refllm.corpus import Document, training_documents

# characters of text that are encoded first for each token that is wanted: source code needs
# four
LIKELY = 8


def calibration_windows(
    tokenizer: Tokenizer,
    count: int,
    length: int,
    seed: int | np.random.Generator,
    *,
    documents: Sequence[Document] | None = None,
    begin: int | None = None,
) -> np.ndarray:
    """``count`` windows of ``length`` tokens of training text, never of the held-out
    modules: int64[count, length].

    Each begins with the line that holds a character drawn uniformly from ``documents``
    (default: the standard library), and goes on into the next document where its own ends,
    behind the id ``begin`` if one is given.
    """
    texts = [d.text for d in (training_documents() if documents is None else documents) if d.text]
    if count < 1 or length < 1 or not texts:
        raise ValueError(
            f"calibration_windows: no {count} windows of {length} tokens from {len(texts)} documents"
        )
    ends = np.cumsum([len(text) for text in texts])
    windows = []
    for place in np.random.default_rng(seed).integers(0, ends[-1], count).tolist():
        at = int(np.searchsorted(ends, place, side="right"))  # the document of that character
        character = place - int(ends[at]) + len(texts[at])
        text = texts[at][texts[at].rfind("\n", 0, character) + 1 :]
        ids = _encode(tokenizer, text, length)
        while len(ids) < length:
            at = (at + 1) % len(texts)
            ids += ([] if begin is None else [begin]) + _encode(tokenizer, texts[at], length)
        windows.append(ids[:length])
    return np.asarray(windows, dtype=np.int64)


def sequences(calibration: Any, vocab_size: int) -> list[list[int]]:
    """Token ids as lists: ``calibration`` is [B, S] of integers, or any number of 1-D
    sequences of token ids.

    Raises
    ------
    ValueError
        if there is none, one is empty or no sequence of integers, or an id lies outside the
        vocabulary.
    """
    found = []
    for i, row in enumerate(calibration):
        if hasattr(row, "shape"):
            ids = to_numpy(row).tolist()
        elif isinstance(row, Sequence):
            ids = list(row)
        else:
            ids = None
        if not isinstance(ids, list) or not ids or not all(_is_integer(token) for token in ids):
            raise ValueError(
                f"calibration: sequence {i} must be a non-empty sequence of token ids, got {row!r:.60}"
            )
        if not 0 <= min(ids) <= max(ids) < vocab_size:
            raise ValueError(
                f"calibration: sequence {i} holds a token outside the vocabulary of {vocab_size}"
            )
        found.append([int(token) for token in ids])
    if not found:
        raise ValueError("calibration: there is no text; pass at least one sequence of token ids")
    return found


def _encode(tokenizer: Tokenizer, text: str, length: int) -> list[int]:
    """At least the first ``length`` tokens of ``text``, all if it has fewer, without
    encoding a long text whole.
    """
    size = LIKELY * length
    while len(ids := tokenizer.encode(text[:size])) < length and size < len(text):
        size *= 2
    return ids


def _is_integer(token: Any) -> bool:
    return isinstance(token, (int, np.integer)) and not isinstance(token, bool)
