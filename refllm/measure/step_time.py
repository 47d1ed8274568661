"""The time of one step of a network, at any batch and any length of its context.

The cache is filled with zeros instead of a real past: the products are the same, and so is
the time.

Left out: sampling, scheduling, and the time to fill the cache.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from refllm.api import Model
from refllm.array_types import Array
from refllm.backend import asarray_like, to_numpy
from refllm.decode.fast.captured_step import make_decode_step
from refllm.kv.contiguous import ContiguousCache
from refllm.model.llama import forward, logits


def time_step(model: Model, batch: Sequence[tuple[int, int]], repeats: int = 15) -> float:
    """Median seconds of one step over (past, new) tokens of each sequence, with the logits
    of each last token.

    A decode step, of one new token each, is computed as ``generate`` does: captured where
    the network can be. One step before the ``repeats`` that are timed warms up.
    """
    like = model.weights["norm"]
    config = model.config
    capacity = max(past + new for past, new in batch)
    cache = ContiguousCache(config, len(batch), capacity, like=like)
    cache.lengths[:] = [past for past, _ in batch]
    counts = [new for _, new in batch]
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, sum(counts))
    at = cache.positions(counts)
    last = asarray_like(np.cumsum(counts) - 1, like)
    captured = make_decode_step(model.weights, config)

    def step() -> Array:
        if max(counts) == 1:
            return captured(tokens.tolist(), at, cache.view(counts))
        placed = asarray_like([tokens, at], like, "int64")
        hidden = forward(model.weights, config, placed[0], placed[1], cache.view(counts))
        return logits(model.weights, hidden[last])

    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        to_numpy(step()[:1, :1])  # copying a value to the host waits for a GPU
        times.append(time.perf_counter() - began)
    return float(np.median(times[1:]))
