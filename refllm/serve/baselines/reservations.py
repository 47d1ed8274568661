"""KV memory before paging: a contiguous range of slots for all that a request may ever need,
or a row of a rectangle.

Source: Kwon et al. 2023, section 6.1. (Orca was never published; its three variants there
differ in how much they know of the output's length.)

| rule       | slots reserved for a prompt of P tokens                                         |
|------------|---------------------------------------------------------------------------------|
| ``max``    | the longest sequence that is allowed                                            |
| ``pow2``   | P + ``max_tokens`` rounded up to a power of two                                 |
| ``oracle`` | P + ``max_tokens``: exact where requests run to ``max_tokens`` (``ignore_eos``) |

A reservation is made at admission and never outgrown. So no sequence is preempted, and slots
that are used last are unavailable to others from the beginning.

Left out: sharing (a contiguous range cannot be shared: n continuations are n requests here).
"""

from __future__ import annotations

from dataclasses import dataclass

from refllm.errors import InputError
from refllm.kv.contiguous_allocator import BuddyAllocator, FirstFitAllocator
from refllm.serve.kv_manager import Copies
from refllm.serve.request import Request, Sequence

RULES = ("max", "pow2", "oracle")


@dataclass
class Reservation:
    """Where a sequence lies: slots [first, first + length) are written."""

    first: int
    length: int = 0


class _Contiguous:
    """What both managers share: no prefixes, no growth, no forks."""

    block_size = 0
    can_fork = False

    def __init__(self) -> None:
        self._reservations: dict[Sequence, Reservation] = {}

    def match(self, sequence: Sequence) -> int:
        """Nothing is cached."""
        return 0

    def reserve(self, sequence: Sequence, count: int) -> Copies | None:
        """There is always room, and nothing to copy."""
        return []

    def commit(self, sequence: Sequence) -> None:
        """Note what was written."""
        self._reservations[sequence].length = sequence.computed

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Always a ValueError."""
        raise InputError(
            "a contiguous range cannot be shared: submit n requests instead of one with n"
        )

    def blocks(self, sequence: Sequence) -> tuple[int, ...]:
        """The first slot alone."""
        return (self._reservations[sequence].first,)

    def hold(self, copies: Copies) -> None:
        """There are no copies."""

    def unhold(self, copies: Copies) -> None:
        """There are no copies."""

    def forget_prefixes(self) -> None:
        """Nothing is cached."""


class ReservedKVManager(_Contiguous):
    """One range per request, sized by one of ``RULES``; ``buddy`` rounds up to powers of two,
    as the baselines of Kwon et al. did.
    """

    def __init__(self, slots: int, rule: str, *, longest: int = 2048, buddy: bool = True):
        """ValueError for an unknown rule."""
        super().__init__()
        if rule not in RULES:
            raise InputError(f"unknown rule {rule!r}; choose one of {', '.join(RULES)}")
        self.rule = rule
        self.longest = longest
        self.allocator: BuddyAllocator | FirstFitAllocator = (
            BuddyAllocator(slots) if buddy else FirstFitAllocator(slots)
        )

    @property
    def slots(self) -> int:
        """All slots."""
        return self.allocator.slots

    @property
    def allocated(self) -> int:
        """Slots in ranges that are reserved."""
        return self.allocator.used

    def size(self, request: Request) -> int:
        """Slots to reserve for a request, before the allocator rounds them."""
        if self.rule == "max":
            return self.longest
        if self.rule == "oracle":
            return len(request.prompt) + request.max_tokens
        return len(request.prompt) + (1 << max(0, request.max_tokens - 1).bit_length())

    def rejection_reason(self, request: Request) -> str | None:
        """A request must be short enough, and its range must exist."""
        prompt = len(request.prompt)
        if self.rule == "max" and prompt + request.max_tokens > self.longest:
            return (
                f"has {prompt} + {request.max_tokens} tokens, "
                f"and the longest sequence is {self.longest}"
            )
        size = self.size(request)
        largest = self.allocator.largest
        if size > largest:
            return f"needs a range of {size} slots, and the largest has {largest}"
        return None

    def admit(self, sequence: Sequence, count: int, *, alone: bool) -> bool:
        """Reserve the sequence's range, if one is free."""
        start = self.allocator.allocate(self.size(sequence.request))
        if start is None:
            return False
        self._reservations[sequence] = Reservation(start)
        return True

    def release(self, sequence: Sequence, *, preempted: bool = False) -> None:
        """Free the range."""
        reservation = self._reservations.pop(sequence, None)
        if reservation is not None:
            self.allocator.free(reservation.first)

    def check(self) -> None:
        """Every sequence is within its range."""
        self.allocator.check()
        for sequence, reservation in self._reservations.items():
            size = self.allocator.size(reservation.first)
            assert reservation.length == sequence.computed <= size, (
                f"{sequence} has outgrown its range"
            )


class PaddedKVManager(_Contiguous):
    """Rows for a padded batch, each as wide as the longest prompt and the longest output together.

    Prompts are padded on the left, so that all outputs start in one column. Rows are freed
    together, when the last member of the batch has been released.
    """

    def __init__(self, slots: int, *, longest: int | None = None):
        """``longest`` closes a batch whose rows would be wider, as vLLM's benchmark of its
        predecessors does.
        """
        super().__init__()
        if slots < 1 or (longest is not None and longest < 1):
            raise InputError(
                f"needs at least one slot per row and in all, got {longest} and {slots}"
            )
        self.slots = slots
        self.longest = slots if longest is None else min(slots, longest)
        self.prompt = 0  # columns: of the longest prompt and of the longest output
        self.output = 0
        self._rows: dict[Sequence, int] = {}

    @property
    def allocated(self) -> int:
        """The area of the rectangle."""
        return len(self._rows) * (self.prompt + self.output)

    def rejection_reason(self, request: Request) -> str | None:
        """A request must fit into one row."""
        width = len(request.prompt) + request.max_tokens
        if width <= self.longest:
            return None
        return f"needs a row of {width} slots, and a row may have {self.longest}"

    def admit(self, sequence: Sequence, count: int, *, alone: bool) -> bool:
        """Add a row to the batch that is being formed; the other rows may become wider."""
        prompt = max(self.prompt, len(sequence.request.prompt))
        output = max(self.output, sequence.request.max_tokens)
        width = prompt + output
        if (len(self._rows) + 1) * width > self.slots or width > self.longest:
            return False
        self.prompt = prompt
        self.output = output
        self._rows[sequence] = len(self._rows)
        self._reservations[sequence] = Reservation(0)
        for member, row in self._rows.items():  # in a wider batch rows are further apart
            self._reservations[member].first = row * width + self.pad(member)
        return True

    def ended(self) -> list[int]:
        """Where the rows of released members begin."""
        width = self.prompt + self.output
        rows = self._rows.items()
        return [row * width for member, row in rows if member not in self._reservations]

    def pad(self, sequence: Sequence) -> int:
        """Columns before its first token."""
        return self.prompt - len(sequence.request.prompt)

    def release(self, sequence: Sequence, *, preempted: bool = False) -> None:
        """Mark a row as ended; free all of them with the last one."""
        held = self._reservations.pop(sequence, None) is not None
        if held and not self._reservations:
            self._rows.clear()
            self.prompt = 0
            self.output = 0

    def check(self) -> None:
        """The rectangle fits, and every sequence is within its row."""
        assert self.allocated <= self.slots
        assert set(self._reservations) <= set(self._rows)
        assert bool(self._reservations) == bool(self._rows), "rows of a batch that has ended"
        for sequence, reservation in self._reservations.items():
            end = self.output + len(sequence.request.prompt)
            assert reservation.length == sequence.computed <= end
