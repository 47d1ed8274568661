"""Where the layers of a quantisation run come from and where they go, in memory and on disk.

| class            | role   | layers                                                      |
|------------------|--------|-------------------------------------------------------------|
| ModelSource      | source | of a weight tree in memory; nothing is copied               |
| CheckpointSource | source | of a Hugging Face directory, each read when it is asked for |
| MemorySink       | sink   | a list                                                      |
| LayerFiles       | sink   | one file per layer, so that a killed run can be resumed     |

``LayerFiles`` writes these files; ``assemble`` makes a checkpoint of them:

| file                    | what                                                               |
|-------------------------|--------------------------------------------------------------------|
| settings.json           | what determines the result; a run resumes only with equal settings |
| layer-00000.safetensors | the tensors of a layer as the finished checkpoint will hold them   |
| layer-00000.json        | its rows of the report, and the SHA-256 of the file above          |

Each is written under another name, flushed to the disk and renamed, the record last. So a
layer is finished when its record exists and holds the digest of its tensors; anything else
(a file cut short, a record without tensors, tensors of an earlier attempt) is quantised again.

Left out: two runs in one folder at a time; keeping the calibration tokens (a resumed run
tokenises the text again).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from refllm.atomic import replacing, sync_directory, write_atomic
from refllm.backend import Array, Namespace, asarray_like, get, namespace, to_numpy
from refllm.checkpoints.loading import NetworkTensors, read_config
from refllm.checkpoints.quantization_files import read_quantization
from refllm.checkpoints.tensor_files import (
    EMBEDDING,
    CheckpointError,
    TensorFiles,
    check_tensors,
    check_tied,
    converted,
)
from refllm.checkpoints.writer import (
    TensorSpecs,
    file_sha256,
    write_directory,
    write_file,
)
from refllm.errors import InputError
from refllm.model.config import ModelConfig
from refllm.model.llama import PROJECTIONS, Layer, Weights, build_layer, projection_name
from refllm.model.weights import Dense
from refllm.quant.export import ExportSpec, checkpoint_names
from refllm.quant.layer_inputs import LayerSource
from refllm.quant.methods import TensorReport
from refllm.quant.rotation import unwrap_rotated

SETTINGS = "settings.json"


# --- sources --------------------------------------------------------------------------------


class ModelSource:
    """The layers of a model in memory: a ``LayerSource``."""

    def __init__(self, config: ModelConfig, weights: Weights):
        self.config = config
        self.weights = weights

    def rows(self, tokens: Sequence[int]) -> Array:
        """Embedding rows of T token ids → [T, N]."""
        ids = asarray_like(tokens, self.weights["norm"])
        rows: Array = self.weights["embed_tokens"].rows(ids)
        return rows

    def layer(self, index: int) -> Layer:
        """A copy of the layer's dict.

        ValueError if a projection is quantised already: its rounding errors would be rounded
        again.
        """
        layer = unwrap_rotated(self.weights["layers"][index])
        for name in PROJECTIONS:
            if not isinstance(layer[name], Dense):
                raise InputError(
                    f"{projection_name(index, name)} is quantised already: start from the "
                    "original weights"
                )
        return layer


class CheckpointSource:
    """The layers of a Hugging Face directory, each read when it is asked for: a
    ``LayerSource`` and a context manager.

    ``dtype`` and ``backend`` are those of the computation, as in ``load``; the stored dtype
    may be narrower.
    """

    def __init__(self, path: str | Path, *, backend: str | None = None, dtype: str = "float32"):
        self.config = read_config(path)
        if read_quantization(Path(path).expanduser()) is not None:
            raise CheckpointError(
                f"{path} is quantised already: start from the model that it was made from"
            )
        self.files = TensorFiles(Path(path).expanduser())
        check_tensors(self.config, self.files, self.files.directory)
        check_tied(self.config, self.files, self.files.directory)
        self._tensors = _Converted(self.files, get(backend), dtype)

    def rows(self, tokens: Sequence[int]) -> Array:
        """Embedding rows of T token ids → [T, N]; only these rows are converted."""
        rows = self.files[EMBEDDING][tokens]
        return self._tensors.moved(rows, EMBEDDING)

    def layer(self, index: int) -> Layer:
        """A layer, read from the files now."""
        return build_layer(self.config, self._tensors, index)

    def __enter__(self) -> CheckpointSource:
        return self

    def __exit__(self, *exception: object) -> None:
        self.files.__exit__(*exception)


class _Converted(Mapping[str, Array]):
    """Tensors of files in the dtype and library of the computation, each read when it is
    looked up.
    """

    def __init__(self, files: TensorFiles, xp: Namespace, dtype: str):
        self.files = files
        self.xp = xp
        self.dtype = dtype

    def moved(self, tensor: np.ndarray, name: str) -> Array:
        """A tensor of the files, converted and on the device."""
        array: Array = self.xp.asarray(converted(tensor, self.dtype, name, self.files.file(name)))
        return array

    def __getitem__(self, name: str) -> Array:
        return self.moved(self.files[name], name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


# --- sinks ----------------------------------------------------------------------------------


class MemorySink:
    """Quantised layers in a list, in their order: a ``LayerSink``."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []

    def done(self, index: int) -> Sequence[TensorReport] | None:
        """None: nothing is kept from an earlier run."""
        return None

    def layer(self, index: int) -> Layer:
        """A layer that was put."""
        return self.layers[index]

    def put(self, index: int, layer: Layer, rows: Sequence[TensorReport]) -> None:
        """Append a layer."""
        self.layers.append(layer)


class LayerFiles:
    """The finished layers of a run in ``directory``, which is created if it does not exist: a
    ``LayerSink``.

    ``source`` supplies what a layer has besides its projections, when a resumed run asks for
    one.

    Raises
    ------
    ValueError
        if the directory holds the layers of a run with other settings, or something else.
    """

    def __init__(
        self,
        directory: Path,
        source: LayerSource,
        spec: ExportSpec,
        settings: Mapping[str, object],
    ):
        self.directory = directory
        self.source = source
        self.spec = spec
        self.redone = 0  # layers that were found but are not intact
        known = directory / SETTINGS
        if known.is_file():
            self._compare(known, settings)
        elif directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise CheckpointError(
                f"{directory} holds something else than a run's layers: choose another folder"
            )
        directory.mkdir(parents=True, exist_ok=True)
        write_atomic(known, json.dumps(settings, indent=2, sort_keys=True) + "\n")

    def _compare(self, known: Path, settings: Mapping[str, object]) -> None:
        """CheckpointError naming the settings that differ from those of the stored run."""
        try:
            stored = json.loads(known.read_text("utf-8"))
        except ValueError as error:
            raise CheckpointError(
                f"{known} is damaged: remove {self.directory} to start again"
            ) from error
        given = json.loads(json.dumps(settings))
        if stored != given:
            keys = stored.keys() | given.keys() if isinstance(stored, dict) else set()
            differing = sorted(key for key in keys if stored.get(key) != given.get(key))
            what = " and ".join(differing) or "content"
            raise CheckpointError(
                f"{self.directory} holds the layers of a run with another {what}: choose another "
                "folder, or remove it"
            )

    # as a sink

    def done(self, index: int) -> Sequence[TensorReport] | None:
        """The report on a layer whose record and tensors are intact; None otherwise."""
        tensors = self._tensors(index)
        record = self._record(index)
        if not record.is_file():
            return None
        try:
            about = json.loads(record.read_text("utf-8"))
            if about["sha256"] != file_sha256(tensors):
                raise InputError("another digest")
            return [TensorReport(**row | {"shape": tuple(row["shape"])}) for row in about["rows"]]
        except (ValueError, KeyError, TypeError, OSError):
            self.redone += 1
            return None

    def layer(self, index: int) -> Layer:
        """The quantised layer, as it computed when it was written."""
        layer = self.source.layer(index)
        norm = layer["input_layernorm"]
        with TensorFiles(self.directory, self._tensors(index).name) as files:
            stored = NetworkTensors(
                files,
                self.source.config,
                self.spec.quantization,
                namespace(norm),
                str(norm.dtype),
            )
            return layer | {
                key: stored[f"{projection_name(index, key)}.weight"]
                for key in PROJECTIONS
                if key not in self.spec.keep
            }

    def put(self, index: int, layer: Layer, rows: Sequence[TensorReport]) -> None:
        """Write a layer; it is completely on the disk when this returns."""
        read = self.spec.reader(checkpoint_names(layer, index), self.directory)
        tensors = self._tensors(index)
        with replacing(tensors) as partial:
            write_file(partial, self.plan(index), read)
            digest = file_sha256(partial)
        sync_directory(self.directory)
        about = {"sha256": digest, "rows": [dataclasses.asdict(row) for row in rows]}
        write_atomic(self._record(index), json.dumps(about) + "\n")
        sync_directory(self.directory)

    # as files

    def plan(self, index: int) -> TensorSpecs:
        """The tensors of a layer's file."""
        at = f"model.layers.{index}."
        return {
            name: spec
            for name, spec in self.spec.plan(self.source.config).items()
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
    rest: Mapping[str, Array],
    texts: Mapping[str, str],
    *,
    max_shard_bytes: int | None = None,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Write a checkpoint of the layers of a finished run and the ``rest`` of the network's
    tensors (embedding, norm, head).

    ``finish`` is called with the new directory before it gets its final name.
    """
    dtype = layers.spec.dtype
    config = layers.source.config

    def read(name: str) -> np.ndarray:
        if name.startswith("model.layers."):
            return layers.read(name)
        return converted(to_numpy(rest[name]), dtype, name, target)

    temporary = target.with_name(f".{target.name}.quantized.partial")
    shutil.rmtree(temporary, ignore_errors=True)  # of an attempt that was killed
    write_directory(
        target,
        texts,
        layers.spec.plan(config),
        read,
        max_shard_bytes=max_shard_bytes,
        temporary=temporary,
        finish=finish,
    )
