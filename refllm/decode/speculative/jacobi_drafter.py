"""Jacobi decoding: guess γ tokens at once, and let the target correct them in parallel.

Source: Santilli et al. 2023 (the N = 2 case of lookahead decoding, Fu et al. 2024). It
costs no model; drafts are one-hot (q is None).

Left out: the 2-D window and the n-gram pool of lookahead decoding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from refllm.decode.sampling_params import SamplingParams
from refllm.decode.speculative.interface import Proposal, checked_gamma


class JacobiDrafter:
    """Drafts what the target itself predicted after the last drafts: y_i ← argmax p(· |
    y_<i), all i in one step.

    Each step makes at least the first of them right, so the fixed point is the greedy
    output. Drafts behind the first wrong one were predicted after a wrong token, and are
    kept since they are better than none.
    """

    def __init__(self, gamma: int = 4):
        self.gamma = checked_gamma(gamma)
        self._window: list[int] = []

    def propose(
        self, tokens: Sequence[int], count: int, sampling: SamplingParams, rng: np.random.Generator
    ) -> Proposal:
        """See ``Drafter.propose``; where no prediction exists yet, the last token is repeated."""
        drafts = self._window[:count]
        return Proposal(drafts + [int(tokens[-1])] * (count - len(drafts)), None)

    def observe(self, best: Sequence[int], accepted: int) -> None:
        """Keep the target's predictions behind the token that is emitted now, best[accepted]."""
        self._window = [int(t) for t in best[accepted + 1 :]]
