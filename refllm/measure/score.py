"""The result of scoring text, token by token, and its sums: by document, and by length of the context.

| symbol    | name                                    | shape |
|-----------|-----------------------------------------|-------|
| nats      | −log q[target] of every scored token    | [T]   |
| bits/byte | Σ nats / (ln 2 · bytes of UTF-8 scored) |       |
| ppl       | exp(Σ nats / T)                         |       |

Source: bits per byte as in The Pile, Gao et al. 2020, §3.1. Perplexity depends on the tokenizer, bits per byte
do not: compare models of different vocabularies by the latter alone.

Left out: how the losses come about (see ``perplexity``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


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
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan


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
        return math.exp(self.nats_per_token) if self.nats_per_token < 709 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """NaN if the scored tokens stand for no byte at all (special tokens only)."""
        return float(self.nats.sum()) / math.log(2) / self.bytes if self.bytes else math.nan


class PositionBin(NamedTuple):
    """The tokens that were predicted from ``low`` to ``high`` (inclusive) tokens of context."""

    low: int
    high: int
    tokens: int
    nats_per_token: float
    bits_per_byte: float


def bits_by_position(score: Score, edges: Sequence[int] | None = None) -> list[PositionBin]:
    """Loss by the length of the context: what more context buys.

    ``edges`` are the shortest contexts of each bin (default 1, 2, 3, 5, 9 …, so that bins end at powers of two);
    empty bins are left out. Score with ``stride = window``: every context length then occurs equally often, all
    through the text. With overlap the short contexts come from the beginnings of documents alone.
    """
    longest = int(score.context.max())
    edges = [1, *(2**k + 1 for k in range(longest.bit_length()))] if edges is None else sorted(edges)
    bins = []
    for low, beyond in zip(edges, [*edges[1:], longest + 1], strict=True):
        inside = (score.context >= low) & (score.context < beyond)
        tokens, size, nats = int(inside.sum()), int(score.token_bytes[inside].sum()), float(score.nats[inside].sum())
        if tokens:
            bits = nats / math.log(2) / size if size else math.nan
            bins.append(PositionBin(low, beyond - 1, tokens, nats / tokens, bits))
    return bins
