"""Which tokens a cache keeps when it may not keep all: StreamingLLM, H2O, TOVA, SnapKV,
PyramidKV, and controls.

Sources: StreamingLLM, Xiao et al. 2024 (arXiv:2309.17453); H2O, Zhang et al. 2023
(arXiv:2306.14048), algorithm 1; TOVA, Oren et al. 2024 (arXiv:2401.06104); SnapKV, Li et
al. 2024 (arXiv:2404.14469), section 4; PyramidKV, Cai et al. 2024 (arXiv:2406.02069),
section 3. Heads that share a key head share its tokens: their attention is averaged.

All of them keep the first tokens, the newest ones, and of the others those that a score
puts first. They differ in the score, and in when they drop:

| policy          | score of token j                                              | first | newest | drops            |
|-----------------|---------------------------------------------------------------|-------|--------|------------------|
| ``recent_only`` | none: the control that a technique has to beat                | 0     | budget | at every step    |
| ``streaming``   | none                                                          | 4     | rest   | at every step    |
| ``h2o``         | Σ_t a_tj over all queries t that have read it                 | 0     | half   | at every step    |
| ``tova``        | a_tj of the newest query, one set for all heads of a layer    | 0     | 0      | at every step    |
| ``snapkv``      | Σ_t a_tj of the prompt's last w queries, pooled over k tokens | 0     | w      | after the prompt |
| ``pyramidkv``   | as SnapKV, with more tokens in low layers than in high ones   | 0     | w      | after the prompt |
| ``at_random``   | drawn when the token comes: the other control                 | 0     | half   | at every step    |

| symbol | name                                                   | shape     |
|--------|--------------------------------------------------------|-----------|
| a      | attention of a query, mean of the heads of a key head  | [G, T, S] |
| B      | ``budget``, tokens a key head keeps                    |           |
| w, k   | ``window`` of queries that vote, ``kernel`` of pooling |           |

A dropped token never comes back. Keys were rotated at their positions and keep them. Sums
of attention favour the old, which more queries have read: that is H2O's rule, and not
mended here. Of a network with a sliding window, tokens that the window has passed are
dropped before all others, but for the first.

Left out: rolling positions (StreamingLLM beyond the trained context), selection without
dropping (Quest), H2O's ratios of the prompt's length, what PyramidKV does for short
prompts. ``sparse_cache`` holds the tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from refllm.backend import Array, namespace, top_k
from refllm.kv.kivi import whole_number

__all__ = [
    "Sparse",
    "at_random",
    "choose",
    "h2o",
    "pooled",
    "pyramidkv",
    "recent_only",
    "snapkv",
    "streaming",
    "tova",
]

SCORES = ("none", "mass", "last", "votes", "random")


@dataclass(frozen=True)
class Sparse:
    """A policy; the functions below make the known ones.

    Raises
    ------
    ValueError
        for a budget that does not hold the first and the newest tokens, and for what is no
        policy.
    """

    budget: int
    score: str = "mass"
    first: int = 0
    newest: int = 0
    always: bool = True  # drop at every step; else once, after the prompt
    alike: bool = False  # one set for all key heads of a layer
    window: int = 32
    kernel: int = 5
    pool: str = "mean"
    beta: float | None = None  # of a pyramid of budgets

    def __post_init__(self) -> None:
        for name in ("budget", "first", "newest", "window", "kernel"):
            least = 0 if name in ("first", "newest") else 1
            object.__setattr__(
                self, name, whole_number(f"Sparse: {name}", getattr(self, name), least)
            )
        if self.score not in SCORES:
            raise ValueError(
                f"Sparse: no score is called {self.score!r}; they are {', '.join(SCORES)}"
            )
        if self.score == "votes" and (self.always or self.newest < self.window):
            raise ValueError(
                "Sparse: votes are counted once, after the prompt, and those who vote are kept"
            )
        if self.pool not in ("mean", "max") or not self.kernel % 2:
            raise ValueError(
                f"Sparse: pools by mean or max of an odd number, got {self.pool!r} of {self.kernel}"
            )
        if self.beta is not None and not self.beta >= 1:
            raise ValueError(
                f"Sparse: the lowest layer's share is at least the highest's, got beta {self.beta}"
            )
        least = int(self.budget / (self.beta or 1))
        must = max(1, self.first + self.newest)
        if least < must:
            raise ValueError(
                f"Sparse: {least} tokens do not hold the first {self.first} and the newest {self.newest}; "
                f"raise the budget to {math.ceil(must * (self.beta or 1))}"
            )

    def budgets(self, layers: int) -> list[int]:
        """Tokens of each layer, ``layers`` · B in all: B, or in a pyramid 2B − B/β at the
        bottom, B/β at the top.
        """
        if self.beta is None or layers == 1:
            return [self.budget] * layers
        low = self.budget / self.beta
        fall = 2 * (self.budget - low) / (layers - 1)
        ends = [
            round(sum(2 * self.budget - low - i * fall for i in range(n)))
            for n in range(layers + 1)
        ]
        return [b - a for a, b in pairwise(ends)]

    def held(self, prompt: int, new: int, layers: int) -> int:
        """Tokens that the key heads of all layers hold, one head each, after a prompt and
        ``new`` tokens more.
        """
        if self.always:
            return sum(min(budget, prompt + new) for budget in self.budgets(layers))
        return sum(min(budget, prompt) + new for budget in self.budgets(layers))


def recent_only(budget: int) -> Sparse:
    """The newest ``budget`` tokens, a sliding window."""
    return Sparse(budget, "none", 0, budget)


def streaming(budget: int, first: int = 4) -> Sparse:
    """StreamingLLM: the first tokens, which softmax needs as a place for what is left over,
    and the newest.
    """
    if not budget > first:
        raise ValueError(
            f"streaming: a budget of {budget} has no room for the first {first} and a newest one; take {first + 1} "
            "or more"
        )
    return Sparse(budget, "none", first, budget - first)


def h2o(budget: int, newest: int | None = None) -> Sparse:
    """H2O: the tokens that were read most, and the newest (half of the budget, as in the
    paper).
    """
    return Sparse(budget, "mass", 0, budget // 2 if newest is None else newest)


def tova(budget: int) -> Sparse:
    """TOVA: whatever the newest query reads least is dropped."""
    return Sparse(budget, "last", alike=True)


def snapkv(budget: int, window: int = 32, kernel: int = 5, pool: str = "mean") -> Sparse:
    """SnapKV: what the prompt's last queries read, and what stands beside it. While
    decoding nothing is dropped.
    """
    return Sparse(budget, "votes", 0, window, always=False, window=window, kernel=kernel, pool=pool)


def pyramidkv(
    budget: int, window: int = 8, kernel: int = 5, pool: str = "mean", beta: float = 20.0
) -> Sparse:
    """PyramidKV: SnapKV with ``budget`` tokens a layer on average, from 2B − B/β at the
    bottom to B/β at the top.

    On average of prompts that are long enough: what a low layer has no tokens for is not
    given to the others.
    """
    return Sparse(
        budget, "votes", 0, window, always=False, window=window, kernel=kernel, pool=pool, beta=beta
    )


def at_random(budget: int, newest: int | None = None) -> Sparse:
    """The control beside H2O: as many tokens, drawn by lot."""
    return Sparse(budget, "random", 0, budget // 2 if newest is None else newest)


# --- arrays -------------------------------------------------------------------------------


def choose(score: Array, budget: int, first: int, newest: int) -> Array:
    """Of score[G, S], in the order of their positions: which ``budget`` to keep, indices
    [G, budget], ascending.

    The ``first`` and the ``newest`` are kept, then the highest scores, of equal ones the
    older. All, if there are no more than the budget.
    """
    xp = namespace(score)
    size = int(score.shape[-1])
    place = xp.arange(size)
    kept = (place < first) | (place >= size - newest)
    ranked = xp.where(kept, xp.asarray(math.inf, dtype=score.dtype), score)
    return xp.sort(top_k(ranked, min(budget, size))[1], axis=-1)


def pooled(votes: Array, kernel: int, pool: str) -> Array:
    """votes[G, S] → of each token and its ``kernel − 1`` neighbours the mean or the
    largest, zeros beyond the ends.

    So a token beside an important one is kept with it. The mean counts the zeros, as the
    published code does.
    """
    xp = namespace(votes)
    half = kernel // 2
    size = int(votes.shape[-1])
    beyond = xp.zeros((votes.shape[0], half), dtype=votes.dtype)
    padded = xp.concat([beyond, votes, beyond], axis=-1)
    near = xp.stack([padded[:, i : i + size] for i in range(kernel)])
    if pool == "max":
        return xp.max(near, axis=0)
    return xp.sum(near, axis=0) / kernel
