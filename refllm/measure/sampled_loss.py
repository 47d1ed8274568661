"""Bits per byte from a random sample of windows, in a fraction of the time of all windows.

| symbol | name                                                          | shape   |
|--------|---------------------------------------------------------------|---------|
| U      | windows drawn without replacement from those of an evaluation |         |
| x      | bits of each byte: its token's loss, shared out evenly        | [bytes] |

The sample's mean estimates what ``perplexity.evaluate`` would find on all windows; the
interval is a bootstrap that draws complete windows, since neighbouring tokens depend on each
other.

Left out: a correction for the finite number of windows (the interval is a little too wide
when most are drawn).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refllm.api import Model
from refllm.backend import to_numpy
from refllm.corpus import Document
from refllm.decode.sampling import log_probabilities
from refllm.measure.bootstrap import Interval, bootstrap_intervals
from refllm.measure.perplexity import target_loss
from refllm.measure.windows import default_windows, plan_windows


@dataclass(frozen=True)
class SampledLoss:
    """Bits per byte from a random sample of windows, with its interval."""

    bits: Interval
    tokens: int
    bytes: int
    windows: int
    of: int  # windows in all


def sample_bits_per_byte(
    model: Model, documents: Sequence[Document], count: int, rng: np.random.Generator
) -> SampledLoss:
    """Score ``count`` of the windows that ``perplexity.evaluate`` would score, drawn
    without replacement.

    The mean is one over bytes: each byte carries its token's share of the loss, so that the
    interval is one of bits per byte too. ``count`` may exceed the number of windows: then
    all are scored.
    """
    plan = plan_windows(model, documents, *default_windows(model.config.max_position_embeddings))
    sizes = [w.end - w.begin - w.first for w in plan.windows]  # scored tokens of each window
    starts = np.cumsum([0, *sizes])
    chosen = sorted(rng.permutation(len(plan.windows))[:count])
    bits = []
    units = []
    tokens = 0
    for unit, index in enumerate(chosen):
        w = plan.windows[index]
        rows = slice(starts[index], starts[index + 1])
        log_p = log_probabilities(model.logits(plan.tokens[w.document][w.begin : w.end])[w.first :])
        nats = to_numpy(target_loss(log_p, plan.targets[rows]))  # [rows]
        size = plan.token_bytes[rows]
        some = size > 0  # special tokens stand for no text
        bits.append(np.repeat(nats[some] / math.log(2) / size[some], size[some]))
        units.append(np.full(len(bits[-1]), unit))
        tokens += len(nats)
    each = np.concatenate(bits)  # [bytes]
    interval = bootstrap_intervals([each], np.concatenate(units), rng)[0]
    return SampledLoss(interval, tokens, len(each), len(chosen), len(plan.windows))
