"""Where layers come from and where they go, in memory and on disk.

| name             | layers                                                                       |
|------------------|------------------------------------------------------------------------------|
| ModelSource      | of a weight tree in memory; nothing is copied                                |
| CheckpointSource | read from a Hugging Face directory when asked for, and forgotten             |
| MemorySink       | kept in a list                                                               |

Left out: writing files (``export`` has a sink that does).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from refllm.backend import Array, asarray_like, get
from refllm.checkpoints.loading import read, read_config
from refllm.checkpoints.tensor_files import (
    EMBEDDING,
    CheckpointError,
    TensorFiles,
    check_tensors,
    check_tied,
    converted,
)
from refllm.model.config import ModelConfig
from refllm.model.llama import PROJECTIONS, Layer, Weights, build_layer
from refllm.model.weights import Dense
from refllm.quant.report import TensorReport

__all__ = ["CheckpointSource", "MemorySink", "ModelSource"]


class ModelSource:
    """The layers of a model in memory."""

    def __init__(self, config: ModelConfig, weights: Weights):
        self.config = config
        self.weights = weights

    def rows(self, tokens: Sequence[int]) -> Array:
        return self.weights["embed_tokens"].rows(asarray_like(tokens, self.weights["norm"]))

    def layer(self, index: int) -> Layer:
        """ValueError if a projection is quantised already: its rounding errors would be
        rounded once more.
        """
        layer: Layer = dict(self.weights["layers"][index])
        for name in PROJECTIONS:
            if not isinstance(layer[name], Dense):
                raise ValueError(
                    f"model.layers.{index}.{PROJECTIONS[name]} is quantised already: start from the "
                    "original weights"
                )
        return layer


class CheckpointSource:
    """The layers of a Hugging Face directory, each read when it is asked for; a context
    manager.

    ``dtype`` and ``backend`` say what is computed in, as in ``load``; what is stored may be
    narrower.
    """

    def __init__(self, path: str | Path, *, backend: str | None = None, dtype: str = "float32"):
        self.config = read_config(path)
        if read(Path(path).expanduser()) is not None:
            raise CheckpointError(
                f"{path} is quantised already: start from the model that it was made from"
            )
        self.files = TensorFiles(Path(path).expanduser())
        check_tensors(self.config, self.files, self.files.directory)
        check_tied(self.config, self.files, self.files.directory)
        self._tensors = _Converted(self.files, get(backend), dtype)

    def rows(self, tokens: Sequence[int]) -> Array:
        # of a large vocabulary few rows are read: only these are converted
        rows = self.files[EMBEDDING][tokens]
        return self._tensors.moved(rows, EMBEDDING)

    def layer(self, index: int) -> Layer:
        return build_layer(self.config, self._tensors, index)

    def __enter__(self) -> CheckpointSource:
        return self

    def __exit__(self, *exception: object) -> None:
        self.files.__exit__(*exception)


class MemorySink:
    """Quantised layers in a list, in their order."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []

    def done(self, index: int) -> Sequence[TensorReport] | None:
        return None

    def layer(self, index: int) -> Layer:
        return self.layers[index]

    def put(self, index: int, layer: Layer, rows: Sequence[TensorReport]) -> None:
        self.layers.append(layer)


class _Converted(Mapping[str, Array]):
    """Tensors of files in the dtype and library that is computed in, read at the moment of
    the look-up.
    """

    def __init__(self, files: TensorFiles, xp: Any, dtype: str):
        self.files = files
        self.xp = xp
        self.dtype = dtype

    def moved(self, tensor: Any, name: str) -> Array:
        return self.xp.asarray(converted(tensor, self.dtype, name, self.files.file(name)))

    def __getitem__(self, name: str) -> Array:
        return self.moved(self.files[name], name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)
