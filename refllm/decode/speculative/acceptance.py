"""How much speculation gains: one definition each of acceptance rate, α and acceptance
length, and the formulas.

Sources: Leviathan et al. 2023, equation 1 and theorem 3.8. Three quantities are often
called by one name:

| symbol | name              | definition                                                     |
|--------|-------------------|----------------------------------------------------------------|
| rate   | acceptance rate   | accepted / proposed; falls with γ, as drafts behind a          |
|        |                   | rejection count as proposed                                    |
| α      | acceptance        | accepted / judged: the probability that a draft is accepted    |
|        |                   | if its predecessors were                                       |
| τ      | acceptance length | tokens per target step: 1 + accepted / steps, in [1, γ + 1]    |
| t(n)   | cost of n tokens  | time of a target step that computes n tokens, in units of t(1) |
| c      | cost of a draft   | time of a draft step, in units of t(1)                         |

If drafts are accepted independently with probability α,

    τ = 1 + α + … + α^γ = (1 − α^{γ+1}) / (1 − α),

and decoding is faster by τ / (t(γ + 1) + γ c). On a memory-bound device t is flat; on a
processor it is not.

Left out: energy, and the cost of the verification itself beside a model
(``benchmarks/speculative.py`` has it).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from refllm.errors import InputError


@dataclass
class Acceptance:
    """Counts of verified steps: ``add`` each step, then read rate, α and τ.

    >>> stats = acceptance_stats([(4, 4), (4, 1)])
    >>> stats.emitted, stats.rate, round(stats.alpha, 3), stats.length
    (7, 0.625, 0.833, 3.5)
    """

    steps: int = 0
    proposed: int = 0
    judged: int = 0  # the accepted drafts, and the one that was rejected
    accepted: int = 0
    # [judged, accepted] of the first draft, the second, …
    by_place: list[list[int]] = field(default_factory=list)

    def add(self, proposed: int, accepted: int, judged: int | None = None) -> None:
        """Count a target step that verified ``proposed`` ≥ 0 drafts and accepted the first
        ``accepted`` of them.

        Of a tree ``judged`` levels were verified, and on ``accepted`` of them a node was
        accepted.
        """
        if not 0 <= accepted <= proposed:
            raise InputError(f"{accepted} of {proposed} drafts cannot be accepted")
        if judged is None:
            judged = min(accepted + 1, proposed)
        if not accepted <= judged <= proposed:
            raise InputError(
                f"{judged} of {proposed} drafts cannot be judged where {accepted} are accepted"
            )
        self.steps += 1
        self.proposed += proposed
        self.accepted += accepted
        self.judged += judged
        while len(self.by_place) < proposed:
            self.by_place.append([0, 0])
        for i in range(judged):
            self.by_place[i][0] += 1
            self.by_place[i][1] += i < accepted

    @property
    def emitted(self) -> int:
        """Tokens: the accepted drafts and one of the target's own per step."""
        return self.accepted + self.steps

    @property
    def rate(self) -> float:
        """Accepted / proposed; 0 where nothing was proposed."""
        if self.proposed:
            return self.accepted / self.proposed
        return 0.0

    @property
    def alpha(self) -> float:
        """α, accepted / judged; 0 where nothing was judged."""
        return self.accepted / self.judged if self.judged else 0.0

    @property
    def length(self) -> float:
        """τ, tokens per target step; 1 where no step was made, as in plain decoding."""
        return self.emitted / self.steps if self.steps else 1.0


def acceptance_stats(steps: Iterable[tuple[int, int]]) -> Acceptance:
    """The counts of (proposed, accepted) pairs, one per target step."""
    stats = Acceptance()
    for proposed, accepted in steps:
        stats.add(proposed, accepted)
    return stats


def expected_length(alpha: float, gamma: int) -> float:
    """E[τ] = (1 − α^{γ+1}) / (1 − α), and γ + 1 at α = 1; computed as Σ α^i, which needs no
    special case.

    >>> expected_length(0.5, 2)
    1.75
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha is a probability, got {alpha}")
    return sum(alpha**i for i in range(gamma + 1))


def speedup(alpha: float, gamma: int, cost: Sequence[float], draft_cost: float) -> float:
    """τ t(1) / (t(γ+1) + γ c), with cost[n − 1] = t(n) and ``draft_cost`` = c in the same unit."""
    if not 0 <= gamma < len(cost):
        raise InputError(
            f"gamma {gamma} needs the cost of 1 to {gamma + 1} tokens, got {len(cost)}"
        )
    return expected_length(alpha, gamma) * cost[0] / (cost[gamma] + gamma * draft_cost)


def best_gamma(alpha: float, cost: Sequence[float], draft_cost: float) -> tuple[int, float]:
    """The γ of the largest ``speedup``, of equal ones the smallest, and that speed-up;
    (0, 1.0) if drafting loses.
    """
    gains = [speedup(alpha, gamma, cost, draft_cost) for gamma in range(len(cost))]
    best = max(range(len(gains)), key=lambda gamma: gains[gamma])
    return best, gains[best]
