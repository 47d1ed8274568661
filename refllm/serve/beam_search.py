"""Beam search over sequences that share blocks: each step keeps the n best continuations of
all beams together.

Sources: Kwon et al. 2023, section 4.4 (beams fork and drop blocks; at most one partial block
is copied per beam); finished hypotheses as in Hugging Face's generation, with an exact bound
for when to stop.

| symbol | name                                                         | shape     |
|--------|--------------------------------------------------------------|-----------|
| n      | beams                                                        | request.n |
| s      | score of a beam: Σ log p of its output                       | [n]       |
| c      | candidates s + log p(next), the n (1 + e) best; e end tokens | [n, V]    |
| −      | score of a hypothesis: s / length ** length_penalty, ranked  |           |
|        | by log(−s) − length_penalty · log(length), which cannot      |           |
|        | overflow: the smaller, the better                            |           |

A candidate that ends is a hypothesis if it is among the n best; the n best that do not end
are the beams of the next step. The search is over when n hypotheses are better than the best
that a beam can still become: log p ≤ 0, so s only falls. Ties go to the lower beam, then to
the lower token.

Left out: sampling within beams, diverse groups, constraints, stop strings.
"""

from __future__ import annotations

import math
from collections import abc
from typing import NamedTuple

from refllm.backend import Array, asarray_like, namespace, to_numpy, top_k
from refllm.decode.sampling import log_probabilities
from refllm.serve.plan import Outcome, SampledTokens
from refllm.serve.request import Request, Sequence

_PLAIN_POWER = 690.0  # e to this power, or its negative, is far within the range of floats
_LARGEST_POWER = 709.0  # e to this power is still a float


class Hypothesis(NamedTuple):
    """A whole output; ``finish_reason`` is ``"stop"`` (its last token is an end token)
    or ``"length"``.
    """

    score: float
    tokens: list[int]
    finish_reason: str


def log_loss(score: float, length: int, length_penalty: float) -> float:
    """log(−score / length ** length_penalty) for a ``score`` ≤ 0, in any range of either.

    >>> log_loss(-8.0, 4, 1.0) == math.log(2.0)
    True
    """
    if score == 0:
        return -math.inf
    return math.log(-score) - length_penalty * math.log(length)


def normalised_score(score: float, length: int, length_penalty: float) -> float:
    """score / length ** length_penalty; -inf where no float is as large."""
    loss = log_loss(score, length, length_penalty)
    if abs(length_penalty * math.log(length)) < _PLAIN_POWER:
        return score / length**length_penalty
    return -math.exp(loss) if loss < _LARGEST_POWER else -math.inf


class BeamSearch:
    """The search of one request: the scores of its beams, and the hypotheses found so far.

    >>> import numpy as np
    >>> search = BeamSearch(Request([1], max_tokens=2, n=2, beam=True), frozenset())
    >>> beam = Sequence(search.request, index=0, order=0)
    >>> (outcome,) = search.advance([beam], np.log([[0.2, 0.5, 0.3]]))
    >>> [continuation.tokens for continuation in outcome]  # it forks into the two best
    [[1], [2]]
    """

    def __init__(self, request: Request, end_tokens: frozenset[int]):
        self.request = request
        self.end_tokens = end_tokens
        self.scores: dict[int, float] = {0: 0.0}  # index of a beam → Σ log p
        self.finished: list[tuple[float, Hypothesis]] = []  # with the log_loss of each
        self._next: list[float] = []  # scores of the next beams, in the order of the outcomes

    def advance(self, beams: abc.Sequence[Sequence], z: Array) -> list[Outcome]:
        """z[len(beams), V], finite → an outcome for each beam; all are dropped when the
        search is over.
        """
        request = self.request
        n = request.n
        length = len(beams[0].output) + 1  # of every candidate
        kept: list[tuple[int, int, float]] = []  # (row of the beam, token, score)
        for rank, (row, token, score) in enumerate(self._candidates(beams, z)):
            if token not in self.end_tokens:
                kept.append((row, token, score))
            elif rank < n:
                self._add_hypothesis(score, [*beams[row].output, token], "stop")
            if len(kept) == n:
                break
        if length == request.max_tokens:
            for row, token, score in kept:
                self._add_hypothesis(score, [*beams[row].output, token], "length")
            kept = []
        elif self._is_settled(max(score for _, _, score in kept), length):
            kept = []
        by_beam: list[list[tuple[int, float]]] = [[] for _ in beams]
        for row, token, score in kept:
            by_beam[row].append((token, score))
        self._next = [score for group in by_beam for _, score in group]
        return [[SampledTokens([token]) for token, _ in group] for group in by_beam]

    def follow(self, survivors: abc.Iterable[Sequence]) -> None:
        """The sequences that are the beams now, in the order of the outcomes."""
        indices = (sequence.index for sequence in survivors)
        self.scores = dict(zip(indices, self._next, strict=True))

    @property
    def best(self) -> list[Hypothesis]:
        """At most n hypotheses, the best first."""
        ranked = sorted(self.finished, key=lambda entry: entry[0])
        return [hypothesis for _, hypothesis in ranked[: self.request.n]]

    def _candidates(self, beams: abc.Sequence[Sequence], z: Array) -> list[tuple[int, int, float]]:
        """The best (row of the beam, token, score) of all beams; at least n of them do not end."""
        xp = namespace(z)
        vocabulary = int(z.shape[-1])
        scores = asarray_like([self.scores[beam.index] for beam in beams], z, "float64")
        c = (log_probabilities(z) + scores[:, None]).reshape(-1)  # [beams · V]
        count = min(int(c.shape[0]), self.request.n * (1 + len(self.end_tokens)))
        values, places = top_k(c, count)
        # one copy to the host for both: places are exact as floats below 2⁵³
        both = to_numpy(xp.concat([values, xp.astype(places, xp.float64)])).tolist()
        return [
            (int(place) // vocabulary, int(place) % vocabulary, value)
            for value, place in zip(both[:count], both[count:], strict=True)
        ]

    def _add_hypothesis(self, score: float, tokens: list[int], finish_reason: str) -> None:
        case = score, len(tokens), self.request.length_penalty
        hypothesis = Hypothesis(normalised_score(*case), tokens, finish_reason)
        self.finished.append((log_loss(*case), hypothesis))

    def _is_settled(self, score: float, length: int) -> bool:
        """Whether no beam can get among the n best any more; the best beam has ``score``
        after ``length`` tokens.
        """
        if len(self.finished) < self.request.n:
            return False
        # The score is negative, so the largest divisor gives the bound: the longest length
        # if length is rewarded, else the next one.
        divisor_length = length + 1
        if self.request.length_penalty > 0:
            divisor_length = self.request.max_tokens
        bound = log_loss(score, divisor_length, self.request.length_penalty)
        return sorted(loss for loss, _ in self.finished)[self.request.n - 1] <= bound
