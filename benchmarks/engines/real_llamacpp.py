"""llama.cpp on a GGUF file, greedy: ``python -m engines.real_llamacpp FILE F32|stored``.

``F32`` lets llama.cpp itself write the file's tensors as float32 first; ``stored`` reads the
file as it is. The network is run as in ``decode_llamacpp``.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import gguf
import llama_cpp

from engines.decode_llamacpp import Engine
from engines.decoding import serve

ALL_F32 = 0  # llama_ftype


def write_float32(source: Path, target: Path) -> None:
    """The same tensors in float32, by llama.cpp's own conversion."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = ALL_F32
    parameters.allow_requantize = True  # the source is quantised
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), parameters)
    if status:
        raise RuntimeError(f"llama_model_quantize failed with status {status}")


def tensor_bytes(path: Path) -> int:
    """Bytes of all tensors: a tied embedding is the head, so a decode step reads each once."""
    return sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors)


if __name__ == "__main__":
    file = Path(sys.argv[1])
    threads = int(os.environ["OMP_NUM_THREADS"])
    with tempfile.TemporaryDirectory() as folder:
        if sys.argv[2] == "F32":
            write_float32(file, Path(folder) / "float32.gguf")
            file = Path(folder) / "float32.gguf"
        serve(Engine(file, threads).generate, threads=threads, bytes=tensor_bytes(file))
