"""Memory as it was before paging: one run of slots for all that a request may ever need, or
a row of a rectangle.

Source: Kwon et al. 2023, section 6.1. Orca itself was never published: its three variants
there differ in how much they know of the output's length.

| rule       | slots reserved for a prompt of P tokens                                                       |
|------------|-----------------------------------------------------------------------------------------------|
| ``max``    | the longest sequence that is allowed at all                                                   |
| ``pow2``   | P + ``max_tokens`` rounded up to a power of two                                               |
| ``oracle`` | P + ``max_tokens``: exact, where requests run to their ``max_tokens`` (``ignore_eos``)        |

A reservation is made at admission and is never outgrown: nothing is preempted, and what
will be used last is kept from everybody else from the beginning.

Left out: sharing (a run cannot be shared: n continuations are n requests here).
"""

from __future__ import annotations

from dataclasses import dataclass

from refllm.kv.contiguous_allocator import Buddies, FirstFit
from refllm.serve.kv_manager import Copies
from refllm.serve.request import Request, Sequence

RULES = ("max", "pow2", "oracle")


@dataclass
class Reservation:
    """Where a sequence lies: slots [first, first + length) are written."""

    first: int
    length: int = 0


class _Contiguous:
    """What both kinds share: no prefixes, no growth, no forks."""

    block_size = 0
    shares = False

    def __init__(self) -> None:
        self._runs: dict[Sequence, Reservation] = {}

    def match(self, sequence: Sequence) -> int:
        return 0

    def reserve(self, sequence: Sequence, count: int) -> Copies | None:
        return []

    def commit(self, sequence: Sequence) -> None:
        self._runs[sequence].length = sequence.computed

    def fork(self, parent: Sequence, child: Sequence) -> None:
        raise ValueError(
            "a contiguous run cannot be shared: submit n requests instead of one with n"
        )

    def blocks(self, sequence: Sequence) -> tuple[int, ...]:
        return (self._runs[sequence].first,)


class ReservedKVManager(_Contiguous):
    """A run for each request, by one of ``RULES``; ``buddy`` rounds runs up to powers of
    two, as the baselines did.
    """

    def __init__(self, slots: int, rule: str, *, longest: int = 2048, buddy: bool = True):
        super().__init__()
        if rule not in RULES:
            raise ValueError(f"unknown rule {rule!r}; choose one of {', '.join(RULES)}")
        self.rule = rule
        self.longest = longest
        self.runs: Buddies | FirstFit = Buddies(slots) if buddy else FirstFit(slots)

    @property
    def slots(self) -> int:
        return self.runs.slots

    @property
    def allocated(self) -> int:
        return self.runs.used

    def size(self, request: Request) -> int:
        """Slots that a request's run has, before the allocator rounds."""
        output = {"max": self.longest - len(request.prompt), "oracle": request.max_tokens}.get(
            self.rule, 1 << max(0, request.max_tokens - 1).bit_length()
        )
        return len(request.prompt) + output

    def refuses(self, request: Request) -> str | None:
        if self.rule == "max" and len(request.prompt) + request.max_tokens > self.longest:
            return f"has {len(request.prompt)} + {request.max_tokens} tokens, and the longest sequence is {self.longest}"
        if self.size(request) > self.runs.largest:
            return f"needs a run of {self.size(request)} slots, and the largest has {self.runs.largest}"
        return None

    def admit(self, sequence: Sequence, count: int, *, alone: bool) -> bool:
        start = self.runs.allocate(self.size(sequence.request))
        if start is None:
            return False
        self._runs[sequence] = Reservation(start)
        return True

    def release(self, sequence: Sequence, *, preempted: bool = False) -> None:
        run = self._runs.pop(sequence, None)
        if run is not None:
            self.runs.free(run.first)

    def check(self) -> None:
        self.runs.check()
        for sequence, run in self._runs.items():
            assert run.length == sequence.computed <= self.runs.size(run.first), (
                f"{sequence} has outgrown its run"
            )


class PaddedKVManager(_Contiguous):
    """Rows for a padded batch, every one as wide as the longest prompt and the longest
    output together.

    Prompts are padded on the left, so that all outputs begin in one column. Rows are given
    back together, when the last member of the batch has been released.
    """

    def __init__(self, slots: int, *, longest: int | None = None):
        """``longest`` closes a batch whose rows would be wider, as vLLM's benchmark of its
        predecessors does.
        """
        super().__init__()
        if slots < 1 or (longest is not None and longest < 1):
            raise ValueError(f"needs at least one slot a row and in all, got {longest} and {slots}")
        self.slots = slots
        self.longest = slots if longest is None else min(slots, longest)
        self.prompt = 0  # columns: of the longest prompt and of the longest output
        self.output = 0
        self._rows: dict[Sequence, int] = {}

    @property
    def allocated(self) -> int:
        return len(self._rows) * (self.prompt + self.output)

    def refuses(self, request: Request) -> str | None:
        width = len(request.prompt) + request.max_tokens
        if width <= self.longest:
            return None
        return f"needs a row of {width} slots, and a row may have {self.longest}"

    def admit(self, sequence: Sequence, count: int, *, alone: bool) -> bool:
        prompt = max(self.prompt, len(sequence.request.prompt))
        output = max(self.output, sequence.request.max_tokens)
        if (len(self._rows) + 1) * (prompt + output) > self.slots or prompt + output > self.longest:
            return False
        self.prompt = prompt
        self.output = output
        self._rows[sequence] = len(self._rows)
        self._runs[sequence] = Reservation(0)
        for member, row in self._rows.items():  # a wider batch has its rows further apart
            self._runs[member].first = row * (prompt + output) + self.pad(member)
        return True

    def ended(self) -> list[int]:
        """Where the rows of members that have been released begin."""
        return [
            row * (self.prompt + self.output)
            for sequence, row in self._rows.items()
            if sequence not in self._runs
        ]

    def pad(self, sequence: Sequence) -> int:
        """Columns before its first token."""
        return self.prompt - len(sequence.request.prompt)

    def release(self, sequence: Sequence, *, preempted: bool = False) -> None:
        if self._runs.pop(sequence, None) is not None and not self._runs:
            self._rows.clear()
            self.prompt = 0
            self.output = 0

    def check(self) -> None:
        assert self.allocated <= self.slots
        assert set(self._runs) <= set(self._rows)
        assert bool(self._runs) == bool(self._rows), "rows of a batch that has ended"
        for sequence, run in self._runs.items():
            assert run.length == sequence.computed <= self.output + len(sequence.request.prompt)
