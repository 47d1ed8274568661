"""Which tokens a cache keeps when it may not keep all: StreamingLLM, H2O, TOVA, SnapKV,
PyramidKV, and controls.

Sources: StreamingLLM, Xiao et al. 2024 (arXiv:2309.17453); H2O, Zhang et al. 2023
(arXiv:2306.14048), algorithm 1; TOVA, Oren et al. 2024 (arXiv:2401.06104); SnapKV, Li et
al. 2024 (arXiv:2404.14469), section 4; PyramidKV, Cai et al. 2024 (arXiv:2406.02069),
section 3. Heads that share a key head share its tokens: their attention is averaged.

All of them keep the first tokens, the newest ones, and of the others those with the highest
scores. They differ in the score, and in when they evict:

| policy          | score of token j                       | first | newest | evicts           |
|-----------------|----------------------------------------|-------|--------|------------------|
| ``recent_only`` | none: the control that a technique has | 0     | budget | at every step    |
|                 | to beat                                |       |        |                  |
| ``streaming``   | none                                   | 4     | rest   | at every step    |
| ``h2o``         | Σ_t a_tj over all queries t that have  | 0     | half   | at every step    |
|                 | read it                                |       |        |                  |
| ``tova``        | a_tj of the newest query, one set per  | 0     | 0      | at every step    |
|                 | layer                                  |       |        |                  |
| ``snapkv``      | Σ_t a_tj of the prompt's last w        | 0     | w      | after the prompt |
|                 | queries, pooled over k neighbouring    |       |        |                  |
|                 | tokens                                 |       |        |                  |
| ``pyramidkv``   | as SnapKV, with larger budgets in low  | 0     | w      | after the prompt |
|                 | layers                                 |       |        |                  |
| ``at_random``   | drawn when the token is cached: the    | 0     | half   | at every step    |
|                 | other control                          |       |        |                  |

| symbol | name                                                   | shape     |
|--------|--------------------------------------------------------|-----------|
| a      | attention of a query, mean of the heads of a key head  | [G, T, S] |
| B      | ``budget``, tokens that a key head keeps               |           |
| w, k   | ``window`` of queries that vote, ``kernel`` of pooling |           |

An evicted token never comes back. Keys were rotated at their positions and keep them. Sums
of attention favour old tokens, which more queries have read: that is H2O's rule, and not
corrected here. With a sliding window, tokens that the window has passed are evicted before
all others, except the first ones.

Left out: rolling positions (StreamingLLM beyond the trained context), selection without
eviction (Quest), H2O's ratios of the prompt's length; PyramidKV's code gives prompts of up to
twice the budget equal budgets. ``sparse_cache`` holds the tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from refllm.backend import Array, namespace, top_k
from refllm.errors import InputError
from refllm.kv.interface import CacheUsage
from refllm.kv.kivi import checked_int
from refllm.model.config import ModelConfig

if TYPE_CHECKING:
    from refllm.kv.sparse_cache import SparseCache

SCORES = ("none", "mass", "last", "votes", "random")


@dataclass(frozen=True)
class SparsePolicy:
    """Which tokens to keep; the functions below make the known policies.

    ``every_step`` evicts at every step, else once, after the prompt; ``shared`` keeps one
    set of tokens for all key heads of a layer; ``beta`` is that of a pyramid of budgets.

    Raises
    ------
    ValueError
        for a budget that does not hold the first and the newest tokens, and for settings
        that are no policy.
    """

    budget: int
    score: str = "mass"
    first: int = 0
    newest: int = 0
    every_step: bool = True
    shared: bool = False
    window: int = 32
    kernel: int = 5
    pool: str = "mean"
    beta: float | None = None
    trees: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("budget", "first", "newest", "window", "kernel"):
            least = 0 if name in ("first", "newest") else 1
            value = checked_int(f"SparsePolicy: {name}", getattr(self, name), least)
            object.__setattr__(self, name, value)
        if self.score not in SCORES:
            raise InputError(
                f"SparsePolicy: unknown score {self.score!r}; choose one of {', '.join(SCORES)}"
            )
        if self.score == "votes" and (self.every_step or self.newest < self.window):
            raise InputError(
                "SparsePolicy: votes are counted once, after the prompt, and the voting tokens "
                "are kept"
            )
        if self.pool not in ("mean", "max") or not self.kernel % 2:
            raise InputError(
                "SparsePolicy: pools by mean or max of an odd number, "
                f"got {self.pool!r} of {self.kernel}"
            )
        if self.beta is not None and not self.beta >= 1:
            raise InputError(
                "SparsePolicy: the lowest layer's share is at least the highest's, "
                f"got beta {self.beta}"
            )
        least = int(self.budget / (self.beta or 1))
        must = max(1, self.first + self.newest)
        if least < must:
            raise InputError(
                f"SparsePolicy: {least} tokens do not hold the first {self.first} and the newest "
                f"{self.newest}; raise the budget to {math.ceil(must * (self.beta or 1))}"
            )

    def budgets(self, layers: int, length: int | None = None) -> list[int]:
        """Tokens of each layer, ``layers`` · B in all: B, or in a pyramid 2B − B/β at the
        bottom, B/β at the top.

        After ``length`` tokens no layer has a use for more: the lowest layer of a pyramid gets
        at most ``length`` then, and the others what it leaves. So nothing is dropped of a
        sequence of B tokens or fewer.

        >>> policy = pyramidkv(32, window=8, beta=4.0)
        >>> policy.budgets(3), policy.budgets(3, length=40), policy.budgets(3, length=20)
        ([56, 32, 8], [40, 32, 24], [32, 32, 32])
        """
        budget = self.budget
        if self.beta is None or layers == 1 or (length is not None and length <= budget):
            return [budget] * layers
        high = 2 * budget - budget / self.beta  # of the lowest layer
        if length is not None:
            high = min(high, length)
        fall = 2 * (high - budget) / (layers - 1)
        # differences of rounded sums, so that the budgets add up to layers · B exactly
        ends = [round(sum(high - i * fall for i in range(n))) for n in range(layers + 1)]
        return [b - a for a, b in pairwise(ends)]

    def tokens_held(self, prompt: int, new: int, layers: int) -> int:
        """Tokens that one key head of each layer holds, summed over the layers, after a
        prompt and ``new`` more tokens.
        """
        if self.every_step:
            length = prompt + new
            return sum(min(budget, length) for budget in self.budgets(layers, length))
        return sum(min(budget, prompt) + new for budget in self.budgets(layers, prompt))

    def usage(self, config: ModelConfig, prompt: int, new: int) -> CacheUsage:
        """See ``CachePolicy.usage``; bytes of keys and values alone."""
        layers = config.num_hidden_layers
        held = self.tokens_held(prompt, new, layers)
        nbytes = 2 * 4 * held * config.num_key_value_heads * config.head_dim
        kept = f"{held / layers:,.0f} of {prompt + new:,} tokens per key head"
        return CacheUsage(nbytes, kept)

    def new_cache(
        self,
        config: ModelConfig,
        sequences: int,
        capacity: int,
        *,
        like: Array,
        rng: np.random.Generator | None = None,
    ) -> SparseCache:
        """See ``CachePolicy.new_cache``; its memory grows as needed, so ``capacity`` is not
        used.
        """
        from refllm.kv.sparse_cache import SparseCache  # which imports this module

        return SparseCache(config, sequences, like=like, policy=self, rng=rng)


def recent_only(budget: int) -> SparsePolicy:
    """The newest ``budget`` tokens, a sliding window."""
    return SparsePolicy(budget, "none", 0, budget)


def streaming(budget: int, first: int = 4) -> SparsePolicy:
    """StreamingLLM: the first tokens, which serve the softmax as attention sinks, and the
    newest.
    """
    if not budget > first:
        raise InputError(
            f"streaming: a budget of {budget} has no room for the first {first} and a newest one; "
            f"take {first + 1} or more"
        )
    return SparsePolicy(budget, "none", first, budget - first)


def h2o(budget: int, newest: int | None = None) -> SparsePolicy:
    """H2O: the tokens that were attended to most ("heavy hitters"), and the newest (half of
    the budget, as in the paper).
    """
    return SparsePolicy(budget, "mass", 0, budget // 2 if newest is None else newest)


def tova(budget: int) -> SparsePolicy:
    """TOVA: evict the token that the newest query attends to least."""
    return SparsePolicy(budget, "last", shared=True)


def snapkv(budget: int, window: int = 32, kernel: int = 5, pool: str = "mean") -> SparsePolicy:
    """SnapKV: the tokens that the prompt's last queries attend to, and their neighbours. It
    evicts once, after the prompt.
    """
    return SparsePolicy(
        budget, "votes", 0, window, every_step=False, window=window, kernel=kernel, pool=pool
    )


def pyramidkv(
    budget: int, window: int = 8, kernel: int = 5, pool: str = "mean", beta: float = 20.0
) -> SparsePolicy:
    """PyramidKV: SnapKV with ``budget`` tokens per layer on average, from 2B − B/β at the
    bottom to B/β at the top.

    Of a prompt that a low layer's budget would exceed, that layer keeps every token, and the
    others share what it leaves, as in the published code; a prompt within the budget keeps
    every token in every layer.
    """
    return SparsePolicy(
        budget,
        "votes",
        0,
        window,
        every_step=False,
        window=window,
        kernel=kernel,
        pool=pool,
        beta=beta,
    )


def at_random(budget: int, newest: int | None = None) -> SparsePolicy:
    """The control beside H2O: as many tokens, drawn at random."""
    return SparsePolicy(budget, "random", 0, budget // 2 if newest is None else newest)


# --- arrays -------------------------------------------------------------------------------


def select_tokens(score: Array, budget: int, first: int, newest: int) -> Array:
    """Indices [G, budget], ascending, of the tokens to keep by score[G, S]; the tokens are
    in the order of their positions.

    The ``first`` and the ``newest`` are kept, then the highest scores, of equal ones the
    older token. All tokens, if there are no more than the budget.

    >>> import numpy as np
    >>> select_tokens(np.array([[0.1, 0.9, 0.3, 0.8, 0.2]]), budget=3, first=1, newest=1).tolist()
    [[0, 1, 4]]
    """
    xp = namespace(score)
    size = int(score.shape[-1])
    index = xp.arange(size)
    always_kept = (index < first) | (index >= size - newest)  # [S]
    # infinite scores put the tokens that are always kept first
    ranked = xp.where(always_kept, xp.asarray(math.inf, dtype=score.dtype), score)
    return xp.sort(top_k(ranked, min(budget, size))[1], axis=-1)


def pool_votes(votes: Array, kernel: int, pool: str) -> Array:
    """votes[G, S] → the mean or the maximum of each token and its ``kernel − 1``
    neighbours, with zeros beyond the ends.

    So a token beside an important one is kept with it. The mean counts the zeros, as the
    published code does.
    """
    xp = namespace(votes)
    half = kernel // 2
    size = int(votes.shape[-1])
    padding = xp.zeros((votes.shape[0], half), dtype=votes.dtype)
    padded = xp.concat([padding, votes, padding], axis=-1)  # [G, S + kernel − 1]
    near = xp.stack([padded[:, i : i + size] for i in range(kernel)])  # [kernel, G, S]
    if pool == "max":
        return xp.max(near, axis=0)
    return xp.sum(near, axis=0) / kernel
