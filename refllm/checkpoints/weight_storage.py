"""Whether quantised weights stay as they are stored, or become floats once, at loading.

| ``weights`` | quantised weights                                                          |
|-------------|----------------------------------------------------------------------------|
| "stored"    | stay as they lie in the file; each product dequantises them a tile at a    |
|             | time: least memory; the choice on a GPU                                    |
| "float"     | are dequantised once: fastest on a CPU. Formats that also quantise         |
|             | activations then compute with activations in floating point                |
| "auto"      | on NumPy "float" for the formats that quantise weights alone, if all       |
|             | weights then fit into half of the free memory; otherwise, and on CuPy,     |
|             | "stored"                                                                   |

Dequantising changes no value of a weight, so the logits differ only by the rounding of sums,
unless activations are quantised too: "auto" never drops that.

A model that does not fit into the free memory is rejected before its weights are read.

Left out: offloading to disk, decoding some layers only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

from refllm.backend import NUMPY, Namespace
from refllm.checkpoints.free_memory import free_memory
from refllm.checkpoints.tensor_files import CheckpointError
from refllm.errors import InputError

__all__ = ["WEIGHTS", "Decoded", "Storage", "StoredTensor", "check_choice", "choose", "describe"]

WEIGHTS = ("auto", "float", "stored")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a network as a checkpoint stores it.

    ``format`` is the name of a quantised format, None for plain floats; ``nbytes`` are the
    bytes of a quantised weight. ``activations`` says that its products quantise their
    inputs too.
    """

    name: str
    elements: int
    format: str | None = None
    nbytes: int = 0
    activations: bool = False


@dataclass(frozen=True)
class Storage:
    """What becomes of a checkpoint's tensors: the names of those that are dequantised at
    loading, the bytes of all weights in memory, and that in words.
    """

    decoded: frozenset[str]
    nbytes: int
    summary: str


def check_choice(weights: str) -> None:
    """InputError unless ``weights`` is one of the three."""
    if weights not in WEIGHTS:
        raise InputError(f"load: weights is one of {', '.join(WEIGHTS)}, got {weights!r}")


def describe(tensors: Iterable[StoredTensor], decoded: Set[str], dtype: str) -> str:
    """The weights of a network in words.

    >>> tensors = [StoredTensor("a", 64, "Q4_1", 40), StoredTensor("b", 64, "Q8_0", 68)]
    >>> describe(tensors, {"a", "b"}, "float32")
    'float32 weights, decoded from Q4_1 and Q8_0'
    >>> describe(tensors, {"b"}, "float32")
    'weights stored as Q4_1; float32 weights, decoded from Q8_0'
    """
    quantised = [tensor for tensor in tensors if tensor.format is not None]
    kept = sorted({str(t.format) for t in quantised if t.name not in decoded})
    floats = sorted({str(t.format) for t in quantised if t.name in decoded})
    parts = []
    if kept:
        parts.append(f"weights stored as {_and(kept)}")
    if floats:
        parts.append(f"{dtype} weights, decoded from {_and(floats)}")
    return "; ".join(parts) or f"{dtype} weights"


def choose(
    weights: str,
    tensors: Iterable[StoredTensor],
    dtype: str,
    xp: Namespace,
    where: object,
) -> Storage:
    """Decide which of a checkpoint's ``tensors`` become floats of ``dtype`` on ``xp``.

    Raises
    ------
    CheckpointError
        if the weights do not fit into the free memory, with both numbers.
    """
    check_choice(weights)
    listed = list(tensors)
    free = free_memory(xp)
    everything = frozenset(t.name for t in listed if t.format is not None)
    weight_only = frozenset(t.name for t in listed if t.format is not None and not t.activations)
    decoded: frozenset[str] = frozenset()
    if weights == "float":
        decoded = everything
    elif weights == "auto" and xp is NUMPY:
        fits = free is None or 2 * _nbytes(listed, weight_only, dtype) <= free
        decoded = weight_only if fits else decoded
    needed = _nbytes(listed, decoded, dtype)
    summary = describe(listed, decoded, dtype)
    if free is not None and needed > free:
        stored = _nbytes(listed, frozenset(), dtype)
        advice = "free some memory, or load a checkpoint of fewer bits"
        if decoded and stored <= free:
            advice = f'load it with weights="stored", which needs {_gigabytes(stored)}'
        raise CheckpointError(
            f"{where}: its {summary} need {_gigabytes(needed)}, but only {_gigabytes(free)} of "
            f"memory are free: {advice}"
        )
    return Storage(decoded, needed, summary)


class Decoded(Mapping[str, Any]):
    """The tensors of a network, those named in ``decoded`` dequantised when they are looked
    up.
    """

    quantization = None  # ``llama.build`` reserves memory for floating-point weights

    def __init__(self, tensors: Mapping[str, Any], decoded: Set[str]):
        self.tensors = tensors
        self.decoded = decoded

    def __getitem__(self, name: str) -> Any:
        tensor = self.tensors[name]
        return tensor.dequantize() if name in self.decoded else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def _nbytes(tensors: Iterable[StoredTensor], decoded: Set[str], dtype: str) -> int:
    """Bytes of the weights in memory."""
    size = {"float16": 2, "float32": 4, "float64": 8}[dtype]
    floats = sum(t.elements for t in tensors if t.format is None or t.name in decoded)
    stored = sum(t.nbytes for t in tensors if t.format is not None and t.name not in decoded)
    return size * floats + stored


def _gigabytes(nbytes: int) -> str:
    """
    >>> _gigabytes(4_920_000_000)
    '4.92 GB'
    """
    return f"{nbytes / 1e9:,.2f} GB"


def _and(names: list[str]) -> str:
    """
    >>> _and(["a"]), _and(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)
