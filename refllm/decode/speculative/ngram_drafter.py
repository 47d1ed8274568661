"""Prompt lookup: draft what followed the last n tokens where they occurred before.

Source: Saxena 2023 (prompt lookup decoding). It costs no model; drafts are one-hot (q is
None), and where text repeats itself most of them are accepted.

Left out: lookup in other sequences or in a data store (REST), suffix trees.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from refllm.decode.sampling_params import SamplingParams
from refllm.decode.speculative.interface import NO_DRAFTS, Proposal, checked_gamma
from refllm.errors import InputError


class NGramDrafter:
    """Finds the last n tokens earlier in the sequence, the longest n first, and copies what
    followed.

    Of several places with the same n the latest counts. (vLLM takes the earliest.) Where the
    copy reaches the end of the sequence, it goes on with the drafts themselves: text that
    repeats with a short period is drafted as far as is asked for. A table of the n-grams
    grows with the sequence, so the cost of a step does not depend on its length.

    >>> from refllm.decode.sampling_params import GREEDY
    >>> drafter = NGramDrafter(gamma=3)
    >>> drafter.propose([5, 6, 7, 8, 9, 5, 6], 3, GREEDY, np.random.default_rng(0)).tokens
    [7, 8, 9]
    """

    def __init__(self, gamma: int = 8, *, longest: int = 4, shortest: int = 2):
        if not 1 <= shortest <= longest:
            raise InputError(
                f"n-grams of {shortest} to {longest} tokens: the shortest must be at least 1, "
                "and not longer than the longest"
            )
        self.gamma = checked_gamma(gamma)
        self.sizes = range(longest, shortest - 1, -1)
        self._known: list[int] = []  # the tokens whose n-grams are in the table
        # an n-gram → the index after its latest occurrence
        self._after: dict[tuple[int, ...], int] = {}

    def propose(
        self, tokens: Sequence[int], count: int, sampling: SamplingParams, rng: np.random.Generator
    ) -> Proposal:
        """See ``Drafter.propose``."""
        self._read(tokens)
        end = len(tokens)
        for n in self.sizes:
            if n < end and (place := self._after.get(tuple(tokens[end - n :]))) is not None:
                return Proposal(_continue_from(tokens, place, count), None)
        return NO_DRAFTS

    def observe(self, best: Sequence[int], accepted: int) -> None:
        """Nothing to learn: the next call brings all tokens."""

    def _read(self, tokens: Sequence[int]) -> None:
        """Enter every n-gram that is followed by a token: those that end before the last one."""
        known = len(self._known)
        if len(tokens) < known or list(tokens[:known]) != self._known:
            self._known = []
            self._after = {}
            known = 0
        for end in range(max(1, known), len(tokens)):
            for n in self.sizes:
                if n <= end:
                    self._after[tuple(tokens[end - n : end])] = end
        self._known += tokens[known:]


def _continue_from(tokens: Sequence[int], place: int, count: int) -> list[int]:
    """``count`` tokens that continue ``tokens`` as they went on from ``place``.

    >>> _continue_from([5, 6, 7, 5, 6, 7], place=3, count=8)
    [5, 6, 7, 5, 6, 7, 5, 6]
    """
    period = list(tokens[place : place + count])
    if not period:  # nothing was asked for
        return []
    repeats = -(-count // len(period))
    return (period * repeats)[:count]
