"""A cache that counts its bytes and evicts what was not used for the longest time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Generic, TypeVar

Value = TypeVar("Value")


class BoundedCache(Generic[Value]):
    """Values by key, at most ``capacity`` bytes of them.

    ``size_of`` says how large a value is; ``overhead`` is added for its key. A value larger
    than the whole capacity is not kept. ``hits``, ``misses`` and ``evicted`` count.

    >>> cache = BoundedCache(10, len, overhead=0)
    >>> [cache.get(key, lambda: "12345") for key in "abca"], cache.hits, cache.evicted, len(cache)
    (['12345', '12345', '12345', '12345'], 0, 2, 2)
    """

    def __init__(
        self, capacity: int, size_of: Callable[[Value], int], *, overhead: int = 512
    ) -> None:
        self.capacity = capacity
        self.nbytes = 0
        self.hits = 0
        self.misses = 0
        self.evicted = 0
        self._size_of = size_of
        self._overhead = overhead
        self._lock = Lock()
        self._values: OrderedDict[Hashable, Value] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """The value of ``key``, made now if there is none. Threads may ask at the same time; then
        a value may be made twice.
        """
        with self._lock:
            found = self._values.get(key)
            if found is not None:
                self.hits += 1
                self._values.move_to_end(key)
                return found
            self.misses += 1
        value = make()
        size = self._bytes(value)
        with self._lock:
            if size <= self.capacity and key not in self._values:
                self._values[key] = value
                self.nbytes += size
                while self.nbytes > self.capacity:
                    _, oldest = self._values.popitem(last=False)
                    self.nbytes -= self._bytes(oldest)
                    self.evicted += 1
        return value

    def _bytes(self, value: Value) -> int:
        return self._size_of(value) + self._overhead

    def check(self) -> None:
        """AssertionError if the bytes are not those of the values, or more than the capacity."""
        assert self.nbytes == sum(map(self._bytes, self._values.values())) <= self.capacity
