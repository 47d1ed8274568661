"""How do models get in and out of files? Hugging Face directories, GGUF files and tokenizers,
read into a weight tree and written so that other programs load them. Read ``loading`` first.

In reading order:

- ``loading``: read a checkpoint, build the weight tree
- ``sources``: which name or path is which checkpoint; ``hub``: one of the Hugging Face Hub
- ``weight_storage``: quantised weights stay stored, or become floats; ``free_memory``
- ``quantization_files``: how the weights of a directory are quantised
- ``tensor_files``: safetensors, and which tensors a network needs
- ``writer``: files and directories that are either complete or absent
- ``tokenizer``: text to token ids and back
- ``chat_template``: messages as the text that a chat model was trained on;
  ``chat_template_tokens`` its token ids, ``chat_template_files`` where templates are kept,
  ``chat_template_sandbox`` Jinja, ``chat_template_text`` which characters the template wrote
- ``gguf``: a network from a GGUF file, whose weights stay quantised
- ``gguf_names``: names, row order and configuration in GGUF and in Hugging Face's format;
  ``gguf_rope`` RoPE's scaling, ``gguf_entries`` the types of metadata entries
- ``gguf_tokenizer``: the tokenizer of a GGUF file; ``gguf_pre_tokenizers`` and
  ``gguf_special_tokens`` say what its names mean
- ``gguf_tokenizer_writer``: a tokenizer as GGUF metadata, compared with the source before it is
  written (``gguf_words``, ``sample_texts``)

The GGUF modules are imported only where there is such a file.
"""

from refllm.checkpoints.loading import Checkpoint, iter_tensors, load, read_config, read_tensor
from refllm.checkpoints.sources import bundled, locate
from refllm.checkpoints.tensor_files import CheckpointError, TensorFiles
from refllm.checkpoints.tokenizer import Tokenizer
from refllm.checkpoints.writer import save

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "TensorFiles",
    "Tokenizer",
    "bundled",
    "iter_tensors",
    "load",
    "locate",
    "read_config",
    "read_tensor",
    "save",
]
