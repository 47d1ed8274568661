"""Contiguous slot ranges, as servers allocated them before paging: first fit, and the buddy system.

Sources: Knuth, The Art of Computer Programming 1, section 2.5; Kwon et al. 2023, section
6.1, whose baselines keep each request in one range from a buddy allocator.

| term                   | first fit                 | buddy system                           |
|------------------------|---------------------------|----------------------------------------|
| range                  | exactly the size that was | the next power of two, aligned to its  |
| [start, start + size)  | requested                 | size                                   |
| internal fragmentation | none in the allocator     | up to half of each range               |
| (allocated, not used)  | (but in the reservation)  |                                        |
| external fragmentation | holes between ranges      | free ranges without a free buddy       |
| (free, holes too small)|                           |                                        |

A number of slots that is no power of two is split into several top ranges:
15,700 = 8192 + 4096 + 2048 + 1024 + ….

Left out: moving ranges together (compaction), which would copy the keys and values.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from itertools import pairwise

from refllm.errors import InputError


class FirstFitAllocator:
    """Ranges of exactly the requested size, each in the lowest hole that is large enough.

    >>> memory = FirstFitAllocator(10)
    >>> memory.allocate(4), memory.allocate(4), memory.allocate(4)
    (0, 4, None)
    """

    def __init__(self, slots: int):
        if slots < 1:
            raise InputError(f"needs at least one slot, got {slots}")
        self.slots = slots
        self.used = 0  # allocated slots
        self._sizes: dict[int, int] = {}  # start of a range → its size
        self._holes = [(0, slots)]  # (start, size), in order, no two adjacent

    @property
    def largest(self) -> int:
        """The largest range that an empty memory can allocate."""
        return self.slots

    def allocate(self, size: int) -> int | None:
        """Start of a range of ``size`` ≥ 1 slots, None if no hole is large enough."""
        for i, (start, free) in enumerate(self._holes):
            if free >= _checked(size):
                self._holes[i : i + 1] = [(start + size, free - size)] if free > size else []
                self._sizes[start] = size
                self.used += size
                return start
        return None

    def size(self, start: int) -> int:
        """How many slots the range that begins at ``start`` has. ValueError if none begins
        there.
        """
        return _size_of(self._sizes, start)

    def free(self, start: int) -> None:
        """Free a range; adjacent holes become one. ValueError for a range that is not allocated."""
        size = _size_of(self._sizes, start)
        del self._sizes[start]
        self.used -= size
        i = bisect_left(self._holes, (start, 0))
        if i < len(self._holes) and start + size == self._holes[i][0]:  # the hole behind
            size += self._holes.pop(i)[1]
        if i and sum(self._holes[i - 1]) == start:  # the hole in front
            i -= 1
            start, before = self._holes.pop(i)
            size += before
        self._holes.insert(i, (start, size))

    def check(self) -> None:
        """AssertionError if ranges and holes do not tile the slots, or two holes are adjacent."""
        _check_tiling([*self._sizes.items(), *self._holes], self.slots)
        for first, second in pairwise(self._holes):
            assert sum(first) < second[0], "two holes are adjacent"
        assert self.used == sum(self._sizes.values())


class BuddyAllocator:
    """Ranges of powers of two: the smallest free one that is large enough, the lowest of
    them, halved until it fits.

    >>> memory = BuddyAllocator(16)
    >>> memory.allocate(3), memory.allocate(5), memory.used
    (0, 8, 12)
    """

    def __init__(self, slots: int):
        if slots < 1:
            raise InputError(f"needs at least one slot, got {slots}")
        self.slots = slots
        self.used = 0  # allocated slots, rounding included
        self._sizes: dict[int, int] = {}
        # size → starts of free ranges, in order
        self._free: dict[int, list[int]] = {1 << k: [] for k in range(slots.bit_length())}
        # (start, size) of the largest aligned ranges: merging ends there
        self._tops: list[tuple[int, int]] = []
        start = 0
        for size in reversed(self._free):  # the binary digits of ``slots``, largest first
            if slots & size:
                self._tops.append((start, size))
                self._free[size].append(start)
                start += size

    @property
    def largest(self) -> int:
        """The largest range that an empty memory can allocate."""
        return self._tops[0][1]

    def allocate(self, size: int) -> int | None:
        """Start of a range of at least ``size`` ≥ 1 slots, None if there is none."""
        wanted = 1 << (_checked(size) - 1).bit_length()
        have = next((s for s, starts in self._free.items() if s >= wanted and starts), None)
        if have is None:
            return None
        start = self._free[have].pop(0)
        while have > wanted:
            have //= 2
            insort(self._free[have], start + have)  # the upper half stays free
        self._sizes[start] = wanted
        self.used += wanted
        return start

    def size(self, start: int) -> int:
        """How many slots the range that begins at ``start`` has. ValueError if none begins
        there.
        """
        return _size_of(self._sizes, start)

    def free(self, start: int) -> None:
        """Free a range and merge it with its buddy as long as that is free. ValueError for
        a range that is not allocated.
        """
        size = _size_of(self._sizes, start)
        del self._sizes[start]
        self.used -= size
        while (start, size) not in self._tops:
            # the tops lie at multiples of their own size, so this works on absolute starts
            buddy = start ^ size
            if buddy not in self._free[size]:
                break
            self._free[size].remove(buddy)
            start = min(start, buddy)
            size = 2 * size
        insort(self._free[size], start)

    def check(self) -> None:
        """AssertionError if ranges do not tile the slots, one is not aligned, or two free
        buddies are not merged.
        """
        free = [(start, size) for size, starts in self._free.items() for start in starts]
        ranges = [*self._sizes.items(), *free]
        _check_tiling(ranges, self.slots)
        for start, size in ranges:
            assert size & (size - 1) == 0, "a range is no power of two"
            assert start % size == 0, "a range is not aligned to its size"
        for start, size in free:
            assert (start, size) in self._tops or (start ^ size, size) not in free, (
                "free buddies were not merged"
            )
        assert self.used == sum(self._sizes.values())


def _checked(size: int) -> int:
    """The size of a range; ValueError below 1."""
    if size < 1:
        raise InputError(f"a range has at least one slot, got {size}")
    return size


def _size_of(sizes: dict[int, int], start: int) -> int:
    """The size of the range that begins at ``start``; ValueError if none begins there."""
    if start not in sizes:
        raise InputError(f"no range begins at slot {start}")
    return sizes[start]


def _check_tiling(ranges: list[tuple[int, int]], slots: int) -> None:
    """AssertionError if ranges (start, size) do not cover [0, slots) without overlap."""
    end = 0
    for start, size in sorted(ranges):
        assert start == end, "ranges do not tile the slots"
        end = start + size
    assert end == slots, "slots are lost"
