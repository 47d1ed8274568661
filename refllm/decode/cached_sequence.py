"""One sequence that is continued again and again, and computed once.

A chat sends the whole conversation with every turn, and nearly all of it is what was sent,
and answered, before. So the keys and values of the sequence are kept between calls: a new
prompt is compared with the tokens that the cache holds, the longest common prefix stays, and
only what follows is computed. That is the prefix cache of ``kv.hash_prefix`` for one
sequence, compared token by token instead of block by block.

| symbol | name                                   | meaning                               |
|--------|----------------------------------------|---------------------------------------|
| S      | ``len(ids)``                           | tokens of the sequence                |
| s      | ``cache.lengths[0]``, s ≤ S            | of these, in the cache                |
| r      | ``reused``, r ≤ min(s, len(prompt) − 1)| tokens of a prompt that stay          |
| c      | ``computed``, c = len(prompt) − r      | tokens of a prompt that are computed  |

The last token of a prompt is always computed, since its logits choose the next one. An
exception at any time, such as Ctrl-C, leaves the cache with the s tokens ``ids[:s]``.

Left out: caches that drop or quantise tokens (they cannot be cut back), several sequences
(see ``serve``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from refllm.decode.generate import check_prompts, generate_tokens
from refllm.decode.logits_processors import LogitsProcessors
from refllm.decode.sampling_params import SamplingParams
from refllm.kv.contiguous import ContiguousCache
from refllm.model.config import ModelConfig
from refllm.model.llama import Weights

MIN_CAPACITY = 1024  # tokens that memory is allocated for at first


class CachedSequence:
    """The tokens of one sequence, and the keys and values of those that were computed."""

    def __init__(self, weights: Weights, config: ModelConfig):
        self.weights = weights
        self.config = config
        self.ids: list[int] = []
        self.cache = ContiguousCache(
            config, 1, min(MIN_CAPACITY, config.max_position_embeddings), like=weights["norm"]
        )
        self.reused = 0  # tokens of the last prompt that were in the cache
        self.computed = 0  # and those that were computed

    def generate(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        sampling: SamplingParams,
        rng: np.random.Generator,
        processors: LogitsProcessors | None = None,
    ) -> Iterator[int]:
        """Yield up to ``max_tokens`` tokens that continue a prompt; the sequence becomes the
        prompt and what was yielded. ``processors`` are those of ``sampling`` if there are none.

        ValueError for what ``generate_tokens`` rejects; the sequence stays as it was then.
        """
        check_prompts([prompt], max_tokens, self.config)
        self.begin(prompt)
        self._reserve(len(prompt) + max_tokens)
        for (token,) in generate_tokens(
            self.weights,
            self.config,
            [self.ids[:]],
            max_tokens,
            sampling,
            rng,
            processors=processors,
            cache=self.cache,
        ):
            self.ids.append(token)
            yield token

    def begin(self, prompt: Sequence[int]) -> None:
        """Cut the sequence back to what it shares with a prompt of at least one token, which
        ``generate`` then continues.
        """
        kept = min(common_prefix(self.ids[: self.cache.lengths[0]], prompt), len(prompt) - 1)
        self.cache.truncate(0, kept)
        self.ids = [int(token) for token in prompt]
        self.reused = kept
        self.computed = len(prompt) - kept

    def _reserve(self, tokens: int) -> None:
        """Grow the cache to hold so many tokens. Its capacity at least doubles each time, so that
        growing copies each token about once on average.
        """
        if tokens > self.cache.capacity:  # mutate: equivalent (the last token is not computed)
            most = self.config.max_position_embeddings
            self.cache.grow(min(most, max(tokens, 2 * self.cache.capacity)))


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens at the beginning are equal.

    >>> common_prefix([1, 2, 3], [1, 2, 4, 5])
    2
    """
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
