"""What speculation yields: one definition each of acceptance rate, α and acceptance length,
and the formulas.

Sources: Leviathan et al. 2023, equation 1 and theorem 3.8. Three numbers are often called
by one name:

| symbol | name               | definition                                                                  |
|--------|--------------------|-----------------------------------------------------------------------------|
| rate   | acceptance rate    | accepted / proposed; falls with γ, as what follows a rejection never counts  |
| α      | acceptance         | accepted / judged: the chance of a draft whose predecessors were accepted    |
| τ      | acceptance length  | tokens emitted a target step: 1 + accepted / steps, within [1, γ + 1]        |
| t(n)   | cost of n tokens   | time of a target step that computes n tokens, in units of t(1)               |
| c      | cost of a draft    | time of a draft step, in units of t(1)                                       |

If drafts are accepted independently with probability α, τ = 1 + α + … + α^γ = (1 − α^{γ+1})
/ (1 − α), and decoding is faster by τ / (t(γ + 1) + γ c). On a device that waits for memory
t is flat; on a processor it is not.

Left out: energy, and the cost of the verification itself beside a model
(``benchmarks/speculative.py`` has it).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass
class Acceptance:
    """Counts of verified steps; ``add`` one, read the three numbers."""

    steps: int = 0
    proposed: int = 0
    judged: int = 0  # the accepted, and the one that was rejected
    accepted: int = 0
    # [judged, accepted] of the first draft, the second, …
    by_place: list[list[int]] = field(default_factory=list)

    def add(self, proposed: int, accepted: int, judged: int | None = None) -> None:
        """A target step that judged ``proposed`` ≥ 0 drafts and accepted the first
        ``accepted`` of them.

        Of a tree ``judged`` levels were looked at, and ``accepted`` of them had a node that
        stays.
        """
        if not 0 <= accepted <= proposed:
            raise ValueError(f"{accepted} of {proposed} drafts cannot be accepted")
        judged = min(accepted + 1, proposed) if judged is None else judged
        if not accepted <= judged <= proposed:
            raise ValueError(
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
        """Tokens: the accepted drafts and one of the target's own a step."""
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
        """τ, tokens a target step; 1 where no step was made, as plain decoding has it."""
        return self.emitted / self.steps if self.steps else 1.0


def acceptance_stats(steps: Iterable[tuple[int, int]]) -> Acceptance:
    """The counts of (proposed, accepted) pairs, one a target step."""
    stats = Acceptance()
    for proposed, accepted in steps:
        stats.add(proposed, accepted)
    return stats


def expected_length(alpha: float, gamma: int) -> float:
    """E[τ] = (1 − α^{γ+1}) / (1 − α), and γ + 1 at α = 1: the sum of the series has no case
    of its own.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is a probability, got {alpha}")
    return sum(alpha**i for i in range(gamma + 1))


def speedup(alpha: float, gamma: int, cost: Sequence[float], draft_cost: float) -> float:
    """τ t(1) / (t(γ+1) + γ c), with cost[n − 1] = t(n) and ``draft_cost`` = c in the same
    unit.
    """
    if not 0 <= gamma < len(cost):
        raise ValueError(
            f"gamma {gamma} needs the cost of 1 to {gamma + 1} tokens, got {len(cost)}"
        )
    return expected_length(alpha, gamma) * cost[0] / (cost[gamma] + gamma * draft_cost)


def best_gamma(alpha: float, cost: Sequence[float], draft_cost: float) -> tuple[int, float]:
    """The γ of the largest ``speedup``, of equal ones the smallest, and that speed-up; (0,
    1.0) if drafting loses.
    """
    gains = [speedup(alpha, gamma, cost, draft_cost) for gamma in range(len(cost))]
    best = max(range(len(gains)), key=lambda gamma: gains[gamma])
    return best, gains[best]
