"""llama.cpp through llama-cpp-python, greedy, weights and cache in float32: ``python -m
engines.decode_llamacpp DIR``.

The checkpoint is written as GGUF to a temporary folder, values unchanged. llama.cpp pairs
the rotated dimensions (2i, 2i+1) where Hugging Face pairs (i, i + D/2), so the rows of q
and k are put in its order. The C interface is used, not the ``Llama`` class: B sequences in
one batch, and no Python per logit.

Left out: llama.cpp's own formats (a later comparison), its tokenizer (tokens are ids here).
"""

from __future__ import annotations

import ctypes
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

from engines.decoding import Tokens, serve
from refllm.checkpoints import loading
from refllm.model.config import ModelConfig

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def write_gguf(source: str, target: Path) -> None:
    """A plain Llama checkpoint as float32 GGUF, without a vocabulary."""
    config = loading.read_config(source)
    if config.family != "llama" or config.rope_scaling is not None:
        raise ValueError("this benchmark writes plain Llama networks only")
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for name, tensor in loading.iter_tensors(source, "float32"):
        writer.add_tensor(_name(name), _rows(name, tensor, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name(name: str) -> str:
    if not name.startswith("model.layers."):
        return NAMES[name]
    index, rest = name.removeprefix("model.layers.").split(".", 1)
    return f"blk.{index}.{NAMES[rest]}"


def _rows(name: str, tensor: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Rows (heads, 2, D/2) of q and k → (heads, D/2, 2); everything else as it is."""
    if ".q_proj." not in name and ".k_proj." not in name:
        return tensor
    by_half = tensor.reshape(-1, 2, config.head_dim // 2, tensor.shape[1])
    return np.ascontiguousarray(by_half.swapaxes(1, 2)).reshape(tensor.shape)


class Engine:
    """The network and, for each batch shape, a context with room for it."""

    def __init__(self, path: Path, threads: int = 1):
        self.threads = threads
        llama_cpp.llama_log_set(_QUIET, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.contexts: dict[tuple[int, int], Any] = {}

    def context(self, size: int, length: int) -> Any:
        if (size, length) not in self.contexts:
            parameters = llama_cpp.llama_context_default_params()
            # a sequence's share is rounded up to 256
            parameters.n_ctx = size * (-(-length // 256) * 256)
            parameters.n_batch = size * length
            parameters.n_seq_max = size
            parameters.n_threads = self.threads
            parameters.n_threads_batch = self.threads
            parameters.type_k = 0  # GGML_TYPE_F32
            parameters.type_v = 0
            parameters.flash_attn_type = 0  # off, as in the tests that compare logits
            self.contexts[size, length] = llama_cpp.llama_init_from_model(self.model, parameters)
        return self.contexts[size, length]

    def generate(self, prompts: Tokens, new: int) -> Tokens:
        """As many prefill batches as fit at once (one), then a token a sequence and step."""
        size = len(prompts)
        length = len(prompts[0])
        context = self.context(size, length + new)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        batch = llama_cpp.llama_batch_init(size * length, 0, 1)
        columns: Tokens = []
        step = prompts
        first = 0
        for _ in range(new):
            batch.n_tokens = 0
            for sequence, tokens in enumerate(step):
                put(batch, sequence, first, tokens, True)
            columns.append(self.decode(context, batch, size))
            first += len(step[0])
            step = [[t] for t in columns[-1]]
        llama_cpp.llama_batch_free(batch)
        return [list(row) for row in zip(*columns, strict=True)]

    def decode(self, context: Any, batch: Any, rows: int) -> list[int]:
        """Compute a batch; the likeliest token of each of its ``rows`` rows of logits."""
        if status := llama_cpp.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode failed with status {status}")
        if not rows:
            return []
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (rows, self.vocab))
        best: list[int] = logits.argmax(axis=1).tolist()
        return best


def put(batch: Any, sequence: int, first: int, tokens: list[int], samples: bool) -> None:
    """Append a sequence's next tokens, at positions from ``first`` on; ``samples``: logits
    of the last one.
    """
    at = batch.n_tokens
    for i, token in enumerate(tokens):
        batch.token[at + i] = token
        batch.pos[at + i] = first + i
        batch.logits[at + i] = False
        batch.n_seq_id[at + i] = 1
        batch.seq_id[at + i][0] = sequence
    batch.n_tokens = at + len(tokens)
    batch.logits[batch.n_tokens - 1] = samples


_QUIET = llama_cpp.llama_log_callback(lambda level, text, data: None)

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        write_gguf(sys.argv[1], file)
        engine = Engine(file)
        serve(engine.generate)
