"""GGUF: llama.cpp's block formats, bit for bit, and the files that hold them.

Read ``legacy`` first: a block of 32 elements with one scale is all that the k-quants
elaborate on.

| file              | what it answers                                              |
|-------------------|--------------------------------------------------------------|
| types             | which types exist, and how many bytes they take              |
| legacy            | Q8_0, Q4_0, Q4_1, Q5_0, Q5_1: 32 elements, one scale         |
| kquants           | Q2_K, Q4_K, Q5_K: 256 elements, quantised scales and offsets |
| kquants_symmetric | Q3_K, Q6_K: the same without offsets                         |
| nonlinear         | IQ4_NL: 32 elements, one scale, values unevenly spaced       |
| scale_search      | how a block's scale is found                                 |
| plain             | F32, F16, BF16, and MXFP4                                    |
| bits, arithmetic  | codes in bytes; float32 arithmetic in ggml's order           |
| unpacked          | codes, scales and offsets of a block, and their products     |
| codec             | ``quantize`` and ``dequantize``, for all types               |
| linear            | a weight that keeps a file's bytes and multiplies            |
| interleaved       | the same with rows interleaved: five times faster on a CPU   |
| mixes             | which type each tensor gets in Q4_K_M and its siblings       |
| reader, writer    | the files                                                    |
| parts             | a file in several parts, opened as one                       |
"""

from refllm.formats.gguf.codec import dequantize, quantize
from refllm.formats.gguf.interleaved import InterleavedLinear
from refllm.formats.gguf.linear import GGUFLinear
from refllm.formats.gguf.mixes import MIXES, mix
from refllm.formats.gguf.parts import open_gguf
from refllm.formats.gguf.reader import GGUFError, GGUFFile
from refllm.formats.gguf.types import TYPES, GGUFType, gguf_type, row_bytes
from refllm.formats.gguf.writer import write

__all__ = [
    "MIXES",
    "TYPES",
    "GGUFError",
    "GGUFFile",
    "GGUFLinear",
    "GGUFType",
    "InterleavedLinear",
    "dequantize",
    "gguf_type",
    "mix",
    "open_gguf",
    "quantize",
    "row_bytes",
    "write",
]
