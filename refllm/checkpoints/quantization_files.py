"""How the weights of a directory are quantised: the entry of ``config.json``, or the file of
its own that older writers made.

| file                 | entry                           | written by           |
|----------------------|---------------------------------|----------------------|
| config.json          | quantization_config             | transformers, vLLM   |
| quantize_config.json | the whole file: bits, sym …     | AutoGPTQ, GPTQModel  |
| quant_config.json    | the whole file: w_bit, version …| AutoAWQ before 0.1.6 |

The tensors of such directories lie in files of other names, such as
``gptq_model-4bit-128g.safetensors``, in the same layouts. Where config.json has an entry as
well, both must agree.

Left out: quantisation parameters inside safetensors' own metadata.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from refllm.array_types import Json
from refllm.checkpoints.tensor_files import QUANTIZATION_FILES, CheckpointError, read_json
from refllm.formats.quantization_config import Quantization, UnsupportedQuantization, parse

__all__ = ["read_quantization"]


def read_quantization(directory: Path) -> Quantization | None:
    """How the weights of a checkpoint are quantised; None for plain weights.

    Raises
    ------
    CheckpointError
        for a quantisation that is not supported, and for two files that disagree.
    """
    found: list[tuple[Path, Quantization]] = []
    raw = read_json(directory / "config.json").get("quantization_config")
    if raw is not None:
        found.append(_parsed(directory / "config.json", raw))
    for name, method in QUANTIZATION_FILES.items():
        file = directory / name
        if not file.is_file():
            continue
        entry: Json = read_json(file)
        entry.setdefault("quant_method", method)
        if isinstance(raw, Mapping):  # what one file alone says holds for both
            entry = dict(raw) | entry
        found.append(_parsed(file, entry))
    if not found:
        return None
    (file, first), (other, last) = found[0], found[-1]
    if first != last:
        raise CheckpointError(
            f"{other} says {last}, but {file.name} says {first}: remove the file that is wrong"
        )
    return first


def _parsed(file: Path, raw: object) -> tuple[Path, Quantization]:
    """A file and the quantisation that it describes."""
    try:
        return file, parse(raw)
    except UnsupportedQuantization as error:
        raise CheckpointError(f"{file}: {error}") from error
