"""Contiguous runs of slots, as servers gave them before paging: first fit, and the buddy
system.

Sources: Knuth, The Art of Computer Programming 1, section 2.5; Kwon et al. 2023, section
6.1, whose baselines keep each request in one run that a buddy allocator gives.

| symbol   | name                        | first fit                    | buddies                                    |
|----------|-----------------------------|------------------------------|--------------------------------------------|
| run      | slots [start, start + size) | as large as it was asked for | the next power of two, aligned to its size |
| internal | given and never used        | nothing (the reservation is) | up to half of each run                     |
| external | free, in holes too small    | what lies between runs       | what has no free buddy                     |

A number of slots that is no power of two is a row of buddies of its own: 15,700 = 8192 +
4096 + 2048 + 1024 + ….

Left out: moving runs together (compaction): the keys and values would have to be copied.
"""

from __future__ import annotations

from bisect import bisect_left, insort


class FirstFit:
    """Runs of exactly the size that is asked for, each in the lowest hole that is large
    enough.
    """

    def __init__(self, slots: int):
        if slots < 1:
            raise ValueError(f"needs at least one slot, got {slots}")
        self.slots = slots
        self.used = 0  # slots given out
        self._sizes: dict[int, int] = {}  # start of a run → its size
        self._holes = [(0, slots)]  # (start, size), in order, never two that touch

    @property
    def largest(self) -> int:
        """The largest run that an empty memory can give."""
        return self.slots

    def allocate(self, size: int) -> int | None:
        """Start of a run of ``size`` ≥ 1 slots, None if no hole is large enough."""
        for i, (start, room) in enumerate(self._holes):
            if room >= _checked(size):
                self._holes[i : i + 1] = [(start + size, room - size)] if room > size else []
                self._sizes[start] = size
                self.used += size
                return start
        return None

    def size(self, start: int) -> int:
        """How many slots the run that begins at ``start`` has. ValueError if none does."""
        return _run(self._sizes, start)

    def free(self, start: int) -> None:
        """Give a run back; holes that touch become one. ValueError for a run that was not
        given.
        """
        size = _run(self._sizes, start)
        del self._sizes[start]
        self.used -= size
        i = bisect_left(self._holes, (start, 0))
        if i < len(self._holes) and start + size == self._holes[i][0]:
            size += self._holes.pop(i)[1]
        if i and sum(self._holes[i - 1]) == start:
            i -= 1
            start, before = self._holes.pop(i)
            size += before
        self._holes.insert(i, (start, size))

    def check(self) -> None:
        """AssertionError if runs and holes do not tile the slots, or two holes touch."""
        runs = sorted([*self._sizes.items(), *self._holes])
        assert [start for start, _ in runs] == [0, *(start + size for start, size in runs)][:-1], (
            "runs do not tile"
        )
        assert sum(size for _, size in runs) == self.slots, "slots are lost"
        assert all(sum(a) < b for a, (b, _) in zip(self._holes, self._holes[1:], strict=False)), (
            "two holes touch"
        )
        assert self.used == sum(self._sizes.values())


class Buddies:
    """Runs of powers of two: the smallest free one that is large enough, the lowest of
    them, halved to size.
    """

    def __init__(self, slots: int):
        if slots < 1:
            raise ValueError(f"needs at least one slot, got {slots}")
        self.slots = slots
        self.used = 0  # slots given out, rounding included
        self._sizes: dict[int, int] = {}
        # size → starts, in order
        self._free: dict[int, list[int]] = {1 << k: [] for k in range(slots.bit_length())}
        # (start, size) of the largest aligned runs: a merge ends there
        self._tops: list[tuple[int, int]] = []
        start = 0
        for size in reversed(self._free):
            if slots & size:
                self._tops.append((start, size))
                self._free[size].append(start)
                start += size

    @property
    def largest(self) -> int:
        """The largest run that an empty memory can give."""
        return self._tops[0][1]

    def allocate(self, size: int) -> int | None:
        """Start of a run of at least ``size`` ≥ 1 slots, None if there is none."""
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
        """How many slots the run that begins at ``start`` has. ValueError if none does."""
        return _run(self._sizes, start)

    def free(self, start: int) -> None:
        """Give a run back and merge it with its buddy as long as that is free. ValueError
        for one not given.
        """
        size = _run(self._sizes, start)
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
        """AssertionError if runs do not tile the slots, one is not aligned, or two free
        buddies stand apart.
        """
        free = [(start, size) for size, starts in self._free.items() for start in starts]
        runs = sorted([*self._sizes.items(), *free])
        assert [start for start, _ in runs] == [0, *(start + size for start, size in runs)][:-1], (
            "runs do not tile"
        )
        assert sum(size for _, size in runs) == self.slots, "slots are lost"
        for start, size in runs:
            assert size & (size - 1) == 0, "a run is no power of two"
            assert start % size == 0, "a run is not aligned to its size"
        for start, size in free:
            assert (start, size) in self._tops or (start ^ size, size) not in free, (
                "free buddies were not merged"
            )
        assert self.used == sum(self._sizes.values())


def _checked(size: int) -> int:
    if size < 1:
        raise ValueError(f"a run has at least one slot, got {size}")
    return size


def _run(sizes: dict[int, int], start: int) -> int:
    if start not in sizes:
        raise ValueError(f"no run begins at slot {start}")
    return sizes[start]
