"""What one step computes, as plain data: which sequence how many tokens, in which blocks,
after which copies.

A plan is made of Python ints, strings and tuples. It can be checked, traced and drawn
without a model, and an engine that executes it decides nothing.

| field    | meaning                                                                                          |
|----------|--------------------------------------------------------------------------------------------------|
| start    | tokens of the sequence whose keys and values are cached already                                    |
| count    | tokens that it computes now: positions [start, start + count)                                    |
| blocks   | where its positions lie: p in block ``blocks[p // b]`` at slot p mod b; b = ``block_size``. With  |
|          | b = 0 memory is one contiguous run and p lies in slot ``blocks[0] + p``                          |
| samples  | rows of logits that it needs: its last ones; 0 while a prompt is not finished, 1 + drafts after  |
| pad      | positions before its first token that a padded batch computes and masks (static batching)       |

Left out: the order of execution within a step (the engine's: a ragged batch has none).

<<MERGED>>
A step on its way: the plan in the making, and what its execution gives back.

| name         | meaning                                                                                    |
|--------------|--------------------------------------------------------------------------------------------|
| PlanBuilder         | a plan in the making, by sequence, and how much of the budget is left                        |
| SampledTokens | how a sequence goes on: its next tokens, and why it ends with them if it does                |
| Outcome      | what a sequence that was sampled becomes: its continuations; none drops it                   |
| SequenceUpdate        | what the books made of it, for whoever waits for the tokens                                |
"""

from __future__ import annotations

from collections import abc
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from refllm.serve.kv_manager import Copies
from refllm.serve.request import Sequence

Name = tuple[Hashable, int]  # (a request's id, which of its sequences)


class ScheduledSequence(NamedTuple):
    """One sequence's share of a step."""

    name: Name
    start: int
    count: int  # type: ignore[assignment]  # hides tuple.count
    blocks: tuple[int, ...]
    samples: int
    pad: int = 0


class PaddingRow(NamedTuple):
    """A row of a padded batch whose request has ended: it is computed, and nobody wants the
    result.
    """

    start: int  # columns before it, padding included
    count: int  # type: ignore[assignment]  # hides tuple.count
    first: int  # slot of its column 0


@dataclass
class Plan:
    """A step. ``items`` in the order in which they were planned; copies are made first, in
    their order.
    """

    step: int
    items: list[ScheduledSequence]
    # (from, to): blocks to copy in all layers
    copies: list[tuple[int, int]] = field(default_factory=list)
    # left the queue; beams may have to wait for room all the same
    admitted: list[Name] = field(default_factory=list)
    # lost their memory and went back to the queue
    preempted: list[Name] = field(default_factory=list)
    # rows that compute nothing useful (static batching)
    padding_rows: list[PaddingRow] = field(default_factory=list)
    waiting: int = 0  # sequences still in the queue
    budget: int | None = None  # tokens that the step may compute; None: no limit
    seats: int | None = None  # sequences that may run
    block_size: int = 1

    @property
    def tokens(self) -> int:
        """Tokens that the step computes for somebody, padding not counted."""
        return sum(item.count for item in self.items)

    @property
    def sampling(self) -> list[ScheduledSequence]:
        """The items that yield tokens, in order: ``update`` wants an outcome for each."""
        return [item for item in self.items if item.samples]

    def batch(self) -> list[tuple[int, int]]:
        """(past, new) of every row, padding included: what the step costs."""
        rows = [
            (item.start + item.pad, item.count) if item.start else (0, item.count + item.pad)
            for item in self.items
        ]
        return rows + [(row.start, row.count) for row in self.padding_rows]

    def slots(self, item: ScheduledSequence) -> list[int]:
        """The slots that an item writes."""
        return place(item.blocks, self.block_size, item.start, item.start + item.count)

    def check(self) -> None:
        """AssertionError if the plan breaks a promise."""
        names = [item.name for item in self.items]
        assert len(set(names)) == len(names), "a sequence stands twice in a plan"
        assert self.budget is None or self.tokens <= self.budget, "more tokens than the budget"
        assert self.seats is None or len(names) + len(self.padding_rows) <= self.seats, (
            "more sequences than seats"
        )
        assert not (self.preempted and self.admitted), "admitted in a step that preempted"
        assert not set(self.preempted) & set(names), "a preempted sequence computes"
        for item in self.items:
            assert min(item.start, item.pad) >= 0, "a position below 0"
            assert item.count >= 1, "an item that computes no token"
            assert 0 <= item.samples <= item.count, "an item samples more than it computes"
            assert self.block_size == 0 or len(set(item.blocks)) == len(item.blocks), (
                "a block twice in a table"
            )
            end = item.start + item.count
            room = len(item.blocks) * self.block_size
            assert self.block_size == 0 or end <= room, "a token lies beyond its blocks"
        written = [slot for item in self.items for slot in self.slots(item)]
        written += [row.first + row.start for row in self.padding_rows]
        assert len(set(written)) == len(written), "two sequences write one slot"
        targets = [target for _, target in self.copies]
        assert len(set(targets)) == len(targets), "two copies into one block"
        _check_readers(self.items, written, self.block_size)


def place(blocks: abc.Sequence[int], block_size: int, start: int, stop: int) -> list[int]:
    """The slots of positions [start, stop) of a sequence that lies in ``blocks`` (one run
    where block_size is 0).
    """
    b = block_size
    if b == 0:
        return list(range(blocks[0] + start, blocks[0] + stop))
    if stop == start + 1:  # a decode step: called for every sequence
        return [blocks[start // b] * b + start % b]
    whole = [
        slot
        for block in blocks[start // b : -(-stop // b)]
        for slot in range(block * b, block * b + b)
    ]
    return whole[start % b : start % b + stop - start]


def _check_readers(items: abc.Sequence[ScheduledSequence], written: list[int], b: int) -> None:
    """Nobody else holds a block that is written in this step."""
    if b:
        touched = {slot // b for slot in written}
        holders = [block for item in items for block in item.blocks if block in touched]
        assert len(set(holders)) == len(holders), "a block that is written is shared"


class SampledTokens(NamedTuple):
    """How a sequence goes on: its next tokens, and why it ends with them if it does. No token
    only with a reason.
    """

    tokens: abc.Sequence[int]
    reason: str | None = None  # "length" is the scheduler's own


class SequenceUpdate(NamedTuple):
    """What came of a step for one sequence."""

    sequence: Sequence
    tokens: list[int]
    reason: str | None


Outcome = abc.Sequence[SampledTokens]


class PlanBuilder:
    """A plan in the making: what each sequence does in it, and how much of the budget is
    left.
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        self.room = plan.budget
        self.items: dict[Sequence, ScheduledSequence] = {}
        self.copies: dict[Sequence, Copies] = {}

    def put(
        self, sequence: Sequence, count: int, blocks: tuple[int, ...], copies: Copies, pad: int = 0
    ) -> None:
        """Plan ``count`` tokens of a sequence; of its drafts those that are not among them
        are dropped.
        """
        # drafts among the tokens; below 0: not finished yet
        ahead = sequence.computed + count - len(sequence.tokens)
        if sequence.drafts:
            del sequence.drafts[max(0, ahead) :]
        self.items[sequence] = ScheduledSequence(
            sequence.key, sequence.computed, count, blocks, max(0, ahead + 1), pad
        )
        if copies:
            self.copies[sequence] = copies
        if self.room is not None:
            self.room -= count

    def take_back(self, sequence: Sequence) -> None:
        """Its share goes back into the budget, if it has one."""
        item = self.items.pop(sequence, None)
        self.copies.pop(sequence, None)
        if item is not None and self.room is not None:
            self.room += item.count


def check_outcomes(
    sampling: abc.Sequence[Sequence],
    outcomes: abc.Sequence[Outcome],
    live: Mapping[Hashable, abc.Sequence[Sequence]],
) -> None:
    """ValueError unless each outcome fits its sequence; ``live`` has the sequences of each
    request.
    """
    if len(sampling) != len(outcomes):
        raise ValueError(f"{len(sampling)} sequences were sampled, got {len(outcomes)} outcomes")
    grown: dict[Hashable, int] = {}
    for sequence, outcome in zip(sampling, outcomes, strict=True):
        request = sequence.request
        drafts = sequence.drafts
        if len(outcome) == 1:
            if not drafts and len(outcome[0].tokens) == 1:
                continue  # one more token: what nearly all of a step are
        else:
            grown[request.id] = grown.get(request.id, 0) + len(outcome) - 1
        if len(outcome) > 1 and (drafts or (len(outcome) > sequence.seats and not request.beam)):
            raise ValueError(
                f"{sequence} may become {1 if drafts else sequence.seats}, got {len(outcome)} continuations"
            )
        for tokens, reason in outcome:
            if not (0 if reason else 1) <= len(tokens) <= 1 + len(drafts):
                raise ValueError(
                    f"{sequence} yields 1 to {1 + len(drafts)} tokens, got {len(tokens)}"
                )
            if len(tokens) > 1 and list(tokens[:-1]) != drafts[: len(tokens) - 1]:
                raise ValueError(
                    f"{sequence}: accepted {list(tokens[:-1])}, but its drafts were {drafts}"
                )
    for name, more in grown.items():
        if (sequences := live.get(name)) and len(sequences) + more > sequences[0].request.n:
            raise ValueError(f"request {name!r} has n = {sequences[0].request.n} sequences, not more")
