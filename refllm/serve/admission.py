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

Left out: ageing against starvation: under longest prefix match a request that shares nothing
may wait as long as requests that share keep coming.
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
    """

    def __init__(self, *, shared: int = 32, longest_queue: int = 128):
        """ValueError for ``shared`` below 1 or a negative ``longest_queue``."""
        if shared < 1 or longest_queue < 0:
            raise InputError(
                "shared must be 1 or more and longest_queue 0 or more, "
                f"got {shared}, {longest_queue}"
            )
        self.shared = shared
        self.longest_queue = longest_queue

    def push(self, waiting: list[Sequence], sequence: Sequence) -> None:
        """Insert by age."""
        insort(waiting, sequence, key=_age)

    def candidates(self, waiting: list[Sequence], memory: KVManager) -> abc.Iterator[Sequence]:
        """Those that the in-batch rule lets through, by what is cached of them now."""
        if len(waiting) > self.longest_queue:
            yield from FirstCome().candidates(waiting, memory)
            return
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
