"""A step on its way: the plan in the making, and what its execution gives back.

| name         | meaning                                                                                    |
|--------------|--------------------------------------------------------------------------------------------|
| Step         | a plan in the making, by branch, and how much of the budget is left                        |
| Continuation | how a branch goes on: its next tokens, and why it ends with them if it does                |
| Outcome      | what a branch that was sampled becomes: its continuations; none drops it                   |
| Event        | what the books made of it, for whoever waits for the tokens                                |
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

from refllm.serve.kv_manager import Copies
from refllm.serve.plan import Item, Plan
from refllm.serve.request import Branch


class Continuation(NamedTuple):
    """How a branch goes on: its next tokens, and why it ends with them if it does. No token only with a reason."""

    tokens: Sequence[int]
    reason: str | None = None  # "length" is the scheduler's own


class Event(NamedTuple):
    """What came of a step for one branch."""

    branch: Branch
    tokens: list[int]
    reason: str | None


Outcome = Sequence[Continuation]


class Step:
    """A plan in the making: what each branch does in it, and how much of the budget is left."""

    def __init__(self, plan: Plan):
        self.plan, self.room = plan, plan.budget
        self.items: dict[Branch, Item] = {}
        self.copies: dict[Branch, Copies] = {}

    def put(self, branch: Branch, count: int, blocks: tuple[int, ...], copies: Copies, pad: int = 0) -> None:
        """Plan ``count`` tokens of a branch; of its drafts those that are not among them are dropped."""
        ahead = branch.computed + count - len(branch.tokens)  # drafts among the tokens; below 0: not finished yet
        if branch.drafts:
            del branch.drafts[max(0, ahead) :]
        self.items[branch] = Item(branch.key, branch.computed, count, blocks, max(0, ahead + 1), pad)
        if copies:
            self.copies[branch] = copies
        if self.room is not None:
            self.room -= count

    def take_back(self, branch: Branch) -> None:
        """Its share goes back into the budget, if it has one."""
        item = self.items.pop(branch, None)
        self.copies.pop(branch, None)
        if item is not None and self.room is not None:
            self.room += item.count


def check_outcomes(
    sampling: Sequence[Branch], outcomes: Sequence[Outcome], live: Mapping[Hashable, Sequence[Branch]]
) -> None:
    """ValueError unless each outcome fits its branch; ``live`` has the branches of each request."""
    if len(sampling) != len(outcomes):
        raise ValueError(f"{len(sampling)} branches were sampled, got {len(outcomes)} outcomes")
    grown: dict[Hashable, int] = {}
    for branch, outcome in zip(sampling, outcomes, strict=True):
        request, drafts = branch.request, branch.drafts
        if len(outcome) == 1:
            if not drafts and len(outcome[0].tokens) == 1:
                continue  # one more token: what nearly all of a step are
        else:
            grown[request.id] = grown.get(request.id, 0) + len(outcome) - 1
        if len(outcome) > 1 and (drafts or (len(outcome) > branch.seats and not request.beam)):
            raise ValueError(f"{branch} may become {1 if drafts else branch.seats}, got {len(outcome)} continuations")
        for tokens, reason in outcome:
            if not (0 if reason else 1) <= len(tokens) <= 1 + len(drafts):
                raise ValueError(f"{branch} yields 1 to {1 + len(drafts)} tokens, got {len(tokens)}")
            if len(tokens) > 1 and list(tokens[:-1]) != drafts[: len(tokens) - 1]:
                raise ValueError(f"{branch}: accepted {list(tokens[:-1])}, but its drafts were {drafts}")
    for name, more in grown.items():
        if (branches := live.get(name)) and len(branches) + more > branches[0].request.n:
            raise ValueError(f"request {name!r} has n = {branches[0].request.n} branches, not more")
