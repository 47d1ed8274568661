"""Tiny networks with a tokenizer, for tests of measurements on a model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from refllm.checkpoints.tokenizer import Tokenizer
from refllm.model.config import ModelConfig
from refllm.model.llama import build
from refllm.train.loop import initialize


@dataclass(frozen=True)
class Record:
    """The parts of a model that measurements need: configuration, weight tree, tokenizer."""

    config: ModelConfig
    weights: Any
    tokenizer: Tokenizer


@cache
def byte_tokenizer(vocab_size: int = 257) -> Tokenizer:
    """``<|endoftext|>`` (id 0), the 256 bytes, and merges learned from a few words up to
    ``vocab_size``.
    """
    return Tokenizer.train(
        ["def return self import class for in if else None True " * 4], vocab_size
    )


@cache
def tiny_config(**changes: Any) -> ModelConfig:
    shape: dict[str, Any] = {
        "family": "llama",
        "vocab_size": 257,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "bos_token_id": 0,
        "eos_token_ids": (0,),
    }
    return ModelConfig(**(shape | changes))


def tiny_params(config: ModelConfig, seed: int, dtype: str = "float64") -> dict[str, np.ndarray]:
    """Random parameters, ten times the usual spread, so that predictions differ from
    uniform.
    """
    params = initialize(config, np.random.default_rng(seed))
    return {k: (v if v.ndim == 1 else 10 * v).astype(dtype) for k, v in params.items()}


def tiny_model(seed: int = 0, *, xp: Any = np, dtype: str = "float64", **changes: Any) -> Record:
    """A random network in ``dtype`` on the library ``xp``; ``changes`` go to the
    configuration.
    """
    config = tiny_config(**changes)
    params = {k: xp.asarray(v) for k, v in tiny_params(config, seed, dtype).items()}
    return Record(config, build(config, params), byte_tokenizer(max(257, config.vocab_size)))


def uniform_model(**changes: Any) -> Record:
    """Every token has probability 1/V in any context: the embedding, tied to the
    head, is zero.
    """
    config = tiny_config(tie_word_embeddings=True, **changes)
    params = tiny_params(config, 0)
    params["model.embed_tokens.weight"] = np.zeros_like(params["model.embed_tokens.weight"])
    return Record(config, build(config, params), byte_tokenizer(max(257, config.vocab_size)))
