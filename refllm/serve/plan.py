"""What one step computes, as plain data; how such a plan is built, and what its execution
gives back.

A plan is made of Python ints, strings and tuples. It can be checked, traced and drawn
without a model, and the engine that executes it decides nothing.

Of a scheduled sequence:

| field   | meaning                                                                   |
|---------|---------------------------------------------------------------------------|
| start   | tokens whose keys and values are cached already                           |
| count   | tokens that it computes now: positions [start, start + count)             |
| blocks  | its block table: position p lies in ``blocks[p // b]`` at offset p mod b, |
|         | b = ``block_size``; b = 0: memory is contiguous, slot ``blocks[0] + p``;  |
|         | ``NO_BLOCK`` where a block behind a sliding window was freed              |
| samples | rows of logits that it needs, its last ones: 0 in the middle of a prompt, |
|         | else 1 + drafts                                                           |
| pad     | positions before its first token that a padded batch computes and masks   |

| record             | who makes it, for whom                                                  |
|--------------------|-------------------------------------------------------------------------|
| ``Plan``           | the scheduler, for the model runner                                     |
| ``SampledTokens``  | the engine, for the scheduler: the next tokens of a continuation        |
| ``Outcome``        | the same: one sequence's continuations; none drops it                   |
| ``SequenceUpdate`` | the scheduler, for the engine and the user: what is new of one sequence |

Left out: the order of execution within a step (a ragged batch has none).
"""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field
from typing import NamedTuple

from refllm.decode.logprobs import TokenLogprobs
from refllm.errors import InputError
from refllm.kv.block_pool import NO_BLOCK
from refllm.serve.kv_manager import Copies
from refllm.serve.request import Sequence

SequenceKey = tuple[abc.Hashable, int]  # (id of a request, index of one of its sequences)


class ScheduledSequence(NamedTuple):
    """One sequence's share of a step."""

    key: SequenceKey
    start: int
    count: int  # type: ignore[assignment]  # hides tuple.count
    blocks: tuple[int, ...]
    samples: int
    pad: int = 0


class PaddingRow(NamedTuple):
    """A row of a padded batch whose request has finished: computed, and discarded."""

    start: int  # columns before it, padding included
    count: int  # type: ignore[assignment]  # hides tuple.count
    first: int  # slot of its column 0


@dataclass
class Plan:
    """A step; ``items`` are in the order of planning.

    Copies come first. Nothing else in the plan touches what they read: no copy goes into a
    block that another one reads, and where the block is written in the same step, it is
    behind the tokens that are copied. So a device may copy and write at the same time.

    >>> prefill = ScheduledSequence(("a", 0), start=0, count=3, blocks=(4, 1), samples=1)
    >>> decode = ScheduledSequence(("b", 0), start=5, count=1, blocks=(2, 0, 3), samples=1)
    >>> plan = Plan(0, [prefill, decode], block_size=2)
    >>> plan.tokens, plan.slots(prefill), plan.slots(decode)
    (4, [8, 9, 2], [7])
    """

    step: int
    items: list[ScheduledSequence]
    copies: Copies = field(default_factory=list)  # (from, to): blocks to copy in all layers
    # left the queue; beams may still have to wait for memory
    admitted: list[SequenceKey] = field(default_factory=list)
    # lost their memory and went back to the queue
    preempted: list[SequenceKey] = field(default_factory=list)
    padding_rows: list[PaddingRow] = field(default_factory=list)  # static batching
    waiting: int = 0  # sequences still in the queue
    budget: int | None = None  # tokens that the step may compute; None: no limit
    max_sequences: int | None = None  # sequences that may run
    block_size: int = 1

    @property
    def tokens(self) -> int:
        """Tokens that the step computes, padding not counted."""
        return sum(item.count for item in self.items)

    @property
    def sampling(self) -> list[ScheduledSequence]:
        """The items that yield tokens: ``update`` wants an outcome for each, in this order."""
        return [item for item in self.items if item.samples]

    def batch(self) -> list[tuple[int, int]]:
        """(past, new) of every row, padding included: what the step costs."""
        rows = []
        for item in self.items:
            if item.start:
                rows.append((item.start + item.pad, item.count))
            else:
                rows.append((0, item.count + item.pad))  # padding is computed with the prompt
        return rows + [(row.start, row.count) for row in self.padding_rows]

    def slots(self, item: ScheduledSequence) -> list[int]:
        """The slots that an item writes."""
        return slots_of(item.blocks, self.block_size, item.start, item.start + item.count)

    def check(self) -> None:
        """AssertionError if the plan breaks an invariant."""
        keys = [item.key for item in self.items]
        rows = len(keys) + len(self.padding_rows)
        assert len(set(keys)) == len(keys), "a sequence stands twice in a plan"
        assert self.budget is None or self.tokens <= self.budget, "more tokens than the budget"
        assert self.max_sequences is None or rows <= self.max_sequences, (
            "more sequences than max_sequences"
        )
        assert not set(self.preempted) & set(self.admitted), "preempted and admitted in one step"
        assert not set(self.preempted) & set(keys), "a preempted sequence computes"
        for item in self.items:
            _check_item(item, self.block_size)
        written = [slot for item in self.items for slot in self.slots(item)]
        written += [row.first + row.start for row in self.padding_rows]
        assert len(set(written)) == len(written), "two sequences write one slot"
        targets = [target for _, target in self.copies]
        assert len(set(targets)) == len(targets), "two copies into one block"
        self._check_copies(set(targets), set(written))
        if self.block_size:
            touched = {slot // self.block_size for slot in written}
            holders = [b for item in self.items for b in item.blocks if b in touched]
            assert len(set(holders)) == len(holders), "a block that is written is shared"

    def _check_copies(self, targets: set[int], written: set[int]) -> None:
        """AssertionError if a copy could read what the same step has changed already."""
        b = self.block_size
        start_of = {item.blocks[item.start // b]: item.start for item in self.items if self.copies}
        for source, target in self.copies:
            assert source not in targets, "a copy reads what another one writes"
            used = start_of[target] % b  # tokens of the block that are copied
            read = range(source * b, source * b + used)
            assert written.isdisjoint(read), "a token is written where a copy reads"


def _check_item(item: ScheduledSequence, block_size: int) -> None:
    """AssertionError if an item is impossible by itself."""
    assert min(item.start, item.pad) >= 0, "a position below 0"
    assert item.count >= 1, "an item that computes no token"
    assert 0 <= item.samples <= item.count, "an item samples more than it computes"
    if block_size:
        held = [block for block in item.blocks if block != NO_BLOCK]
        assert len(set(held)) == len(held), "a block twice in a table"
        capacity = len(item.blocks) * block_size
        assert item.start + item.count <= capacity, "a token lies beyond its blocks"


def slots_of(blocks: abc.Sequence[int], block_size: int, start: int, stop: int) -> list[int]:
    """The slots of positions [start, stop) of a sequence that lies in ``blocks``; with
    ``block_size`` 0 it is contiguous.

    >>> slots_of([4, 1], block_size=2, start=1, stop=4)
    [9, 2, 3]
    """
    b = block_size
    if b == 0:
        return list(range(blocks[0] + start, blocks[0] + stop))
    if stop == start + 1:  # a decode: called for every sequence of every step
        return [blocks[start // b] * b + start % b]
    touched = blocks[start // b : -(-stop // b)]
    slots = [block * b + offset for block in touched for offset in range(b)]
    return slots[start % b : start % b + stop - start]


class PlanBuilder:
    """A plan in the making: what each sequence computes, and how much budget is left."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.budget_left = plan.budget
        self.items: dict[Sequence, ScheduledSequence] = {}
        self.copies: dict[Sequence, Copies] = {}

    def add(
        self,
        sequence: Sequence,
        count: int,
        blocks: tuple[int, ...],
        copies: Copies,
        pad: int = 0,
    ) -> None:
        """Schedule ``count`` tokens of a sequence; drafts that do not fit are discarded."""
        # drafts among the tokens; below 0: the prompt is not finished yet
        ahead = sequence.computed + count - len(sequence.tokens)
        if sequence.drafts:
            del sequence.drafts[max(0, ahead) :]
        self.items[sequence] = ScheduledSequence(
            sequence.key, sequence.computed, count, blocks, max(0, ahead + 1), pad
        )
        if copies:
            self.copies[sequence] = copies
        if self.budget_left is not None:
            self.budget_left -= count

    def remove(self, sequence: Sequence) -> Copies:
        """Take a sequence out, if it is scheduled; its tokens go back into the budget. Returns
        the copies that are not needed any more.
        """
        item = self.items.pop(sequence, None)
        if item is not None and self.budget_left is not None:
            self.budget_left += item.count
        return self.copies.pop(sequence, [])


class SampledTokens(NamedTuple):
    """How a sequence goes on: its next tokens, and why it finishes with them if it does.

    Without tokens there must be a reason. ``"length"`` is the scheduler's own reason.
    """

    tokens: abc.Sequence[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None  # the stop token or stop string that matched
    jumped: int = 0  # of the tokens the last ones, appended without sampling: not computed yet


Outcome = abc.Sequence[SampledTokens]
FAILED: Outcome = (SampledTokens((), "error"),)  # of a sequence whose request has failed


@dataclass(slots=True)
class SequenceUpdate:
    """What is new of one sequence after a step.

    ``text`` is the engine's, for requests with a callback. It may lag behind ``tokens``: it
    has whole characters only, and no part of a stop string.
    """

    sequence: Sequence
    tokens: list[int]
    finish_reason: str | None = None  # None: more will come
    text: str = ""
    # of each token, if the request asks for them
    logprobs: list[TokenLogprobs] | None = None
    error: str | None = None  # what went wrong, if the reason is "error"

    def fail(self, error: str) -> None:
        """What was to be the end of the sequence has itself failed."""
        self.sequence.finish("error")
        self.finish_reason = "error"
        self.error = error

    @property
    def request_id(self) -> abc.Hashable:
        """The request's id."""
        return self.sequence.request.request_id

    @property
    def stop_reason(self) -> int | str | None:
        """The stop token or stop string that ended it."""
        return self.sequence.stop_reason

    @property
    def index(self) -> int:
        """Which of the request's sequences it is."""
        return self.sequence.index


def check_outcomes(
    sampled: list[Sequence],
    outcomes: abc.Sequence[Outcome],
    active: abc.Mapping[abc.Hashable, list[Sequence]],
) -> None:
    """ValueError unless each outcome fits its sequence; ``active`` has the unfinished
    sequences of each request.
    """
    if len(sampled) != len(outcomes):
        raise InputError(f"{len(sampled)} sequences were sampled, got {len(outcomes)} outcomes")
    growth: dict[abc.Hashable, int] = {}  # request → sequences that the step adds to it
    for sequence, outcome in zip(sampled, outcomes, strict=True):
        if len(outcome) == 1:
            if not sequence.drafts and len(outcome[0].tokens) == 1:
                continue  # one more token: nearly all outcomes
        else:
            request_id = sequence.request.request_id
            growth[request_id] = growth.get(request_id, 0) + len(outcome) - 1
        _check_outcome(sequence, outcome)
    for request_id, added in growth.items():
        sequences = active.get(request_id)
        if sequences and len(sequences) + added > sequences[0].request.num_sequences:
            n = sequences[0].request.num_sequences
            raise InputError(f"request {request_id!r} has n = {n} sequences, not more")


def _check_outcome(sequence: Sequence, outcome: Outcome) -> None:
    """ValueError unless one sequence may continue like this."""
    drafts = sequence.drafts
    most = 1 if drafts else sequence.slots
    if len(outcome) > 1 and (drafts or (len(outcome) > most and not sequence.request.beam)):
        raise InputError(f"{sequence} may fork into {most}, got {len(outcome)} continuations")
    for all_tokens, finish_reason, _, jumped in outcome:
        tokens = all_tokens[: len(all_tokens) - jumped]
        least = 0 if finish_reason else 1
        if not least <= len(tokens) <= 1 + len(drafts):
            raise InputError(f"{sequence} yields 1 to {1 + len(drafts)} tokens, got {len(tokens)}")
        accepted = list(tokens[:-1])
        if len(tokens) > 1 and accepted != drafts[: len(accepted)]:
            raise InputError(f"{sequence}: accepted {accepted}, but its drafts were {drafts}")
