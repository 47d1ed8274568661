"""Autoregressive decoding of a static batch: one prefill, then one token a sequence and
step.

The two phases of serving in their plainest form. *Prefill* runs all prompt tokens at once
and yields one token; *decode* runs one token a sequence against the cache. A sequence that
has ended stays in the batch, computed and ignored, until all have ended: that waste is what
continuous batching removes.

| symbol | name                      | shape     |
|--------|---------------------------|-----------|
| B      | sequences                 | len(prompts) |
| z      | logits of the last tokens | [B, V]    |
| u      | uniforms, drawn on the host | [B]     |

Left out: speculation (``decode.speculative.loop``), continuous batching and paging
(``serve``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from refllm.backend import Array, asarray_like, namespace, to_numpy
from refllm.decode.fast.captured_step import stepper
from refllm.decode.sampling import apply_repetition_penalty, best, distribution, sample
from refllm.decode.sampling_params import SamplingParams
from refllm.kv.contiguous import ContiguousCache
from refllm.kv.kivi import Kivi
from refllm.kv.kivi_cache import KiviCache
from refllm.kv.sparse import Sparse
from refllm.kv.sparse_cache import SparseCache
from refllm.model.config import ModelConfig
from refllm.model.llama import Weights, forward, logits

Cache = ContiguousCache | KiviCache | SparseCache
CachePolicy = Kivi | Sparse  # what a cache keeps where it does not keep everything
PREFILL = 256  # prompt tokens a pass on the host: what they compute stays in the caches, and in memory that malloc keeps


def generate_tokens(
    weights: Weights,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: SamplingParams,
    rng: np.random.Generator,
    policy: CachePolicy | None = None,
) -> Iterator[list[int]]:
    """Yield ``max_tokens`` times the next token of each of the B prompts, as Python ints.

    The caller decides when a sequence has ended. A greedy step moves the tokens and their
    positions to the device and the chosen tokens back, and nothing else; sampling also
    moves its uniforms and checks. A ``policy`` for the cache keeps less than all, and the
    text is another one.

    Raises
    ------
    ValueError
        for an empty prompt, an id outside the vocabulary, more positions than the model was
        made for, or logits that are not finite (an overflow: there is no largest one to
        choose).
    """
    check_prompts(prompts, max_tokens, config)
    check_policy(policy)
    if max_tokens == 0:
        return
    like = weights["norm"]
    capacity = max(len(p) for p in prompts) + max_tokens
    cache = new_cache(config, len(prompts), capacity, like, policy, rng)
    if sampling.repetition_penalty != 1:
        seen = _Seen(prompts, config.vocab_size, like)
    else:
        seen = None
    step = stepper(weights, config)
    counts = [1] * len(prompts)
    tokens: list[int] = []
    for _ in range(max_tokens):
        if tokens:
            z = step(tokens, cache.positions(counts), cache.view(counts))
            cache.advance(counts)
        else:
            z = logits(weights, prefill(weights, config, prompts, cache))
        if seen is not None:
            z = apply_repetition_penalty(z, seen.mask, sampling.repetition_penalty)
        tokens = choose(z, sampling, rng)
        if seen is not None:
            seen.add(tokens)
        yield tokens


def check_policy(policy: CachePolicy | None) -> None:
    """ValueError for what is no policy of a cache."""
    if not (policy is None or isinstance(policy, (Kivi, Sparse))):
        raise ValueError(
            f"a cache policy is a Kivi(...) or one of refllm.kv.sparse, such as h2o(256), got {policy!r}"
        )


def new_cache(
    config: ModelConfig,
    sequences: int,
    capacity: int,
    like: Array,
    policy: CachePolicy | None,
    rng: np.random.Generator | None = None,
) -> Cache:
    """An empty cache: of all numbers, or as the policy says. ``rng`` is for one that drops
    at random.
    """
    if policy is None:
        return ContiguousCache(config, sequences, capacity, like=like)
    if isinstance(policy, Kivi):
        return KiviCache(config, sequences, capacity, like=like, kivi=policy)
    return SparseCache(config, sequences, like=like, policy=policy, rng=rng)


def prefill(
    weights: Weights, config: ModelConfig, prompts: Sequence[Sequence[int]], cache: Cache
) -> Array:
    """All tokens of all prompts → hidden[B, N] of the last of each, the only ones that are
    sampled from.
    """
    like = weights["norm"]
    total = sum(len(prompt) for prompt in prompts)
    ends = []
    # KIVI's prompt reads itself as it came, whoever its neighbours are: in one pass; scores
    # of tokens are quadratic
    cut = isinstance(cache, SparseCache) or (
        namespace(like) is np and not isinstance(cache, KiviCache)
    )
    budget = PREFILL if cut else total
    for counts in passes([len(prompt) for prompt in prompts], budget):
        begins = cache.lengths[:]
        last = np.cumsum(counts) - 1
        parts = [prompt[b : b + n] for prompt, b, n in zip(prompts, begins, counts, strict=True)]
        placed = asarray_like(
            [[t for part in parts for t in part], cache.positions(counts)], like, "int64"
        )
        done = [n > 0 and b + n == len(p) for p, b, n in zip(prompts, begins, counts, strict=True)]
        rows = asarray_like(last[done], like)
        ends.append(forward(weights, config, placed[0], placed[1], cache.view(counts), rows))
        cache.advance(counts)
    if isinstance(cache, SparseCache):
        cache.settle()
    if len(ends) == 1:
        return ends[0]
    return namespace(like).concat(ends)


def passes(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """How many tokens each prompt brings to each pass, about ``budget`` together at most;
    only longer prompts are cut.

    A rest of up to a quarter of it goes with the last pass: a pass reads all weights,
    however few its tokens are.
    """
    left = list(lengths)
    while any(left):
        room = sum(left) if sum(left) <= budget + budget // 4 else budget
        counts = [0] * len(left)
        most = room
        for b, n in enumerate(left):
            if n > room and room < most:
                break
            counts[b] = min(n, room)
            room -= counts[b]
        left = [n - c for n, c in zip(left, counts, strict=True)]
        yield counts


def choose(z: Array, sampling: SamplingParams, rng: np.random.Generator) -> list[int]:
    """z[B, V] → one token a row. Greedy waits for the device once; sampling also to refuse
    what is no number.
    """
    if sampling.temperature == 0:
        ids = best(z)
    else:
        p = distribution(z, sampling)
        ids = to_numpy(
            sample(p, asarray_like(rng.random(z.shape[0]), z, "float64"))
        ).tolist()
    if min(ids) < 0:
        raise ValueError(
            f"the logits of sequence {ids.index(-1)} have no largest one: NaN, +inf or nothing but -inf"
        )
    return ids


class _Seen:
    """Which tokens stand in each sequence so far: mask[B, V]."""

    def __init__(self, prompts: Sequence[Sequence[int]], vocab: int, like: Array):
        host = np.zeros((len(prompts), vocab), dtype=bool)
        for row, prompt in zip(host, prompts, strict=True):
            row[list(prompt)] = True
        self.mask = asarray_like(host, like)
        self.rows = asarray_like(np.arange(len(prompts)), like)

    def add(self, tokens: list[int]) -> None:
        self.mask[self.rows, asarray_like(tokens, self.mask, "int64")] = True


def check_prompts(prompts: Sequence[Sequence[int]], max_tokens: int, config: ModelConfig) -> None:
    """ValueError for what cannot be generated from; see ``generate_tokens``."""
    if not prompts:
        raise ValueError("no prompt was given")
    if not isinstance(max_tokens, (int, np.integer)) or max_tokens < 0:
        raise ValueError(f"max_tokens must be a whole number, 0 or more, got {max_tokens!r}")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {i} is empty: a model needs at least one token to continue")
        if not all(isinstance(t, (int, np.integer)) and 0 <= t < config.vocab_size for t in prompt):
            raise ValueError(
                f"prompt {i} has a token that is no integer within 0..{config.vocab_size - 1}"
            )
        if len(prompt) + max_tokens > config.max_position_embeddings:
            raise ValueError(
                f"prompt {i} of {len(prompt)} tokens plus max_tokens {max_tokens} exceeds the model's "
                f"{config.max_position_embeddings} positions; shorten one of them"
            )
