"""Logits of a step → the next tokens of every sequence that was sampled, each with its own
settings.

| symbol | name                                                             | shape    |
|--------|------------------------------------------------------------------|----------|
| z      | logits: row after row of each sequence, 1 + drafts rows each       | [R, V]   |
| p      | what is drawn from, after all warps, of rows with temperature > 0| [·, V]   |
| u      | uniforms, one a place in the output                              | [·]      |

Drafts that were not sampled (n-gram, argmax) are judged by drawing: row i is sampled with
the uniform of its place, and draft i stands if it is what was drawn. That is the token-wise
law for a one-hot q, P(accept) = p(draft), with a further property: the tokens are *the
same* as without drafts. Drafts that come with the distribution q they were sampled from are
judged by ``decode.speculative.verification.verify`` with the sequence's own generator: the
same law, not the same tokens.

Left out: penalties on counts (``sampling.apply_count_penalties``), grammars (a mask on z
before all this).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from refllm.backend import Array, asarray_like, to_numpy
from refllm.decode import sampling
from refllm.decode.speculative.verification import verify
from refllm.serve.request import Request
from refllm.serve.request_state import SequenceState


@dataclass(slots=True)
class SamplingInput:
    """A sequence that is sampled: its tokens, its drafts and their q if it has one, and a
    voice for each continuation.
    """

    request: Request
    tokens: Sequence[int]
    voices: list[SequenceState]
    drafts: Sequence[int] = ()
    q: Array | None = None
    rows: slice = field(default_factory=lambda: slice(0, 0))  # of z
    best: Sequence[int] = ()  # the argmax of each row, once they were chosen from


def penalised(z: Array, seats: Sequence[SamplingInput]) -> Array:
    """z with each request's repetition penalty; row i of a seat has seen its first i drafts
    too.
    """
    if all(seat.request.repetition_penalty == 1 for seat in seats):
        return z
    seen = np.zeros(z.shape, dtype=bool)
    penalty = [1.0] * z.shape[0]
    for seat in seats:
        theta = seat.request.repetition_penalty
        if theta == 1:
            continue
        for i, row in enumerate(range(seat.rows.start, seat.rows.stop)):
            seen[row, [*seat.tokens, *seat.drafts[:i]]] = True
            penalty[row] = theta
    return sampling.apply_repetition_penalty(z, asarray_like(seen, z), penalty)


def choose(z: Array, seats: Sequence[SamplingInput]) -> list[list[list[int]] | None]:
    """z[R, V], penalised → for each seat its voices' next tokens; None if its logits have
    no largest one.
    """
    tops = sampling.best(z)
    chosen: list[list[list[int]] | None] = [None] * len(seats)
    drawn = []
    for i, seat in enumerate(seats):
        rows = tops[seat.rows]
        seat.best = rows
        if min(rows) < 0:
            continue
        if seat.request.temperature:
            drawn.append(i)
        else:
            chosen[i] = [_agreed(rows, seat.drafts)] * len(seat.voices)
    if drawn:
        for i, tokens in zip(drawn, _draw(z, [seats[i] for i in drawn]), strict=True):
            chosen[i] = tokens
    return chosen


def _agreed(tokens: Sequence[int], drafts: Sequence[int]) -> list[int]:
    """The tokens of rows 0, 1, … as long as the drafts before them are what was chosen
    there.
    """
    if not drafts:
        return list(tokens[:1])
    kept = next((i for i, draft in enumerate(drafts) if draft != tokens[i]), len(drafts))
    return list(tokens[: kept + 1])


def _draw(z: Array, seats: Sequence[SamplingInput]) -> list[list[list[int]]]:
    """Seats with a temperature: warp all their rows at once, then draw one token a row and
    voice.
    """
    owners = [seat for seat in seats for _ in range(seat.rows.start, seat.rows.stop)]
    rows = [row for seat in seats for row in range(seat.rows.start, seat.rows.stop)]
    how = [
        [getattr(seat.request, name) for seat in owners]
        for name in ("temperature", "top_k", "top_p", "min_p")
    ]
    p = sampling.process_logits(z[asarray_like(rows, z, "int64")], *how)
    picks: list[int] = []  # rows of p, repeated where several voices draw from one
    uniforms: list[float] = []
    first = 0
    for seat in seats:
        place = len(seat.tokens) - len(seat.request.prompt)
        count = seat.rows.stop - seat.rows.start
        if seat.q is None:
            for voice in seat.voices:
                picks += range(first, first + count)
                uniforms += [voice.uniform(place + i) for i in range(count)]
        first += count
    tokens: list[int] = []
    if picks:
        everyone = picks == list(range(p.shape[0]))
        some = p if everyone else p[asarray_like(picks, p, "int64")]
        tokens = to_numpy(sampling.sample(some, asarray_like(uniforms, p, "float64"))).tolist()
    return _dealt(seats, p, tokens)


def _dealt(seats: Sequence[SamplingInput], p: Array, tokens: list[int]) -> list[list[list[int]]]:
    """The drawn tokens to their seats and voices; seats whose drafts were sampled from a q
    are verified here.
    """
    dealt: list[list[list[int]]] = []
    row = 0
    at = 0
    for seat in seats:
        count = seat.rows.stop - seat.rows.start
        if seat.q is None:
            mine = [tokens[at + i * count : at + (i + 1) * count] for i in range(len(seat.voices))]
            dealt.append([_agreed(some, seat.drafts) for some in mine])
            at += count * len(seat.voices)
        else:
            accepted, token = verify(
                p[row : row + count], seat.q[: count - 1], seat.drafts, seat.voices[0].rng
            )
            dealt.append([[*seat.drafts[:accepted], token]])
        row += count
    return dealt
