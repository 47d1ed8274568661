"""Who is admitted next, and who loses his memory first: first come first served, by
priority, by longest prefix.

Sources: vLLM's scheduler (first come, priority, their victims); SGLang, Zheng et al. 2024,
section 3 and its schedule policy (longest prefix match, the in-batch rule, first come for a
long queue).

| order      | admitted first                             | victim when blocks run out                      |
|------------|--------------------------------------------|-------------------------------------------------|
| fcfs       | who was submitted first                    | who was admitted last                           |
| priority   | the lowest (priority, arrival)             | the highest (priority, arrival)                 |
| lpm        | the longest cached prefix                  | who was admitted last                           |

Preempted sequences return to the queue by their age, so they come next under fcfs. An order
keeps nothing of its own.

Left out: ageing against starvation: under longest prefix match a request that shares
nothing may wait as long as others that share keep coming.
"""

from __future__ import annotations

from bisect import insort
from collections import abc
from collections.abc import Callable, Iterator
from typing import Protocol

from refllm.serve.kv_manager import KVManager
from refllm.serve.request import Sequence


class Order(Protocol):
    """How a queue is kept (``push``), read (``candidates``), and who is preempted
    (``victim``).
    """

    def push(self, waiting: list[Sequence], sequence: Sequence) -> None:
        """Put a sequence into the queue, a new one or one that was preempted."""

    def candidates(self, waiting: list[Sequence], memory: KVManager) -> Iterator[Sequence]:
        """Who may be admitted, best first; whoever asks for the next has taken the last one
        out of ``waiting``.
        """

    def victim(self, running: abc.Sequence[Sequence]) -> Sequence:
        """Who of those that run is preempted; ``running`` is in the order of admission."""


class FirstCome:
    """The oldest first; one that was preempted is older than all that were never admitted,
    so it comes next.
    """

    def push(self, waiting: list[Sequence], sequence: Sequence) -> None:
        insort(waiting, sequence, key=_age)

    def candidates(self, waiting: list[Sequence], memory: KVManager) -> Iterator[Sequence]:
        while waiting:
            yield waiting[0]

    def victim(self, running: abc.Sequence[Sequence]) -> Sequence:
        return running[-1]


class Priority:
    """The lowest (priority, arrival, order of submission, index) first, and the highest
    preempted first.
    """

    def push(self, waiting: list[Sequence], sequence: Sequence) -> None:
        insort(waiting, sequence, key=_rank)

    def candidates(self, waiting: list[Sequence], memory: KVManager) -> Iterator[Sequence]:
        while waiting:
            yield waiting[0]

    def victim(self, running: abc.Sequence[Sequence]) -> Sequence:
        return max(running, key=_rank)


def _rank(sequence: Sequence) -> tuple[int, float, int, int]:
    return sequence.request.priority, sequence.request.arrival, sequence.order, sequence.index


def _age(sequence: Sequence) -> tuple[int, int]:
    return sequence.order, sequence.index


class LongestPrefix:
    """The longest cached prefix first, ties as they came.

    The in-batch rule: of waiting sequences that share their first ``shared`` tokens while at
    most so many are cached, only the first may be admitted; the others wait until it has
    filled the cache. (SGLang puts them at the end of the queue; where a step has room for
    them all, that alone would compute the prefix as often.) A queue of more than
    ``longest_queue`` is served first come first served: sorting it would cost a match a
    sequence and step.
    """

    def __init__(self, *, shared: int = 32, longest_queue: int = 128):
        if shared < 1 or longest_queue < 0:
            raise ValueError(
                f"shared must be 1 or more and longest_queue 0 or more, got {shared}, {longest_queue}"
            )
        self.shared = shared
        self.longest_queue = longest_queue

    def push(self, waiting: list[Sequence], sequence: Sequence) -> None:
        insort(waiting, sequence, key=_age)

    def candidates(self, waiting: list[Sequence], memory: KVManager) -> Iterator[Sequence]:
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
        # a stable sort: ties as they came
        yield from sorted(ready, key=lambda sequence: -cached[sequence])

    def victim(self, running: abc.Sequence[Sequence]) -> Sequence:
        return running[-1]


def named(order: str | Order) -> Order:
    """An order by its name; one that is an order already is returned as it is."""
    if not isinstance(order, str):
        return order
    kinds: dict[str, Callable[[], Order]] = {
        "fcfs": FirstCome,
        "priority": Priority,
        "lpm": LongestPrefix,
    }
    if order not in kinds:
        raise ValueError(f"unknown order {order!r}; choose one of {', '.join(kinds)}")
    return kinds[order]()
