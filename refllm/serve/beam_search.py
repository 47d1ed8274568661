"""Beam search over sequences that share blocks: in each step the n best continuations of all
beams together go on.

Sources: Kwon et al. 2023, section 4.4 (beams fork and drop blocks, a copy at most of one
partial block each); the bookkeeping of finished hypotheses as Hugging Face's generation has
it, with an exact bound for when to stop.

| symbol | name                                                          | shape        |
|--------|---------------------------------------------------------------|--------------|
| n      | beams                                                         | request.n    |
| s      | score of a beam: Σ log p of its output                        | [n]          |
| c      | candidates s + log p(next), the n (1 + e) best; e end tokens  | [n, V]       |
| −      | score of a hypothesis: s / length ** length_penalty           |              |

A candidate that ends is a hypothesis if it is among the n best; the n best that do not end
are the beams of the next step. The search ends when n hypotheses are better than the best
that a beam can still become: log p ≤ 0, so s only falls. Equal candidates are ranked by
beam, then by token.

Left out: sampling within beams, diverse groups, constraints, stop strings.
"""

from __future__ import annotations

from collections import abc
from typing import NamedTuple

from refllm.backend import Array, asarray_like, namespace, to_numpy, top_k
from refllm.decode.sampling import log_probabilities
from refllm.serve.plan import Outcome, SampledTokens
from refllm.serve.request import Request, Sequence


class Hypothesis(NamedTuple):
    """A whole continuation; ``reason`` is ``"end"`` (its last token is an end token) or
    ``"length"``.
    """

    score: float
    tokens: list[int]
    reason: str


class BeamSearch:
    """The search of one request: scores of its beams by index, hypotheses that have ended."""

    def __init__(self, request: Request, ends: frozenset[int]):
        self.request = request
        self.ends = ends
        self.scores: dict[int, float] = {0: 0.0}  # index of a live beam → Σ log p
        self.ended: list[Hypothesis] = []
        self._next: list[float] = []  # scores of the beams-to-be, in the order of the outcomes

    def advance(self, beams: abc.Sequence[Sequence], z: Array) -> list[Outcome]:
        """z[len(beams), V], finite → an outcome for each beam; all are dropped when the
        search is over.
        """
        request = self.request
        n = self.request.n
        length = len(beams[0].output) + 1  # of every candidate
        going: list[tuple[int, int, float]] = []  # (place of the beam, token, score)
        for rank, (place, token, score) in enumerate(self._candidates(beams, z)):
            if token not in self.ends:
                going.append((place, token, score))
            elif rank < n:
                self._end(score, [*beams[place].output, token], "end")
            if len(going) == n:
                break
        if length == request.max_tokens:
            for place, token, score in going:
                self._end(score, [*beams[place].output, token], "length")
            going = []
        elif self._settled(max(score for _, _, score in going), length):
            going = []
        by_beam: list[list[tuple[int, float]]] = [[] for _ in beams]
        for place, token, score in going:
            by_beam[place].append((token, score))
        self._next = [score for some in by_beam for _, score in some]
        return [[SampledTokens([token]) for token, _ in some] for some in by_beam]

    def follow(self, survivors: abc.Sequence[Sequence]) -> None:
        """Who the beams are now, in the order of the outcomes."""
        self.scores = dict(zip((sequence.index for sequence in survivors), self._next, strict=True))

    @property
    def best(self) -> list[Hypothesis]:
        """At most n hypotheses, the best first."""
        return sorted(self.ended, key=lambda h: -h.score)[: self.request.n]

    def _candidates(self, beams: abc.Sequence[Sequence], z: Array) -> list[tuple[int, int, float]]:
        """The best (place of the beam, token, score) over all beams; enough that n of them
        do not end.
        """
        xp = namespace(z)
        scores = asarray_like([self.scores[beam.index] for beam in beams], z, "float64")[:, None]
        c = (log_probabilities(z) + scores).reshape(-1)
        values, places = top_k(c, min(int(c.shape[0]), self.request.n * (1 + len(self.ends))))
        V = int(z.shape[-1])
        # exact below 2⁵³
        told = to_numpy(xp.concat([values, xp.astype(places, xp.float64)])).tolist()
        half = len(told) // 2
        return [
            (int(at) // V, int(at) % V, value)
            for value, at in zip(told[:half], told[half:], strict=True)
        ]

    def _end(self, score: float, tokens: list[int], reason: str) -> None:
        self.ended.append(
            Hypothesis(score / len(tokens) ** self.request.length_penalty, tokens, reason)
        )

    def _settled(self, score: float, length: int) -> bool:
        """Whether no beam can still be among the n best: the best has ``score`` after
        ``length`` tokens.
        """
        if len(self.ended) < self.request.n:
            return False
        # divided by as much as it can be: at the longest length if that is rewarded, else
        # at the next one
        if self.request.length_penalty > 0:
            most = self.request.max_tokens
        else:
            most = length + 1
        bound: float = score / most**self.request.length_penalty
        return self.best[-1].score >= bound
