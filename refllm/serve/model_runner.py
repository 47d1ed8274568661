"""Execution of a plan: copies of blocks, one ragged batch through the network, then the next
tokens of every sequence that is sampled, each with its own settings.

| symbol | name                                                  | shape  |
|--------|-------------------------------------------------------|--------|
| T      | tokens of the step: those of all items, then padding  |        |
| R      | rows that are sampled, Σ ``item.samples``             |        |
| z      | logits, 1 + drafts rows per item of ``plan.sampling`` | [R, V] |
| p      | distributions of the rows with temperature > 0        | [P, V] |
| u      | uniforms, one per position of an output               | [U]    |

Nothing is decided here: blocks, counts and copies are the plan's, and what becomes of the
tokens is the engine's. A padded batch is computed with its padding: the padded positions of
a prompt as a sequence of their own, the row of a finished request as one more token. (Only
attention to the padding is saved.)

Drafts that were not sampled (n-grams, argmax) are verified by drawing: row i is sampled with
the uniform of its position, and draft i is accepted if it is the token that was drawn. That
is the token-wise acceptance rule for a one-hot q, P(accept) = p(draft), and it yields *the
same* tokens as decoding without drafts. Drafts that come with the q they were sampled from
are verified by ``decode.speculative.verification.verify`` with the sequence's own generator:
the same distribution, other tokens.

Left out: overlapping a step with the planning of the next one, CUDA graphs, grammar masks that
are computed while the network runs.
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass
from functools import partial
from operator import is_
from typing import NamedTuple

from refllm.backend import Array, asarray_like, finite_argmax, to_numpy
from refllm.decode import sampling
from refllm.decode.constraint import ConstraintFailure, NoTokenLeft
from refllm.decode.fast.captured_step import make_decode_step
from refllm.decode.logits_processors import LogitsProcessors, Row, process_rows
from refllm.decode.logprobs import (
    TokenLogprobs,
    processed_log_probabilities,
    prompt_logprobs,
    token_logprobs,
)
from refllm.decode.sampling_params import SamplingParams
from refllm.decode.speculative.interface import ModelLike
from refllm.decode.speculative.verification import verify
from refllm.kv.paged import PagedKVCache
from refllm.model.llama import forward, logits
from refllm.serve.beam_search import BeamSearch
from refllm.serve.isolation import Failures, compute_isolated, sentence
from refllm.serve.plan import FAILED, Outcome, Plan, SequenceKey, slots_of
from refllm.serve.request import Request, Sequence
from refllm.serve.request_state import RequestState, SequenceState


class _PlannedTable(NamedTuple):
    """The block table of a planned sequence, as ``PagedKVCache.view`` reads it."""

    blocks: tuple[int, ...]
    block_size: int
    length: int

    def slots(self, start: int, stop: int) -> list[int]:
        """The slots of positions [start, stop), in order."""
        return slots_of(self.blocks, self.block_size, start, stop)


class PromptRows(NamedTuple):
    """Hidden states [T, N] of positions [start, start + T) of a prompt, whose next tokens'
    log-probabilities are wanted.
    """

    sequence: Sequence
    start: int
    hidden: Array


class ModelRunner:
    """Computes the logits of a plan.

    Where every token of a step is sampled, ``decode.fast`` computes it with fewer array
    calls; z is then valid until the next step.
    """

    def __init__(self, model: ModelLike, cache: PagedKVCache):
        self.cache = cache
        self._parts: list[object] = []
        self.capture(model)

    def capture(self, model: ModelLike) -> bool:
        """Compute with the model's weights as they are now; whether any has been replaced
        since the last call. (Arrays that were changed in place are the same arrays.)
        """
        parts = _weight_parts(model)
        if len(parts) == len(self._parts) and all(map(is_, parts, self._parts)):
            return False
        self._parts = parts
        self._weights = model.weights
        self._config = model.config
        self._decode_step = make_decode_step(model.weights, model.config)
        return True

    def execute(
        self, plan: Plan, sequences: abc.Iterable[Sequence]
    ) -> tuple[Array | None, list[PromptRows]]:
        """Compute a plan → z[R, V], or None if R = 0, and what ``score_prompt`` needs of the
        prompts whose log-probabilities are wanted. ``sequences`` are those of ``plan.items``,
        in the same order. The weights are those of the last ``capture``.
        """
        cache = self.cache
        cache.copy(plan.copies)
        if not plan.items:
            return None, []
        tables: list[_PlannedTable] = []
        counts: list[int] = []
        tokens: list[int] = []
        positions: list[int] = []
        rows: list[int] = []  # of the T tokens, those that are sampled
        scored: list[tuple[Sequence, int, range]] = []  # prompts to score: start, rows
        for sequence, item in zip(sequences, plan.items, strict=True):
            _, start, count, blocks, samples, _ = item
            tables.append(_PlannedTable(blocks, plan.block_size, start))
            counts.append(count)
            if count == 1:  # decode: nearly all items of a step
                tokens.append(sequence.tokens[start])
                positions.append(start)
            else:
                tokens += [*sequence.tokens, *sequence.drafts][start : start + count]
                positions += range(start, start + count)
            if samples != count and sequence.request.output.prompt_logprobs is not None:
                skipped = max(0, sequence.request.output.prompt_logprobs_start - 1 - start)
                first = len(tokens) - count + skipped
                begin = start + skipped
                last = min(start + count, len(sequence.request.prompt) - 1)  # exclusive
                if begin < last:
                    scored.append((sequence, begin, range(first, first + last - begin)))
            rows += range(len(tokens) - samples, len(tokens))
        for first, start, count in _padding(plan):
            tables.append(_PlannedTable((first,), 0, start))
            counts.append(count)
            tokens += [0] * count
            positions += range(start, start + count)
        attend = cache.view(tables, counts)
        if len(rows) == len(tokens):  # mutate: equivalent (fewer array calls, the same logits)
            return self._decode_step(tokens, positions, attend), []  # [R, V]
        ids, places = asarray_like([tokens, positions], cache.keys, "int64")  # [T], [T]
        wanted = rows + [row for _, _, rows_of in scored for row in rows_of]
        hidden_rows = asarray_like(wanted, cache.keys, "int64")  # [R + scored]
        hidden = forward(self._weights, self._config, ids, places, attend, hidden_rows)
        prompt_rows: list[PromptRows] = []
        at = len(rows)
        for sequence, start, rows_of in scored:
            prompt_rows.append(PromptRows(sequence, start, hidden[at : at + len(rows_of)]))
            at += len(rows_of)
        if not rows:
            return None, prompt_rows
        return logits(self._weights, hidden[: len(rows)]), prompt_rows

    def score_prompt(self, rows: PromptRows) -> list[TokenLogprobs]:
        """The entries of the prompt tokens that follow the rows."""
        request = rows.sequence.request
        assert request.output.prompt_logprobs is not None
        first = rows.start + 1
        targets = request.prompt_ids[first : first + int(rows.hidden.shape[0])]
        project = partial(logits, self._weights)
        return prompt_logprobs(project, rows.hidden, targets, request.output.prompt_logprobs)


def _weight_parts(model: ModelLike) -> list[object]:
    """The record of the weights and every weight in it: what may be replaced."""
    weights = model.weights
    parts: list[object] = [weights, *weights.values()]
    for layer in weights["layers"]:
        parts += layer.values()
    return parts


def _padding(plan: Plan) -> list[tuple[int, int, int]]:
    """(slot of column 0, columns before, columns computed) of all padding of a batch."""
    pads = []
    for item in plan.items:
        if item.pad and not item.start:
            pads.append((item.blocks[0] - item.pad, 0, item.pad))
    return pads + [(row.first, row.start, row.count) for row in plan.padding_rows]


@dataclass(slots=True)
class SamplingInput:
    """A sequence that is sampled, and one state for each continuation that it may have."""

    sequence: Sequence
    states: list[SequenceState]
    rows: slice  # of z
    q: Array | None = None  # q[drafts, V], if its drafts were sampled
    processors: LogitsProcessors | None = None  # None: they change nothing
    num_logprobs: int | None = None  # None: none are wanted
    best: abc.Sequence[int] = ()  # argmax of each row, once sampled
    error: str | None = None  # why its request has failed
    usable: int | None = None  # rows before the first that failed; None: all

    def fail(self, point: str, error: Exception) -> None:
        """Something of its request has raised ``error``."""
        if self.error is None:
            self.error = sentence(point, error)

    def fail_row(self, row: int, words: str) -> None:
        """Row ``row`` of its rows gives no token. Row 0 fails the request. A later one follows
        drafts that may never be accepted: the tokens that are accepted before it stand, and
        the next step, where it is row 0, decides.
        """
        if row:
            self.usable = row if self.usable is None else min(row, self.usable)
        elif self.error is None:
            self.error = words

    @property
    def request(self) -> Request:
        """The request that the sequence belongs to."""
        return self.sequence.request

    @property
    def params(self) -> SamplingParams:
        """The request's sampling parameters."""
        return self.sequence.request.sampling

    @property
    def num_rows(self) -> int:
        """1 + drafts."""
        return int(self.rows.stop - self.rows.start)


def sample_outcomes(
    plan: Plan,
    sequences: list[Sequence],
    requests: abc.Mapping[abc.Hashable, RequestState],
    draft_q: abc.Mapping[SequenceKey, Array | None],
    z: Array,
    failures: Failures,
) -> list[Outcome]:
    """z[R, V] → an outcome for each sequence of ``plan.sampling``, in the same order.

    ``sequences`` are those of ``plan.items``; ``draft_q`` has the q of drafts that were
    sampled from one. ``failures`` gets the requests that the caller has to end.
    """
    inputs = _sampling_inputs(plan, sequences, requests, draft_q)
    healthy = [one for one in inputs if one.error is None]
    healthy, processed = compute_isolated(healthy, lambda some: process_inputs(z, some), "logits")
    raw = z
    if processed is not None:
        z = processed
    sampled = dict(zip(map(id, healthy), sample_tokens(z, healthy), strict=True))
    outcomes = [_consume(one, sampled.get(id(one))) for one in inputs]
    record_logprobs(raw, z, inputs, outcomes)
    searches: dict[abc.Hashable, list[int]] = {}  # request → places of its beams in ``inputs``
    for i, one in enumerate(inputs):
        if one.request.beam:
            searches.setdefault(one.request.request_id, []).append(i)
    for request_id, places in searches.items():
        search = requests[request_id].search
        assert search is not None
        _advance_search(search, [inputs[i] for i in places], raw, z, outcomes, places)
    for one in inputs:
        if one.error is not None:
            failures.setdefault(one.request.request_id, one.error)
    return outcomes


def _sampling_inputs(
    plan: Plan,
    sequences: list[Sequence],
    requests: abc.Mapping[abc.Hashable, RequestState],
    draft_q: abc.Mapping[SequenceKey, Array | None],
) -> list[SamplingInput]:
    """The sequences that are sampled, with their states, rows and drafts' q."""
    inputs: list[SamplingInput] = []
    row = 0
    for sequence, item in zip(sequences, plan.items, strict=True):
        if not item.samples:
            continue
        state = requests[sequence.request.request_id]
        rows = slice(row, row + item.samples)
        row += item.samples
        q = draft_q.get(sequence.key) if sequence.drafts else None
        one = SamplingInput(sequence, [], rows, q, state.processors, state.num_logprobs)
        try:
            one.states = state.continuation_states(sequence)
        except Exception as error:
            one.fail("state", error)
        inputs.append(one)
    return inputs


def _consume(one: SamplingInput, continuations: list[list[int]] | None) -> Outcome:
    """The outcome of one sequence: its tokens up to where its text ends; its drafter learns
    how many drafts were accepted.
    """
    if one.error is not None or continuations is None:
        return FAILED
    try:
        used = [tokens[: one.usable] for tokens in continuations]
        pairs = zip(one.states, used, strict=True)
        outcome = [state.consume(tokens, one.sequence) for state, tokens in pairs]
    except Exception as error:
        one.fail("text", error)
        return FAILED
    drafter = one.states[0].drafter
    if one.sequence.drafts and drafter is not None:
        try:
            drafter.observe(one.best[: one.usable], len(used[0]) - 1)
        except Exception as error:
            one.fail("observe", error)
            return FAILED
    return outcome


def _advance_search(
    search: BeamSearch,
    beams: list[SamplingInput],
    raw: Array,
    z: Array,
    outcomes: list[Outcome],
    places: list[int],
) -> None:
    """Replace the outcomes of beams, which stand at ``places``, by those of their search; all
    beams of a search are sampled in the same step.
    """
    decided: list[Outcome] = [FAILED] * len(beams)
    if all(one.error is None for one in beams):
        rows = asarray_like([one.rows.start for one in beams], z, "int64")
        try:
            decided = search.advance([one.sequence for one in beams], z[rows], raw[rows])
        except Exception as error:
            beams[0].fail("beam search", error)
    for place, outcome in zip(places, decided, strict=True):
        outcomes[place] = outcome


def process_inputs(z: Array, inputs: abc.Sequence[SamplingInput]) -> Array:
    """z[R, V] after each request's logits processors; row i of a sequence follows its first i
    drafts, too. An input gets the ``error`` that its grammar or a processor of its own raised.
    """
    if all(one.processors is None for one in inputs):
        return z
    rows: list[Row | None] = [None] * int(z.shape[0])
    owners: dict[int, SamplingInput] = {}  # row → whose it is
    for one in inputs:
        if one.processors is None:
            continue
        output = one.sequence.output
        for i in range(one.num_rows):
            row = one.rows.start + i
            owners[row] = one
            follows = [*output, *one.sequence.drafts[:i]]
            rows[row] = Row(one.processors, one.request.prompt_ids, follows)

    def fail(row: int, error: BaseException) -> None:
        one = owners[row]
        if isinstance(error, (ConstraintFailure, NoTokenLeft)):
            words = sentence("grammar", error)
        else:
            words = sentence("processor", error)
        one.fail_row(row - one.rows.start, words)

    return process_rows(z, rows, fail)


def sample_tokens(z: Array, inputs: abc.Sequence[SamplingInput]) -> list[list[list[int]] | None]:
    """z[R, V], after the logits processors → for each input the next tokens of each
    continuation; None, and an ``error``, for one that cannot be sampled.
    """
    best = finite_argmax(z)
    sampled: list[list[list[int]] | None] = [None] * len(inputs)
    drawn: list[int] = []  # inputs with a temperature
    for i, one in enumerate(inputs):
        one.best = best[one.rows]
        if min(one.best) < 0:
            first = next(row for row, token in enumerate(one.best) if token < 0)
            one.fail_row(first, "the logits have no largest one: NaN, +inf or nothing but -inf")
        if one.error is not None:
            continue
        if one.params.temperature:
            drawn.append(i)
        else:
            tokens = _accepted_tokens(one.best, one.sequence.drafts)
            sampled[i] = [tokens] * len(one.states)
    if drawn:
        for i, continuations in zip(drawn, _draw(z, [inputs[i] for i in drawn]), strict=True):
            sampled[i] = continuations
    return sampled


def record_logprobs(
    raw: Array, z: Array, inputs: abc.Sequence[SamplingInput], outcomes: abc.Sequence[Outcome]
) -> None:
    """Keep the log-probabilities of the sampled tokens where they are wanted: of ``raw``
    logits or of the processed z, [R, V] both. Searches keep their own.
    """
    for one, outcome in zip(inputs, outcomes, strict=True):
        if one.num_logprobs is None or one.error is not None or one.request.beam:
            continue
        try:
            rows = slice(one.rows.start, one.rows.start + (one.usable or one.num_rows))
            if one.request.output.logprobs_mode == "raw_logprobs":
                log_p = sampling.log_probabilities(raw[rows])
            else:
                log_p = processed_log_probabilities(z[rows], one.params)
            assert one.num_logprobs is not None
            for state, (tokens, *_) in zip(one.states, outcome, strict=True):
                entries = token_logprobs(log_p, range(len(tokens)), tokens, one.num_logprobs)
                state.logprobs += entries
        except Exception as error:
            one.fail("logits", error)


def _accepted_tokens(tokens: abc.Sequence[int], drafts: abc.Sequence[int]) -> list[int]:
    """The tokens of rows 0, 1, … as long as each draft is the token of the row before it."""
    accepted = 0
    while accepted < len(drafts) and drafts[accepted] == tokens[accepted]:
        accepted += 1
    return list(tokens[: accepted + 1])


def _distributions(z: Array, inputs: abc.Sequence[SamplingInput]) -> Array:
    """z[R, V] → p[P, V] of all rows of some inputs, each with its own parameters."""
    params = [one.params for one in inputs for _ in range(one.num_rows)]
    rows = [row for one in inputs for row in range(one.rows.start, one.rows.stop)]
    z = z[asarray_like(rows, z, "int64")]
    failed: list[int] = []  # rows of which no token is used
    first = 0
    for one in inputs:
        if one.usable is not None:
            failed += range(first + one.usable, first + one.num_rows)
        first += one.num_rows
    if failed:
        z[asarray_like(failed, z, "int64")] = 0.0
    return sampling.distribution(z, params)


def _draw(z: Array, inputs: list[SamplingInput]) -> list[list[list[int]] | None]:
    """Inputs with a temperature: process all their rows at once, then draw one token per row
    and continuation; None, and an ``error``, for one that cannot be drawn.
    """
    healthy, p = compute_isolated(inputs, lambda some: _distributions(z, some), "sampling")
    if p is None:
        return [None] * len(inputs)
    picks: list[int] = []  # rows of p, repeated where several continuations draw from one
    uniforms: list[float] = []
    first = 0
    for one in healthy:
        position = len(one.sequence.output)
        if one.q is None:
            for state in one.states:
                picks += range(first, first + one.num_rows)
                uniforms += [state.uniform(position + i) for i in range(one.num_rows)]
        first += one.num_rows
    tokens: list[int] = []
    if picks:
        if picks != list(range(first)):
            picked = p[asarray_like(picks, p, "int64")]  # [U, V]
        else:
            picked = p
        tokens = to_numpy(sampling.sample(picked, asarray_like(uniforms, p, "float64"))).tolist()
    drawn = dict(zip(map(id, healthy), _split_by_input(healthy, p, tokens), strict=True))
    return [drawn.get(id(one)) for one in inputs]


def _split_by_input(
    inputs: abc.Sequence[SamplingInput], p: Array, tokens: list[int]
) -> list[list[list[int]] | None]:
    """The drawn tokens of each input and continuation; drafts with a q are verified here."""
    split: list[list[list[int]] | None] = []
    row = 0
    at = 0
    for one in inputs:
        count = one.num_rows
        drafts = one.sequence.drafts
        if one.q is None:
            continuations = []
            for _ in one.states:
                continuations.append(_accepted_tokens(tokens[at : at + count], drafts))
                at += count
            split.append(continuations)
        else:
            target = p[row : row + count]  # [1 + drafts, V]
            try:
                accepted, token = verify(target, one.q[: count - 1], drafts, one.states[0].rng)
                split.append([[*drafts[:accepted], token]])
            except Exception as error:
                one.fail("verification", error)
                split.append(None)
        row += count
    return split
