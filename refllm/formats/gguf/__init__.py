"""GGUF: the block formats of llama.cpp, bit for bit, and the files that hold them."""

from refllm.formats.gguf.codec import dequantize, quantize
from refllm.formats.gguf.types import TYPES, Kind, kind, row_bytes

__all__ = ["TYPES", "Kind", "dequantize", "kind", "quantize", "row_bytes"]
