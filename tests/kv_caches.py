"""What the tests of KIVI and sparse caches share: random policies, quantisation by loops, and
one step of a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from conftest import to_host
from refllm.api import Model
from refllm.kv.kivi import Kivi
from tiny_models import tiny_model

kivis = st.builds(
    lambda k, v, g, many: Kivi(k, v, g, g * many),
    st.sampled_from([1, 2, 4, 8]),
    st.integers(1, 8),
    st.sampled_from([4, 8]),
    st.sampled_from([8, 16]),
)


def tiny_api_model(seed: int = 0, **changes: Any) -> Model:
    """A random network as ``refllm.api.Model``; ``changes`` go to its configuration."""
    made = tiny_model(seed, **changes)
    return Model(made.config, made.weights, made.tokenizer)


def quantized_by_loops(x: np.ndarray, bits: int, group: int, by: str, whole: int) -> np.ndarray:
    """x[S, G, D] with its first ``whole`` tokens quantised and dequantised, group by group."""
    x = x.copy()
    for s in range(0, whole, group if by == "channel" else 1):
        for c in range(0, x.shape[2], 1 if by == "channel" else group):
            if by == "channel":
                at: Any = (slice(s, s + group), slice(None), c)
                block = x[at].T  # [G, group]
            else:
                at = (s, slice(None), slice(c, c + group))
                block = x[at]
            low = block.min(axis=1, keepdims=True)
            scale = np.ptp(block, axis=1, keepdims=True) / ((1 << bits) - 1)
            back = np.rint((block - low) / scale) * scale + low
            x[at] = back.T if by == "channel" else back
    return x


def run_step(
    xp: Any, cache: Any, data: Any, counts: Sequence[int], kept: Sequence[int] | None = None
) -> list[list[np.ndarray]]:
    """One step of q, k, v[layers, B, T, heads, D] in all layers, of which ``kept`` tokens
    (all) are committed; outputs by layer and sequence.
    """
    starts = cache.lengths[:]
    view = cache.view(counts)
    outputs = []
    for layer in range(len(data[0])):
        parts = [
            np.concatenate(
                [
                    a[layer, b, s : s + n]
                    for b, (s, n) in enumerate(zip(starts, counts, strict=True))
                ]
            )
            for a in data
        ]
        moved = [xp.asarray(part) for part in parts]
        out = to_host(view(layer, *moved)).copy()
        for array in moved:
            array[...] = np.nan  # a captured step uses this memory again
        outputs.append(np.split(out, np.cumsum(counts)[:-1]))
    cache.advance(counts if kept is None else kept)
    return outputs
