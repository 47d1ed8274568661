"""How long state machines run: a moment by default, 100,000 steps under the nightly
profile; and a model of memory.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Hashable, Iterable
from typing import Any, ClassVar

from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, run_state_machine_as_test

from refllm.serve.base_scheduler import BaseScheduler
from refllm.serve.plan import Plan, slots_of
from refllm.serve.request import Sequence

NIGHTLY = 100_000  # steps of every machine under the nightly profile


def run(
    machine: type[RuleBasedStateMachine], examples: int, steps: int = 50, see: Iterable[str] = ()
) -> None:
    """``examples`` runs of ``steps`` rules, then more while ``machine.seen`` lacks an event
    of ``see``.

    The nightly profile runs 100,000 rules and says how long that took (``make nightly``).
    """
    nightly = settings.get_profile("nightly").max_examples
    goal = NIGHTLY if settings.default.max_examples >= nightly else 0

    class Counted(machine):  # type: ignore[misc, valid-type]
        seen: ClassVar[Counter[str]] = Counter()
        taken: ClassVar[Counter[str]] = Counter()

        @invariant()
        def one_more(self) -> None:
            self.taken["steps"] += 1

    Counted.__name__ = machine.__name__  # a failure is printed under this name
    began = time.perf_counter()
    # Rare events have occurred by then; in CI's profile the first half of the runs repeats.
    for more in (1, 2, 4, 8):
        # a tenth more: long draws end a run early
        runs = max(examples, -(-goal * 11 // (10 * steps))) * more
        chosen = settings(
            max_examples=runs,
            stateful_step_count=steps,
            suppress_health_check=[HealthCheck.too_slow],
        )
        run_state_machine_as_test(Counted, settings=chosen)
        missing = [what for what in see if not Counted.seen[what]]
        if not missing and Counted.taken["steps"] >= goal:
            break
    seconds = time.perf_counter() - began
    print(
        f"{machine.__name__}: {Counted.taken['steps']:,} steps in {seconds:.0f} s;",
        ", ".join(f"{what} {count:,}" for what, count in sorted(Counted.seen.items())),
    )
    assert not missing, f"the machine has not seen: {missing}"


class ShadowMemory:
    """What every slot should hold: (salt, all tokens up to the one whose key and value lie
    there).

    A copy that was missed, a block that was freed too early, a prefix found with another salt
    or a slot written twice shows when it is read.
    """

    def __init__(self) -> None:
        self.held: dict[int, Any] = {}
        self.seen: Counter[str] = Counter()

    def execute(self, scheduler: BaseScheduler, plan: Plan) -> None:
        """Copies, then the reads of all items, then their writes: no item reads what another
        one writes in the same step.
        """
        pool = getattr(scheduler.memory, "pool", None)
        b = plan.block_size
        for source, target in plan.copies:
            assert pool.ref_count(target) == 1
            for i in range(b):
                self.held[target * b + i] = self.held.get(source * b + i)
        self.seen["copied"] += len(plan.copies)
        sequences = {sequence.key: sequence for sequence in scheduler.running}
        for item in plan.items:
            contents = expected_contents(sequences[item.key])
            read = slots_of(item.blocks, b, 0, item.start) if item.start else []
            assert [self.held.get(slot) for slot in read] == contents[: item.start], (
                f"{item.key} reads what is not its own"
            )
        for item in plan.items:
            contents = expected_contents(sequences[item.key])
            for slot, content in zip(
                plan.slots(item), contents[item.start : item.start + item.count], strict=True
            ):
                assert not b or pool.ref_count(slot // b) == 1, "a shared block is written"
                self.held[slot] = content


def expected_contents(sequence: Sequence) -> list[tuple[Hashable, tuple[int, ...]]]:
    """What the slot of each token, draft or not, should hold."""
    tokens = (*sequence.tokens, *sequence.drafts)
    return [(sequence.request.salt, tokens[: i + 1]) for i in range(len(tokens))]
