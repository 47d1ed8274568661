"""How much memory a model needs: weights and KV cache at any bits, and what fits into a budget.

| symbol | name                          | formula                                         |
|--------|-------------------------------|-------------------------------------------------|
| N      | stored parameters             | all tensors, the head only if it is untied      |
| kv     | bytes of K and V per token    | 2·L·G·D·bits/8, the 2 for keys and values       |
| S      | tokens that a cache must hold | B · context                                     |

GB is 10⁹ bytes, GiB is 2³⁰: at cache sizes the two differ by 7 %, so both are printed.

Sources: elementary counting, tested against ``nbytes`` of a built weight tree and of
``ContiguousCache``. The 70B example: Llama 2 70B's shape (Touvron et al. 2023), with 64
key/value heads and with the 8 that it really has.

Left out: activations, the memory of the allocator and the runtime, blocks of a paged cache
that are half full.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from refllm.errors import InputError
from refllm.model.config import ModelConfig

# The shape of Llama 2 70B: 80 layers, 64 heads of 128, 8 key/value heads.
LLAMA_70B = ModelConfig(
    "llama",
    vocab_size=32_000,
    hidden_size=8192,
    intermediate_size=28_672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=4096,
)
LLAMA_8B = ModelConfig(
    "llama",
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=8192,
)


@dataclass(frozen=True)
class Parameters:
    """Stored parameters by what they are for."""

    embedding: int
    head: int  # 0 if tied to the embedding
    attention: int
    mlp: int
    small: int  # norms and biases

    @property
    def total(self) -> int:
        """All of them."""
        return self.embedding + self.head + self.attention + self.mlp + self.small


def parameters(config: ModelConfig) -> Parameters:
    """Count the parameters of a configuration; the total is ``config.num_parameters``."""
    n = config.hidden_size
    layers = config.num_hidden_layers
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    small = (
        2 * n
        + (q + 2 * kv if config.attention_bias else 0)
        + (2 * config.head_dim if config.qk_norm else 0)
    )
    table = config.vocab_size * n
    return Parameters(
        embedding=table,
        head=0 if config.tie_word_embeddings else table,
        attention=layers * n * (2 * q + 2 * kv),
        mlp=layers * 3 * n * config.intermediate_size,
        small=layers * small + n,
    )


def weight_bytes(config: ModelConfig, bits: float = 16, *, other_bits: float | None = None) -> int:
    """Bytes of the weights, rounded up: ``bits`` per parameter (fractions are fine: 4.5 with
    its scales).

    ``other_bits`` is for what quantisers usually leave alone, the embedding, the head,
    norms and biases; None means ``bits`` for these too.

    >>> human(weight_bytes(LLAMA_70B, 4))
    '34.49 GB (32.12 GiB)'
    """
    p = parameters(config)
    products = p.attention + p.mlp
    others = p.embedding + p.head + p.small
    rest = bits if other_bits is None else other_bits
    return math.ceil(
        (products * _positive("bits", bits) + others * _positive("other_bits", rest)) / 8
    )


def kv_bytes_per_token(config: ModelConfig, bits: float = 16) -> float:
    """kv = 2·L·G·D·bits/8: what one more token of context costs, whatever the batch.

    >>> kv_bytes_per_token(LLAMA_8B)  # 128 KiB
    131072.0
    """
    elements = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return elements * _positive("bits", bits) / 8


def kv_bytes(
    config: ModelConfig,
    tokens: int,
    sequences: int = 1,
    *,
    bits: float = 16,
    forget_window: bool = False,
) -> int:
    """Bytes of the cache for ``sequences`` of ``tokens`` each, rounded up.

    ``forget_window``: the cache of a sliding-window model drops the tokens that no query
    can attend to any more.
    """
    if not (0 <= tokens < math.inf and 0 <= sequences < math.inf):
        raise InputError(f"kv_bytes: {sequences} sequences of {tokens} tokens")
    if forget_window and config.sliding_window is not None:
        tokens = min(tokens, config.sliding_window)
    return math.ceil(kv_bytes_per_token(config, bits) * tokens * sequences)


def max_tokens(
    config: ModelConfig, budget: float, *, sequences: int = 1, bits: float = 16, kv_bits: float = 16
) -> int:
    """The longest context that each of ``sequences`` can have within ``budget`` bytes,
    weights included.

    0 if not even one token fits. The model's own limit on positions is ignored.
    """
    if sequences < 1:
        raise InputError(f"max_tokens: needs at least one sequence, got {sequences}")
    return _fits(config, budget, bits, kv_bits) // sequences


def max_sequences(
    config: ModelConfig, budget: float, context: int, *, bits: float = 16, kv_bits: float = 16
) -> int:
    """The most sequences of ``context`` tokens that fit within ``budget`` bytes, weights
    included.
    """
    if context < 1:
        raise InputError(f"max_sequences: needs a context of at least one token, got {context}")
    return _fits(config, budget, bits, kv_bits) // context


def human(size: float) -> str:
    """``"32.77 GB (30.52 GiB)"``: decimal and binary side by side, up to terabytes."""
    # comparisons, since log(10**6, 1000) is not quite 2
    power = sum(size >= 1000**k for k in (1, 2, 3, 4))
    if power == 0:
        return f"{size:.0f} B"
    prefix = " kMGT"[power]
    return f"{size / 1000**power:.2f} {prefix}B ({size / 1024**power:.2f} {prefix.upper()}iB)"


def long_context_example(context: int = 100_000) -> dict[str, int]:
    """KV bytes in fp16 of one 70B sequence of ``context`` tokens, by the number of key/value heads.

    80 layers and 128 dimensions per head: 262.14 GB (244.14 GiB) with 64 heads, one for every
    query head, and 32.77 GB (30.52 GiB) with the 8 that grouped-query attention keeps. Lu
    2025 ("Transformer Notes (VII): Deployment Optimization", §1.11) says 40 GB, which is
    neither; 40 GiB is exactly what 8 heads take for 131,072 tokens.
    """
    every = replace(LLAMA_70B, num_key_value_heads=64)
    return {
        "64 KV heads (multi-head)": kv_bytes(every, context),
        "8 KV heads (grouped-query)": kv_bytes(LLAMA_70B, context),
    }


def _fits(config: ModelConfig, budget: float, bits: float, kv_bits: float) -> int:
    """Tokens of cache that fit beside the weights."""
    if not math.isfinite(budget):
        raise InputError(f"the budget must be a finite number of bytes, got {budget}")
    left = budget - weight_bytes(config, bits)
    return max(0, math.floor(left / kv_bytes_per_token(config, kv_bits)))


def _positive(name: str, bits: float) -> float:
    """``bits`` as they are, or ValueError unless they are positive and finite."""
    if not (bits > 0 and math.isfinite(bits)):
        raise InputError(f"{name} must be positive and finite, got {bits}")
    return bits
