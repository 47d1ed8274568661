"""Which waiting sequence is admitted next, and which running one is preempted first.

Sources: vLLM's scheduler (first come first served, priority, and their victims); SGLang,
Zheng et al. 2024, section 3 and its schedule policy (longest prefix match, the in-batch
rule, first come first served for a long queue).

| order    | admitted first                 | victim when blocks run out      |
|----------|--------------------------------|---------------------------------|
| fcfs     | the first that was submitted   | the last that was admitted      |
| priority | the lowest (priority, arrival) | the highest (priority, arrival) |
| lpm      | the longest cached prefix      | the last that was admitted      |

Preempted sequences return to the queue in the order of submission, so under fcfs they come
next. An order has no state of its own.

Under priority a waiting sequence also takes the place of running ones of a less urgent
priority (a larger number; the time of arrival does not count here): the least urgent is
preempted first, until the other fits. (vLLM did so before its V1 scheduler, which preempts
only where running sequences run out of blocks.) It computes its tokens again later.

Under longest prefix match no request starves: see ``LongestPrefix``.
"""

from __future__ import annotations

from bisect import insort
from collections import abc
from typing import Protocol

from refllm.errors import InputError, alternatives
from refllm.serve.kv_manager import KVManager
from refllm.serve.request import Sequence


class Order(Protocol):
    """How a queue is kept (``push``) and read (``candidates``), and which running sequence
    is preempted (``victim``).
    """

    def push(self, waiting: list[Sequence], sequence: Sequence) -> None:
        """Put a new or a preempted sequence into the queue."""

    def candidates(self, waiting: list[Sequence], memory: KVManager) -> abc.Iterator[Sequence]:
        """The sequences that may be admitted, best first; the caller takes each one out of
        ``waiting`` before it asks for the next.
        """

    def victim(self, running: list[Sequence]) -> Sequence:
        """Which sequence is preempted; ``running`` is in the order of admission."""

    # whether a waiting sequence may take the place of a running one
    preempts: bool

    def yields_to(self, waiting: Sequence, running: list[Sequence]) -> Sequence | None:
        """The running sequence that is preempted first for a waiting one; None if none is."""


class FirstCome:
    """The oldest first; a preempted sequence is older than all that were never admitted."""

    def push(self, waiting: list[Sequence], sequence: Sequence) -> None:
        """Insert by age."""
        insort(waiting, sequence, key=_age)

    def candidates(self, waiting: list[Sequence], memory: KVManager) -> abc.Iterator[Sequence]:
        """The head of the queue, as long as there is one."""
        while waiting:
            yield waiting[0]

    def victim(self, running: list[Sequence]) -> Sequence:
        """The last that was admitted."""
        return running[-1]

    preempts = False

    def yields_to(self, waiting: Sequence, running: list[Sequence]) -> Sequence | None:
        """None: no sequence is preempted for one that waits."""
        return None


class Priority:
    """The lowest (priority, arrival, submission, index) first; the highest is preempted."""

    def push(self, waiting: list[Sequence], sequence: Sequence) -> None:
        """Insert by rank."""
        insort(waiting, sequence, key=_rank)

    def candidates(self, waiting: list[Sequence], memory: KVManager) -> abc.Iterator[Sequence]:
        """The head of the queue, as long as there is one."""
        while waiting:
            yield waiting[0]

    def victim(self, running: list[Sequence]) -> Sequence:
        """The least urgent."""
        return max(running, key=_rank)

    preempts = True

    def yields_to(self, waiting: Sequence, running: list[Sequence]) -> Sequence | None:
        """The least urgent of the running sequences, if its priority is less urgent."""
        least = max(running, key=_rank, default=None)
        if least is None or least.request.priority <= waiting.request.priority:
            return None
        return least


def _rank(sequence: Sequence) -> tuple[int, float, int, int]:
    request = sequence.request
    return request.priority, request.arrival, sequence.order, sequence.index


def _age(sequence: Sequence) -> tuple[int, int]:
    return sequence.order, sequence.index


class LongestPrefix:
    """The longest cached prefix first, the older one among equals.

    The in-batch rule: among waiting sequences that share their first ``shared`` tokens, when
    no more than these are cached, only the first may be admitted. The others wait until it
    has filled the cache. (SGLang puts them at the end of the queue; where a step has room for
    them all, that alone would compute the prefix once per sequence.) A queue of more than
    ``longest_queue`` sequences is served first come first served: sorting it would cost one
    match per sequence and step.

    Ageing: sequences after which more than ``patience`` requests have been submitted, as far
    as the youngest in the queue shows, come first, the oldest of them at the head. So at most
    ``patience`` of the requests that were submitted after a request are admitted before it,
    whatever the cache holds.
    """

    def __init__(self, *, shared: int = 32, longest_queue: int = 128, patience: int = 512):
        """ValueError for ``shared`` below 1, or a negative ``longest_queue`` or ``patience``."""
        if shared < 1 or longest_queue < 0 or patience < 0:
            raise InputError(
                "shared must be 1 or more, longest_queue and patience 0 or more, "
                f"got {shared}, {longest_queue}, {patience}"
            )
        self.shared = shared
        self.patience = patience
        self.longest_queue = longest_queue

    def push(self, waiting: list[Sequence], sequence: Sequence) -> None:
        """Insert by age."""
        insort(waiting, sequence, key=_age)

    def candidates(self, waiting: list[Sequence], memory: KVManager) -> abc.Iterator[Sequence]:
        """Those that the in-batch rule lets through, by what is cached of them now."""
        if len(waiting) > self.longest_queue:
            yield from FirstCome().candidates(waiting, memory)
            return
        # the queue is in the order of submission, so the aged ones stand at its head
        newest = waiting[-1].order if waiting else 0
        aged = [one for one in waiting if newest - one.order > self.patience]
        yield from aged
        cached = {sequence: memory.match(sequence) for sequence in waiting}
        heads: set[tuple[str | None, tuple[int, ...]]] = set()
        ready = []
        for sequence in waiting:
            head = (sequence.request.salt, tuple(sequence.tokens[: self.shared]))
            if cached[sequence] <= self.shared and len(head[1]) == self.shared:
                if head in heads:
                    continue
                heads.add(head)
            ready.append(sequence)
        # a stable sort: ties stay in the order of submission
        yield from sorted(ready, key=lambda sequence: -cached[sequence])

    def victim(self, running: list[Sequence]) -> Sequence:
        """The last that was admitted."""
        return running[-1]

    preempts = False

    def yields_to(self, waiting: Sequence, running: list[Sequence]) -> Sequence | None:
        """None: no sequence is preempted for one that waits."""
        return None


def order_named(order: str | Order) -> Order:
    """The order of that name; an ``Order`` is returned unchanged."""
    if not isinstance(order, str):
        return order
    kinds: dict[str, abc.Callable[[], Order]] = {
        "fcfs": FirstCome,
        "priority": Priority,
        "lpm": LongestPrefix,
    }
    if order not in kinds:
        raise InputError(f"unknown order {order!r}; {alternatives(order, kinds)}")
    return kinds[order]()
