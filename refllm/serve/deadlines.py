"""When requests time out: a heap of deadlines.

A request that finishes leaves its deadline in the heap; the engine ignores it when it passes.
"""

from __future__ import annotations

from collections import abc
from heapq import heappop, heappush
from itertools import count


class Deadlines:
    """Requests by the time at which they end.

    >>> deadlines = Deadlines()
    >>> deadlines.add(5.0, "late")
    >>> deadlines.add(2.0, "early")
    >>> deadlines.passed(4.0), len(deadlines)
    ([('early', 2.0)], 1)
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, abc.Hashable]] = []
        self._order = count()  # ids need not be comparable

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, time: float, request_id: abc.Hashable) -> None:
        """The request ends at ``time``."""
        heappush(self._heap, (time, next(self._order), request_id))

    def passed(self, now: float) -> list[tuple[abc.Hashable, float]]:
        """Take out, and return, the requests whose time is over, and their deadlines."""
        found = []
        while self._heap and self._heap[0][0] <= now:
            time, _, request_id = heappop(self._heap)
            found.append((request_id, time))
        return found
