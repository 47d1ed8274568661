"""Quick measurements: the loss from a random sample of windows, and the time of one step.

| symbol | name                                                             | shape      |
|--------|------------------------------------------------------------------|------------|
| U      | windows drawn without replacement from those of an evaluation    |            |
| x      | bits of each byte: its token's loss, shared out evenly           | [bytes]    |

The sample's mean estimates what ``perplexity.evaluate`` would find on all windows; the
interval is a bootstrap that draws whole windows, since neighbouring tokens depend on each
other.

Left out: a correction for the finite number of windows (the interval is a little too wide
when most are drawn).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refllm.api import Model
from refllm.backend import Array, asarray_like, namespace, to_numpy
from refllm.corpus import Document
from refllm.decode.fast.captured_step import stepper
from refllm.decode.sampling import log_probabilities
from refllm.kv.contiguous import ContiguousCache
from refllm.measure import windows
from refllm.measure.bootstrap import Interval, bootstrap
from refllm.model.llama import forward, logits


@dataclass(frozen=True)
class Sample:
    """Bits per byte from a random sample of windows, with its interval."""

    bits: Interval
    tokens: int
    bytes: int
    windows: int
    of: int


def sample_bits_per_byte(
    model: Model, documents: Sequence[Document], count: int, rng: np.random.Generator
) -> Sample:
    """Score ``count`` of the windows that ``perplexity.evaluate`` would score, drawn
    without replacement.

    The mean is one over bytes: each byte carries its token's share of the loss, so that the
    interval is one of bits per byte too. ``count`` may exceed the number of windows: then
    all are scored.
    """
    window = min(1024, model.config.max_position_embeddings)
    whole = windows.plan(model, documents, window, max(1, window // 2))
    sizes = [w.end - w.begin - w.first for w in whole.windows]  # scored tokens of each window
    starts = np.cumsum([0, *sizes])
    chosen = sorted(rng.permutation(len(whole.windows))[:count])
    bits = []
    units = []
    tokens = 0
    for unit, index in enumerate(chosen):
        w = whole.windows[index]
        rows = slice(starts[index], starts[index + 1])
        z = log_probabilities(model.logits(whole.tokens[w.document][w.begin : w.end])[w.first :])
        target = asarray_like(whole.targets[rows], z)
        xp = namespace(z)
        nats = -to_numpy(xp.take_along_axis(z, target[:, None], axis=-1))[:, 0]
        size = whole.token_bytes[rows]
        some = size > 0  # special tokens stand for no text
        bits.append(np.repeat(nats[some] / math.log(2) / size[some], size[some]))
        units.append(np.full(len(bits[-1]), unit))
        tokens += len(nats)
    each = np.concatenate(bits)
    interval = bootstrap([each], np.concatenate(units), rng)[0]
    return Sample(interval, tokens, len(each), len(chosen), len(whole.windows))


def time_step(model: Model, batch: Sequence[tuple[int, int]], repeats: int = 15) -> float:
    """Median seconds of one step over (past, new) of each sequence, with the logits of each
    last token.

    A decode step, of one new token each, is computed as ``generate`` does: captured where
    the network can be.
    """
    like = model.weights["norm"]
    config = model.config
    capacity = max(past + new for past, new in batch)
    cache = ContiguousCache(config, len(batch), capacity, like=like)
    # zeros stand for a past: the products are the same
    cache.lengths[:] = [past for past, _ in batch]
    counts = [new for _, new in batch]
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, sum(counts))
    at = cache.positions(counts)
    last = asarray_like(np.cumsum(counts) - 1, like)
    captured = stepper(model.weights, config)

    def step() -> Array:
        if max(counts) == 1:
            return captured(tokens.tolist(), at, cache.view(counts))
        placed = asarray_like([tokens, at], like, "int64")
        hidden = forward(model.weights, config, placed[0], placed[1], cache.view(counts))
        return logits(model.weights, hidden[last])

    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        to_numpy(step()[:1, :1])  # waits for a GPU
        times.append(time.perf_counter() - began)
    return float(np.median(times[1:]))
