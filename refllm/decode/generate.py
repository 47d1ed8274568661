"""Autoregressive decoding of a static batch: one prefill, then one token per sequence and step.

The two phases of serving in their plainest form. *Prefill* runs all prompt tokens at once
and yields one token; *decode* runs one token per sequence against the cache. A sequence
that has ended stays in the batch, computed and ignored, until all have ended: that waste is
what continuous batching removes.

| symbol | name                        | shape        |
|--------|-----------------------------|--------------|
| B      | sequences                   | len(prompts) |
| z      | logits of the last tokens   | [B, V]       |
| u      | uniforms, drawn on the host | [B]          |

Left out: speculation (``decode.speculative.loop``), continuous batching and paging
(``serve``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import partial

import numpy as np

from refllm.backend import NUMPY, Array, asarray_like, finite_argmax, namespace, to_numpy
from refllm.decode.fast.captured_step import make_decode_step
from refllm.decode.logits_processors import LogitsProcessors, Row, process_rows
from refllm.decode.logprobs import LogprobsRecorder
from refllm.decode.sampling import distribution, sample
from refllm.decode.sampling_params import SamplingParams
from refllm.errors import InputError
from refllm.kv.contiguous import ContiguousPolicy
from refllm.kv.interface import Cache, CachePolicy
from refllm.model.config import ModelConfig
from refllm.model.llama import Weights, forward, logits

# Prompt tokens per forward pass on the host, so that the activations of a pass stay in the
# processor's caches, and in memory that malloc reuses.
PREFILL_TOKENS = 256


def generate_tokens(
    weights: Weights,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: SamplingParams,
    rng: np.random.Generator,
    policy: CachePolicy | None = None,
    processors: LogitsProcessors | Sequence[LogitsProcessors] | None = None,
    recorder: LogprobsRecorder | None = None,
    cache: Cache | None = None,
    ended: Collection[int] = (),
) -> Iterator[list[int]]:
    """Yield ``max_tokens`` times the next token of each of the B prompts, as Python ints. The
    arguments are checked at the call, before the first token is asked for.

    The caller decides when a sequence has ended. A greedy step moves the tokens and their
    positions to the device and the chosen tokens back, and nothing else; sampling also
    moves its uniforms and checks. A cache ``policy`` keeps less than everything, which
    changes the output. ``processors`` are those of ``sampling``, unless they have end tokens
    to mask or a grammar to follow; a list has those of each prompt. To sequences in ``ended``,
    to which the caller may add while it iterates, they are not applied any more. A ``recorder``
    collects log-probabilities. A ``cache`` that holds the first ``cache.lengths[b]`` tokens of
    prompt b is continued; it has room for the output, and each prompt has at least one token more
    than it holds.

    Raises
    ------
    ValueError
        for an empty prompt, an id outside the vocabulary, more positions than the model was
        made for, or logits that are not finite (after an overflow no token is the largest).
    """
    check_prompts(prompts, max_tokens, config)
    policy = checked_policy(policy)
    if processors is None or isinstance(processors, LogitsProcessors):
        processors = [processors or LogitsProcessors(sampling)] * len(prompts)
    for one in processors:
        one.check_vocabulary(config.vocab_size)
    if max_tokens == 0:
        return iter(())
    return _generate(
        weights,
        config,
        prompts,
        max_tokens,
        sampling,
        rng,
        policy,
        processors,
        recorder,
        cache,
        ended,
    )


def _generate(
    weights: Weights,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    sampling: SamplingParams,
    rng: np.random.Generator,
    policy: CachePolicy,
    processors: Sequence[LogitsProcessors],
    recorder: LogprobsRecorder | None,
    cache: Cache | None,
    ended: Collection[int],
) -> Iterator[list[int]]:
    """``generate_tokens`` with arguments that were checked."""
    like = weights["norm"]
    if cache is None:
        capacity = max(len(p) for p in prompts) + max_tokens
        cache = policy.new_cache(config, len(prompts), capacity, like=like, rng=rng)
    outputs: list[list[int]] = [[] for _ in prompts]
    decode_step = make_decode_step(weights, config)
    counts = [1] * len(prompts)  # new tokens per sequence in a decode step
    active = any(one.active for one in processors)
    tokens: list[int] = []
    for _ in range(max_tokens):
        if tokens:
            z = decode_step(tokens, cache.positions(counts), cache.view(counts))  # [B, V]
            cache.advance(counts)
        else:
            z = logits(weights, prefill(weights, config, prompts, cache, recorder))  # [B, V]
        raw = z
        if active:
            rows: list[Row | None] = [
                None if b in ended else Row(processors[b], prompts[b], outputs[b])
                for b in range(len(prompts))
            ]
            z = process_rows(z, rows)
        tokens = choose_tokens(z, sampling, rng)
        if recorder is not None:
            each = range(len(prompts))
            recorder.add(each, each, tokens, raw, z, sampling)
        for output, token in zip(outputs, tokens, strict=True):
            output.append(token)
        yield tokens


def checked_policy(policy: CachePolicy | None) -> CachePolicy:
    """The policy, by default the one that keeps everything; ValueError for an object that is
    no cache policy.
    """
    if policy is None:
        return ContiguousPolicy()
    if isinstance(policy, type) or not hasattr(policy, "new_cache"):
        raise InputError(
            "a cache policy is a Kivi(...) or one of refllm.kv.sparse, such as h2o(256), "
            f"got {policy!r}"
        )
    return policy


def prefill(
    weights: Weights,
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    cache: Cache,
    recorder: LogprobsRecorder | None = None,
) -> Array:
    """Compute the tokens of all prompts that the cache does not hold → hidden[B, N] of the
    last token of each, the only ones that are sampled from.

    For a ``recorder`` of prompts the last layer computes the hidden states of all tokens.
    """
    records = recorder is not None and recorder.prompt_logprobs is not None
    like = weights["norm"]
    missing = [len(p) - cached for p, cached in zip(prompts, cache.lengths, strict=True)]
    chunked = cache.chunked_prefill
    if chunked is None:
        chunked = namespace(like) is NUMPY
    budget = PREFILL_TOKENS if chunked else sum(missing)
    ends = []
    for counts in prefill_chunks(missing, budget):
        starts = cache.lengths[:]
        chunks = [p[s : s + n] for p, s, n in zip(prompts, starts, counts, strict=True)]
        ids = [token for chunk in chunks for token in chunk]
        # ids and positions in one transfer
        moved = asarray_like([ids, cache.positions(counts)], like, "int64")  # [2, T]
        done = [n > 0 and s + n == len(p) for p, s, n in zip(prompts, starts, counts, strict=True)]
        last = np.cumsum(counts) - 1
        rows = asarray_like(last[done], like)
        view = cache.view(counts)
        if records:
            assert recorder is not None
            hidden = forward(weights, config, moved[0], moved[1], view)  # [T, N]
            for b, (prompt, s, n) in enumerate(zip(prompts, starts, counts, strict=True)):
                first = int(last[b]) + 1 - n
                recorder.add_prompt(
                    partial(logits, weights), b, hidden[first : first + n], prompt, s
                )
            ends.append(hidden[rows])
        else:
            ends.append(forward(weights, config, moved[0], moved[1], view, rows))
        cache.advance(counts)
    cache.finish_prompt()
    if len(ends) == 1:
        return ends[0]
    return namespace(like).concat(ends)  # [B, N]


def prefill_chunks(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """How many tokens each prompt contributes to each forward pass, about ``budget`` in
    all; only longer prompts are cut.

    A rest of up to a quarter of the budget joins the last pass, since a pass reads all
    weights however few its tokens are.

    >>> list(prefill_chunks([3, 2, 9], 4))
    [[3, 0, 0], [0, 2, 0], [0, 0, 4], [0, 0, 5]]
    """
    left = list(lengths)
    while any(left):
        free = budget
        if sum(left) <= budget + budget // 4:
            free = sum(left)
        most = free
        counts = [0] * len(left)
        for b, n in enumerate(left):
            if n > free and free < most:
                break  # a prompt is cut only where a pass begins
            counts[b] = min(n, free)
            free -= counts[b]
        left = [n - c for n, c in zip(left, counts, strict=True)]
        yield counts


def choose_tokens(z: Array, sampling: SamplingParams, rng: np.random.Generator) -> list[int]:
    """z[B, V] → one token per row. Greedy waits for the device once; sampling also to
    reject NaN and +inf.
    """
    if sampling.temperature == 0:
        ids = finite_argmax(z)
    else:
        uniforms = asarray_like(rng.random(z.shape[0]), z, "float64")  # [B]
        ids = to_numpy(sample(distribution(z, sampling), uniforms)).tolist()
    if min(ids) < 0:
        raise InputError(
            f"the logits of sequence {ids.index(-1)} have no largest one: "
            "NaN, +inf or nothing but -inf"
        )
    return ids


def check_max_tokens(max_tokens: int) -> None:
    """ValueError unless it is an integer, 0 or more."""
    if not isinstance(max_tokens, (int, np.integer)) or max_tokens < 0:
        raise InputError(f"max_tokens must be an integer, 0 or more, got {max_tokens!r}")


def check_prompts(prompts: Sequence[Sequence[int]], max_tokens: int, config: ModelConfig) -> None:
    """ValueError for prompts that cannot be continued; see ``generate_tokens``."""
    if not prompts:
        raise InputError("no prompt was given")
    check_max_tokens(max_tokens)
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise InputError(f"prompt {i} is empty: a model needs at least one token to continue")
        if not all(isinstance(t, (int, np.integer)) and 0 <= t < config.vocab_size for t in prompt):
            raise InputError(
                f"prompt {i} has a token that is no integer within 0..{config.vocab_size - 1}"
            )
        if len(prompt) + max_tokens > config.max_position_embeddings:
            raise InputError(
                f"prompt {i} of {len(prompt)} tokens plus max_tokens {max_tokens} exceeds the "
                f"model's {config.max_position_embeddings} positions; shorten one of them"
            )
