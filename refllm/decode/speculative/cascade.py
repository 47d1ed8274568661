"""Several drafters in turn, and the check of a drafter against its target.

Left out: proposals that join the drafts of several drafters in one tree.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from refllm.decode.sampling_params import SamplingParams
from refllm.decode.speculative.constrained import propose_legal
from refllm.decode.speculative.interface import (
    NO_DRAFTS,
    DraftConstraint,
    Drafter,
    DraftRequest,
    ModelLike,
    Proposal,
    TreeProposal,
    check_vocabulary,
)
from refllm.decode.speculative.model_drafter import ModelDrafter
from refllm.errors import InputError


class Cascade:
    """Asks drafters in turn, the cheapest first, and takes the first proposal that is not empty.

    ``Cascade(NGramDrafter(3), TreeDrafter(draft))``: where the text repeats itself the
    drafts are free and mostly right; elsewhere the model drafts.
    """

    constrains = True

    def __init__(self, *drafters: Drafter):
        if not drafters or not all(hasattr(drafter, "propose") for drafter in drafters):
            raise InputError(f"a cascade needs drafters, such as NGramDrafter(), got {drafters!r}")
        self.drafters = drafters
        self.gamma = max(drafter.gamma for drafter in drafters)
        self.trees = any(getattr(drafter, "trees", False) for drafter in drafters)
        self._asked = drafters[0]  # whose proposal is being verified

    def propose(
        self,
        tokens: Sequence[int],
        count: int,
        sampling: SamplingParams,
        rng: np.random.Generator,
        constraint: DraftConstraint | None = None,
    ) -> Proposal | TreeProposal:
        """See ``Drafter.propose``."""
        for drafter in self.drafters:
            most = min(count, drafter.gamma)
            request = DraftRequest(tokens, most, sampling, rng, 0, constraint)
            proposal = propose_legal(drafter, request)
            if proposal.tokens:
                self._asked = drafter
                return proposal
        return NO_DRAFTS

    def observe(self, best: Sequence[int], accepted: int) -> None:
        """Pass the outcome on to the drafter that made the proposal."""
        self._asked.observe(best, accepted)


def check_drafter(target: ModelLike, drafter: object) -> None:
    """TypeError for an object that is no drafter; ValueError if a draft model does not
    share the target's vocabulary.
    """
    if not hasattr(drafter, "propose"):
        raise TypeError(
            "a drafter is a Model, or one of refllm.decode.speculative such as "
            f"NGramDrafter(), got {drafter!r}"
        )
    if isinstance(drafter, Cascade):
        for one in drafter.drafters:
            check_drafter(target, one)
    if isinstance(drafter, ModelDrafter):
        check_vocabulary(target, drafter.model)
