"""What the tests of drafters share: a tiny target and draft model, and the exact
distribution of the target's output.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import enumeration
from conftest import to_host
from networks import random_tensors, tokenizer
from processing import processed
from refllm.decode.sampling import process_logits
from refllm.decode.sampling_params import SamplingParams
from refllm.decode.speculative import model_drafter, tree_verification, verification
from refllm.kv.contiguous import ContiguousCache
from refllm.model.config import ModelConfig
from refllm.model.llama import build, forward, logits

SMALL = ModelConfig("llama", 3, 8, 8, 1, 2, 1, 4, max_position_embeddings=32)  # 3 tokens
SAMPLED = SamplingParams(temperature=1.0)
PROMPT = [0, 2]


def random_model(config: ModelConfig, seed: int, xp: Any = np, dtype: str = "float64") -> Any:
    """A random network as the drafters take it: config, weights and tokenizer."""
    tensors = {k: xp.asarray(v) for k, v in random_tensors(config, seed, dtype).items()}
    return SimpleNamespace(config=config, weights=build(config, tensors), tokenizer=tokenizer())


def next_logits(model: Any, tokens: Sequence[int], xp: Any = np) -> np.ndarray:
    """Logits [V] after the last of ``tokens``, from one full forward."""
    cache = ContiguousCache(model.config, 1, len(tokens), like=model.weights["norm"])
    ids = xp.asarray(np.asarray(tokens))
    positions = xp.asarray(np.arange(len(tokens)))
    view = cache.view([len(tokens)])
    hidden = forward(model.weights, model.config, ids, positions, view)
    return to_host(logits(model.weights, hidden))[-1]


def output_distribution(
    target: Any,
    sampling: SamplingParams,
    length: int,
    min_tokens: int = 0,
    end_tokens: Collection[int] = (),
) -> dict[tuple[int, ...], float]:
    """The distribution of the next ``length`` tokens after ``PROMPT``, from a full forward
    for each prefix.
    """
    found = {}
    for s in itertools.product(range(3), repeat=length):
        chance = 1.0
        for i, token in enumerate(s):
            prefix = [*PROMPT, *s[:i]]
            z = next_logits(target, prefix)
            z = processed(z, sampling, PROMPT, list(s[:i]), min_tokens, end_tokens)[None]
            chance *= process_logits(z, sampling.temperature, sampling.top_k)[0, token]
            if not chance:
                break  # a processor need not know what follows
        found[s] = chance
    return found


def use_exact_draws(patch: pytest.MonkeyPatch) -> None:
    """Let verification and drafters draw with ``enumeration.draw``, which takes the
    uniforms of ``enumeration.exact_distribution``.
    """
    for module in (verification, tree_verification, model_drafter):
        patch.setattr(module, "draw", enumeration.draw)
