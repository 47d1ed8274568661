"""Quantised layers on disk, one file a layer, so that a killed run goes on where it was: a
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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from refllm.backend import namespace, to_numpy
from refllm.checkpoints.atomic import file_sha256, flush, write_whole
from refllm.checkpoints.directory_writer import Plan, write_directory, write_file
from refllm.checkpoints.loading import NetworkTensors
from refllm.checkpoints.tensor_files import CheckpointError, TensorFiles, converted
from refllm.model.llama import PROJECTIONS, Layer
from refllm.quant.export import Storing, named
from refllm.quant.layer_inputs import Source
from refllm.quant.report import TensorReport

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
