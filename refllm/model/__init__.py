"""What does the network compute? From token ids and positions to hidden states and logits, as
pure functions of arrays. Read ``naive`` first: one token at a time, in loops.

In reading order:

- ``naive``: the network in loops, which defines what the others compute
- ``config``: the network's shape, from a Hugging Face ``config.json``
- ``rope``: the frequencies of RoPE, and how linear, YaRN and Llama 3's scaling stretch them
- ``layers``: RMSNorm, RoPE, SwiGLU
- ``attention``: causal grouped-query attention: all scores at once, in tiles, merged
- ``weights``: the ``Linear`` interface, and floating-point weights; ``weight_layout``: how they
  lie in memory, ``helper_threads``: parts of a product at the same time
- ``llama``: ``forward`` over a ragged batch, and the weight tree that it walks

Captured steps, which compute the same with less overhead, are in ``decode.fast``.
"""

from refllm.model.attention import Attend, CausalAttend, flash_attention, merge
from refllm.model.config import ModelConfig, UnsupportedModel
from refllm.model.layers import apply_rope, rms_norm, rope_table, swiglu
from refllm.model.llama import Weights, build, forward, logits
from refllm.model.naive import naive_logits
from refllm.model.rope import (
    LinearScaling,
    Llama3Scaling,
    RopeScaling,
    YarnScaling,
    rope_frequencies,
)
from refllm.model.weights import Dense, Linear, as_linear

__all__ = [
    "Attend",
    "CausalAttend",
    "Dense",
    "Linear",
    "LinearScaling",
    "Llama3Scaling",
    "ModelConfig",
    "RopeScaling",
    "UnsupportedModel",
    "Weights",
    "YarnScaling",
    "apply_rope",
    "as_linear",
    "build",
    "flash_attention",
    "forward",
    "logits",
    "merge",
    "naive_logits",
    "rms_norm",
    "rope_frequencies",
    "rope_table",
    "swiglu",
]
