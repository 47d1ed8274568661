"""Hypothesis strategies that the tests share: arrays of every kind, partitions, small
network shapes.

An array is drawn as shape, seed and *kind*, and built by ``default_rng(seed)``: a failing
example is three small things that can be typed in, and the kinds hold what breaks numerical
code.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from hypothesis import strategies as st

from refllm.model.config import ModelConfig
from refllm.model.rope import LinearScaling, Llama3Scaling, YarnScaling

KINDS = ("normal", "outlier_column", "zero", "constant", "denormal", "extreme", "one_sided")
seeds = st.integers(0, 2**32 - 1)


def build(kind: str, shape: Sequence[int], seed: int, dtype: Any = "float32") -> np.ndarray:
    """The array that (kind, shape, seed) stands for.

    ``extreme`` holds ± the dtype's largest number, ``denormal`` only numbers below its
    smallest normal one.
    """
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(tuple(shape))
    info = np.finfo(np.dtype(dtype))
    if kind == "outlier_column":
        column = np.zeros(shape[-1])
        column[rng.integers(shape[-1])] = 1.0
        # one input channel a hundred times the others, as in LLM.int8()
        x = x * (1.0 + 99.0 * column)
    elif kind == "zero":
        x = np.zeros(tuple(shape))
    elif kind == "constant":
        x = np.full(tuple(shape), x.reshape(-1)[0])
    elif kind == "denormal":
        steps = rng.integers(-100, 101, tuple(shape))
        x = steps * float(info.smallest_subnormal)
    elif kind == "extreme":
        x = np.where(x < 0, -1.0, 1.0) * float(info.max)
    elif kind == "one_sided":
        x = np.abs(x)
    elif kind != "normal":
        raise ValueError(f"unknown kind {kind!r}; choose one of {', '.join(KINDS)}")
    return x.astype(dtype)


@st.composite
def arrays(
    draw: st.DrawFn,
    *shape: int | st.SearchStrategy[int],
    dtype: Any = "float32",
    kinds: Sequence[str] = KINDS,
) -> np.ndarray:
    """Host arrays of the given shape (numbers or strategies), of every kind that ``kinds``
    allows.
    """
    sizes = [n if isinstance(n, int) else draw(n) for n in shape]
    return build(draw(st.sampled_from(list(kinds))), sizes, draw(seeds), dtype)


@st.composite
def partitions(
    draw: st.DrawFn, total: int | st.SearchStrategy[int], *, empty: bool = False
) -> list[int]:
    """Lengths that sum to ``total``, in any number of parts; ``empty`` allows parts of
    length 0.
    """
    n = total if isinstance(total, int) else draw(total)
    cuts = draw(st.lists(st.integers(0, n), max_size=8)) if n else []
    edges = sorted([0, *cuts, n])
    parts = [b - a for a, b in pairwise(edges)]
    return parts if empty else [p for p in parts if p > 0]


ROPE_SCALINGS = (
    None,
    LinearScaling(3.0),
    Llama3Scaling(8.0, 1.0, 4.0, 16),
    YarnScaling(4.0, 24, 1.25, beta_fast=4.0),
)


@st.composite
def model_configs(
    draw: st.DrawFn, *, families: Sequence[str] = ("llama", "mistral", "qwen2", "qwen3")
) -> ModelConfig:
    """Networks small enough to run in a millisecond, over every switch that a family has."""
    family = draw(st.sampled_from(list(families)))
    groups = draw(st.integers(1, 2))
    heads_per_group = draw(st.integers(1, 3))
    head_dim = draw(st.sampled_from([2, 4, 8]))
    scaling = draw(st.sampled_from(ROPE_SCALINGS))
    return ModelConfig(
        family=family,
        vocab_size=draw(st.integers(5, 40)),
        hidden_size=4 * draw(st.integers(1, 6)),
        intermediate_size=draw(st.integers(1, 24)),
        num_hidden_layers=draw(st.integers(1, 3)),
        num_attention_heads=groups * heads_per_group,
        num_key_value_heads=groups,
        head_dim=head_dim,
        rms_norm_eps=1e-6,
        rope_theta=draw(st.sampled_from([10_000.0, 500.0])),
        rope_scaling=scaling,
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        sliding_window=draw(st.integers(1, 6))
        if family == "mistral" and draw(st.booleans())
        else None,
        max_position_embeddings=128,
    )
