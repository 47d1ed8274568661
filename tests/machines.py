"""How long state machines run: a moment by default, 100,000 steps under the nightly profile; and a model of memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from typing import Any

from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

from refllm.serve.ledger import Ledger
from refllm.serve.plan import Plan, place
from refllm.serve.request import Branch


def run(machine: type[RuleBasedStateMachine], examples: int, steps: int = 50) -> None:
    """``examples`` runs of ``steps`` rules; the nightly profile's 2,000 if that is more."""
    how = settings(max_examples=max(examples, settings.default.max_examples), stateful_step_count=steps)
    run_state_machine_as_test(machine, settings=how)


class ShadowMemory:
    """What every slot holds, as text: (salt, all tokens up to and with the one whose key and value lie there).

    A copy that was missed, a block that was given away too early, a prefix found under another's name or a slot written
    twice shows when somebody reads it.
    """

    def __init__(self) -> None:
        self.held: dict[int, Any] = {}
        self.seen: Counter[str] = Counter()

    def execute(self, scheduler: Ledger, plan: Plan) -> None:
        """Copies, then reads of all items, then their writes; a plan's items see each other's writes of no step."""
        pool, b = getattr(scheduler.memory, "pool", None), plan.block_size
        for source, target in plan.copies:
            assert pool.ref_count(target) == 1
            for i in range(b):
                self.held[target * b + i] = self.held.get(source * b + i)
        self.seen["copied"] += len(plan.copies)
        branches = {branch.key: branch for branch in scheduler.running}
        for item in plan.items:
            text = spelled(branches[item.name])
            read = place(item.blocks, b, 0, item.start) if item.start else []
            assert [self.held.get(slot) for slot in read] == text[: item.start], (
                f"{item.name} reads what is not its own"
            )
        for item in plan.items:
            text = spelled(branches[item.name])
            for slot, content in zip(plan.slots(item), text[item.start : item.start + item.count], strict=True):
                assert not b or pool.ref_count(slot // b) == 1, "a shared block is written"
                self.held[slot] = content


def spelled(branch: Branch) -> list[tuple[Hashable, tuple[int, ...]]]:
    """What the slot of each token, draft or not, should hold."""
    tokens = (*branch.tokens, *branch.drafts)
    return [(branch.request.salt, tokens[: i + 1]) for i in range(len(tokens))]
