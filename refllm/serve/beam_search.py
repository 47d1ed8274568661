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

A candidate that ends (by an end token, a stop token, a text that reaches a stop string, or as a
complete output of its grammar) is a hypothesis if it is among the n best; the n best that do not
end are the beams of the next step. The search is over when n hypotheses are better than the best
that a beam can still become: log p ≤ 0, so s only falls. Ties go to the lower beam, then to
the lower token.

Left out: sampling within beams, diverse groups.
"""

from __future__ import annotations

import math
from collections import abc
from typing import NamedTuple

from refllm.backend import Array, asarray_like, namespace, to_numpy, top_k
from refllm.decode.constraint import ConstraintStates
from refllm.decode.logprobs import TokenLogprobs, token_logprobs
from refllm.decode.output_params import StopTokens
from refllm.decode.sampling import log_probabilities
from refllm.serve.detokenizer import Detokenizer
from refllm.serve.plan import Outcome, SampledTokens
from refllm.serve.request import Request, Sequence

_PLAIN_POWER = 690.0  # e to this power, or its negative, is far within the range of floats
_LARGEST_POWER = 709.0  # e to this power is still a float


class Hypothesis(NamedTuple):
    """A whole output; ``finish_reason`` is ``"stop"`` or ``"length"``. ``ended_by`` is the end
    or stop token that is its last token, ``text`` that of a search with stop strings.
    """

    score: float
    tokens: list[int]
    finish_reason: str
    stop_reason: int | str | None = None
    ended_by: int | None = None
    text: str | None = None
    logprobs: list[TokenLogprobs] | None = None


class Beam(NamedTuple):
    """What the search knows of a beam beside its tokens: Σ log p, and text and
    log-probabilities of its output if the request asks for them.
    """

    score: float = 0.0
    detokenizer: Detokenizer | None = None
    logprobs: list[TokenLogprobs] | None = None


class Candidate(NamedTuple):
    """A continuation of the beam in ``row`` by one token, and its Σ log p."""

    row: int
    token: int
    score: float


class Ending(NamedTuple):
    """A candidate whose output ends with it, and why; see ``Hypothesis``."""

    candidate: Candidate
    beam: Beam
    finish_reason: str
    stop_reason: int | str | None = None
    ended_by: int | None = None


def log_loss(score: float, length: int, length_penalty: float) -> float:
    """log(−score / length ** length_penalty) for a ``score`` ≤ 0, in any range of either.

    >>> math.isclose(log_loss(-8.0, 4, 1.0), math.log(2.0))
    True
    """
    if score == 0:
        return -math.inf
    return math.log(-score) - length_penalty * math.log(length)


def normalised_score(score: float, length: int, length_penalty: float) -> float:
    """score / length ** length_penalty; -inf where no float is as large."""
    loss = log_loss(score, length, length_penalty)
    if abs(length_penalty * math.log(length)) < _PLAIN_POWER:
        return float(score / length**length_penalty)
    return -math.exp(loss) if loss < _LARGEST_POWER else -math.inf


class BeamSearch:
    """The search of one request: the scores of its beams, and the hypotheses found so far.

    >>> import numpy as np
    >>> search = BeamSearch(Request([1], max_tokens=2, n=2, beam=True), StopTokens())
    >>> beam = Sequence(search.request, index=0, order=0)
    >>> (outcome,) = search.advance([beam], np.log([[0.2, 0.5, 0.3]]))
    >>> [continuation.tokens for continuation in outcome]  # it forks into the two best
    [[1], [2]]
    """

    def __init__(
        self,
        request: Request,
        stops: StopTokens,
        detokenizer: Detokenizer | None = None,
        constraint: ConstraintStates | None = None,
    ):
        """``detokenizer`` is a new one if the request has stop strings, ``constraint`` follows its
        grammar.
        """
        self.request = request
        self.constraint = constraint
        self.stops = stops
        logprobs: list[TokenLogprobs] | None = None
        if request.output.logprobs is not None:
            logprobs = []
        self.beams = {0: Beam(0.0, detokenizer, logprobs)}  # index of a sequence → its beam
        self.finished: list[tuple[float, Hypothesis]] = []  # with the log_loss of each
        self._next: list[Beam] = []  # the next beams, in the order of the outcomes
        self._found: list[tuple[float, Hypothesis]] = []  # in this step, before ``follow``

    def advance(
        self, beams: abc.Sequence[Sequence], z: Array, raw: Array | None = None
    ) -> list[Outcome]:
        """z[len(beams), V], finite, after the logits processors → an outcome for each beam;
        all are dropped when the search is over. ``raw`` is z before them (default: z).

        Nothing is kept before ``follow`` or ``best``: a step that fails can be repeated.
        """
        length = len(beams[0].output) + 1  # of every candidate
        self._found = list(self.finished)
        kept, ended = self._choose(beams, z, length)
        if length == self.request.max_tokens:
            ended += [Ending(candidate, beam, "length") for candidate, beam in kept]
            kept = []
        chosen = [one.candidate for one in ended] + [candidate for candidate, _ in kept]
        entries = self._logprobs(chosen, z, raw)
        for one, entry in zip(ended, entries, strict=False):  # the others are of ``kept``
            self._add_hypothesis(one, beams[one.candidate.row].output, entry)
        if kept and self._is_settled(max(beam.score for _, beam in kept), length):
            kept = []
        by_beam: list[list[tuple[int, Beam]]] = [[] for _ in beams]
        for (candidate, beam), entry in zip(kept, entries[len(ended) :], strict=False):
            if beam.logprobs is not None and entry is not None:
                beam = beam._replace(logprobs=[*beam.logprobs, entry])
            by_beam[candidate.row].append((candidate.token, beam))
        self._next = [beam for group in by_beam for _, beam in group]
        return [[SampledTokens([token]) for token, _ in group] for group in by_beam]

    def _choose(
        self, beams: abc.Sequence[Sequence], z: Array, length: int
    ) -> tuple[list[tuple[Candidate, Beam]], list[Ending]]:
        """The n best candidates that do not end, and those among the n best that do."""
        n = self.request.n
        kept: list[tuple[Candidate, Beam]] = []
        ended: list[Ending] = []
        for rank, candidate in enumerate(self._candidates(beams, z)):
            if candidate.score == -math.inf:
                break  # masked: no output at all
            token = candidate.token
            beam, matched = self._extend(self.beams[beams[candidate.row].index], candidate)
            if self.stops.ends(token, length):
                ending = Ending(candidate, beam, "stop", self.stops.reason(token), token)
            elif matched is not None:
                ending = Ending(candidate, beam, "stop", matched)
            elif self._is_complete([*beams[candidate.row].output, token]):
                ending = Ending(candidate, beam, "stop")
            else:
                kept.append((candidate, beam))
                if len(kept) == n:
                    break
                continue
            if rank < n:
                ended.append(ending)
        return kept, ended

    def _is_complete(self, output: list[int]) -> bool:
        """Whether an output is complete in the request's grammar, and long enough."""
        if self.constraint is None or len(output) < self.stops.min_tokens:
            return False
        return self.constraint.is_complete(output)

    def follow(self, survivors: abc.Iterable[Sequence]) -> None:
        """The sequences that are the beams now, in the order of the outcomes."""
        indices = (sequence.index for sequence in survivors)
        self.beams = dict(zip(indices, self._next, strict=True))
        self.finished = self._found

    @property
    def best(self) -> list[Hypothesis]:
        """At most n hypotheses, the best first."""
        ranked = sorted(self._found, key=lambda entry: entry[0])
        return [hypothesis for _, hypothesis in ranked[: self.request.n]]

    def _candidates(self, beams: abc.Sequence[Sequence], z: Array) -> abc.Iterator[Candidate]:
        """All candidates of all beams, the best first."""
        xp = namespace(z)
        vocabulary = int(z.shape[-1])
        scores = [self.beams[beam.index].score for beam in beams]
        sums = asarray_like(scores, z, "float64")[:, None]
        c = (log_probabilities(z) + sums).reshape(-1)  # [beams · V]
        total = int(c.shape[0])
        count = min(total, self.request.n * (1 + len(self.stops.tokens)))
        given = 0
        while given < total:
            values, places = top_k(c, count)
            # one copy to the host for both: places are exact as floats below 2⁵³
            both = to_numpy(xp.concat([values, xp.astype(places, xp.float64)])).tolist()
            for value, place in zip(both[given:count], both[count + given :], strict=True):
                yield Candidate(int(place) // vocabulary, int(place) % vocabulary, value)
            given = count
            count = min(total, 2 * count)  # so many only if stop strings end most of them

    def _extend(self, beam: Beam, candidate: Candidate) -> tuple[Beam, str | None]:
        """The beam of a candidate, and the stop string that its text has reached."""
        if beam.detokenizer is None:
            return beam._replace(score=candidate.score), None
        detokenizer = beam.detokenizer.copy()
        ends = self.stops.ends(candidate.token, detokenizer.count + 1)
        if not ends:
            detokenizer.push(candidate.token)
        return beam._replace(score=candidate.score, detokenizer=detokenizer), detokenizer.matched

    def _logprobs(
        self, chosen: list[Candidate], z: Array, raw: Array | None
    ) -> abc.Sequence[TokenLogprobs | None]:
        """The log-probabilities of the candidates' tokens, if they are wanted."""
        output = self.request.output
        if output.logprobs is None:
            return [None] * len(chosen)
        if output.logprobs_mode == "raw_logprobs" and raw is not None:
            z = raw
        rows = [candidate.row for candidate in chosen]
        tokens = [candidate.token for candidate in chosen]
        return token_logprobs(log_probabilities(z), rows, tokens, output.logprobs)

    def _add_hypothesis(
        self, ending: Ending, before: list[int], entry: TokenLogprobs | None
    ) -> None:
        """The tokens ``before`` an ending, and its own, are a whole output."""
        candidate, beam, finish_reason, stop_reason, ended_by = ending
        text = None
        if beam.detokenizer is not None:
            beam.detokenizer.flush()
            if beam.detokenizer.matched is not None:
                # half a character that was held back completes it
                finish_reason = "stop"
                stop_reason = beam.detokenizer.matched
            elif ended_by is not None and self.request.output.include_stop_str_in_output:
                beam.detokenizer.append_end(ended_by)
            text = beam.detokenizer.take()
        logprobs = beam.logprobs
        if logprobs is not None and entry is not None:
            logprobs = [*logprobs, entry]
        tokens = [*before, candidate.token]
        case = beam.score, len(tokens), self.request.length_penalty
        hypothesis = Hypothesis(
            normalised_score(*case), tokens, finish_reason, stop_reason, ended_by, text, logprobs
        )
        self._found.append((log_loss(*case), hypothesis))

    def _is_settled(self, score: float, length: int) -> bool:
        """Whether no beam can get among the n best any more; the best beam has ``score``
        after ``length`` tokens.
        """
        if len(self._found) < self.request.n:
            return False
        # The score is negative, so the largest divisor gives the bound: the longest length
        # if length is rewarded, else the next one.
        divisor_length = length + 1
        if self.request.length_penalty > 0:
            divisor_length = self.request.max_tokens
        bound = log_loss(score, divisor_length, self.request.length_penalty)
        return sorted(loss for loss, _ in self._found)[self.request.n - 1] <= bound
