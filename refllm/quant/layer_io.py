"""Where layers come from and where they go, in memory and on disk.

| name             | layers                                                                       |
|------------------|------------------------------------------------------------------------------|
| ModelSource      | of a weight tree in memory; nothing is copied                                |
| CheckpointSource | read from a Hugging Face directory when asked for, and forgotten             |
| MemorySink       | kept in a list                                                               |

Left out: writing files (``export`` has a sink that does).

<<MERGED>>
Quantised layers on disk, one file a layer, so that a killed run goes on where it was: a
``recipe.Sink``.

| file                    | what                                                              |
|-------------------------|-------------------------------------------------------------------|
| settings.json           | what decides the result; a run goes on only with equal settings   |
| layer-00000.safetensors | the tensors of a layer as the finished checkpoint will hold them  |
| layer-00000.json        | its rows of the report, and the SHA-256 of the file above         |

Each is written under another name, flushed to the disk and renamed, the record last. So a
layer is done when its record is there and the digest is that of its tensors; anything else
(a file cut short, a record without tensors, tensors of an earlier attempt) is done again.

Left out: two runs in one folder at a time; the calibration text, which is encoded anew.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from refllm.backend import Array, asarray_like, get, namespace, to_numpy
from refllm.checkpoints.loading import NetworkTensors, read, read_config
from refllm.checkpoints.tensor_files import (
    EMBEDDING,
    CheckpointError,
    TensorFiles,
    check_tensors,
    check_tied,
    converted,
)
from refllm.checkpoints.writer import (
    Plan,
    file_sha256,
    flush,
    write_directory,
    write_file,
    write_whole,
)
from refllm.model.config import ModelConfig
from refllm.model.llama import PROJECTIONS, Layer, Weights, build_layer
from refllm.model.weights import Dense
from refllm.quant.export import Storing, named
from refllm.quant.layer_inputs import Source
from refllm.quant.report import TensorReport


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


SETTINGS = "settings.json"


class LayerFiles:
    """The finished layers of a run in ``directory``, which is made if it is not there.

    ``source`` gives what a layer has besides its projections, when a run that goes on asks
    for one.

    Raises
    ------
    ValueError
        if the directory holds the layers of a run with other settings, or something else.
    """

    def __init__(
        self, directory: Path, source: Source, storing: Storing, settings: Mapping[str, Any]
    ):
        self.directory = directory
        self.source = source
        self.storing = storing
        self.redone = 0  # layers that were found and not trusted
        known = directory / SETTINGS
        if known.is_file():
            self._compare(known, settings)
        elif directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise CheckpointError(
                f"{directory} holds something else than a run's layers: choose another folder"
            )
        directory.mkdir(parents=True, exist_ok=True)
        write_whole(known, json.dumps(settings, indent=2, sort_keys=True) + "\n")

    def _compare(self, known: Path, settings: Mapping[str, Any]) -> None:
        try:
            began = json.loads(known.read_text("utf-8"))
        except ValueError as error:
            raise CheckpointError(
                f"{known} is damaged: remove {self.directory} to start anew"
            ) from error
        now = json.loads(json.dumps(settings))
        if began != now:
            keys = began.keys() | now.keys() if isinstance(began, dict) else set()
            differing = sorted(key for key in keys if began.get(key) != now.get(key))
            what = " and ".join(differing) or "content"
            raise CheckpointError(
                f"{self.directory} holds the layers of a run with another {what}: choose another "
                "folder, or remove it"
            )

    # --- as a sink

    def done(self, index: int) -> Sequence[TensorReport] | None:
        """The rows of a layer whose record and tensors are whole; None otherwise."""
        tensors = self._tensors(index)
        record = self._record(index)
        if not record.is_file():
            return None
        try:
            about = json.loads(record.read_text("utf-8"))
            if about["sha256"] != file_sha256(tensors):
                raise ValueError("another digest")
            return [TensorReport(**row | {"shape": tuple(row["shape"])}) for row in about["rows"]]
        except (ValueError, KeyError, TypeError, OSError):
            self.redone += 1
            return None

    def layer(self, index: int) -> Layer:
        """The layer as it was when the text went on through it."""
        layer = self.source.layer(index)
        norm = layer["input_layernorm"]
        with TensorFiles(self.directory, self._tensors(index).name) as files:
            quantization = self.storing.quantization
            stored = NetworkTensors(
                files, self.source.config, quantization, namespace(norm), str(norm.dtype)
            )
            return layer | {
                key: stored[f"model.layers.{index}.{path}.weight"]
                for key, path in PROJECTIONS.items()
                if key not in self.storing.keep
            }

    def put(self, index: int, layer: Layer, rows: Sequence[TensorReport]) -> None:
        """Write a layer; it is whole on the disk when this returns."""
        read = self.storing.reader(named(layer, index), self.directory)
        tensors = self._tensors(index)
        partial = self._tensors(index).with_suffix(".partial")
        write_file(partial, self.plan(index), read)
        digest = file_sha256(partial)
        os.replace(partial, tensors)
        flush(self.directory)
        about = {"sha256": digest, "rows": [dataclasses.asdict(row) for row in rows]}
        write_whole(self._record(index), json.dumps(about) + "\n")
        flush(self.directory)

    # --- as files

    def plan(self, index: int) -> Plan:
        """The tensors of a layer's file."""
        at = f"model.layers.{index}."
        return {
            name: spec
            for name, spec in self.storing.plan(self.source.config).items()
            if name.startswith(at)
        }

    def read(self, name: str) -> np.ndarray:
        """A stored tensor of a finished layer by its name in the checkpoint."""
        index = int(name.removeprefix("model.layers.").partition(".")[0])
        with TensorFiles(self.directory, self._tensors(index).name) as files:
            return files.raw(name)

    def _tensors(self, index: int) -> Path:
        return self.directory / f"layer-{index:05}.safetensors"

    def _record(self, index: int) -> Path:
        return self.directory / f"layer-{index:05}.json"


def assemble(
    target: Path,
    layers: LayerFiles,
    rest: Mapping[str, Any],
    texts: Mapping[str, str],
    *,
    max_shard_bytes: int | None = None,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Write the layers of a finished run, with the ``rest`` of the network's tensors
    (embedding, norm, head).

    ``finish`` is called with the new directory before it takes its name.
    """
    dtype = layers.storing.dtype
    config = layers.source.config

    def read(name: str) -> np.ndarray:
        if name.startswith("model.layers."):
            return layers.read(name)
        return converted(to_numpy(rest[name]), dtype, name, target)

    temporary = target.with_name(f".{target.name}.quantized.partial")
    shutil.rmtree(temporary, ignore_errors=True)  # of an attempt that was killed
    plan = layers.storing.plan(config)
    write_directory(
        target,
        texts,
        plan,
        read,
        max_shard_bytes=max_shard_bytes,
        temporary=temporary,
        finish=finish,
    )
