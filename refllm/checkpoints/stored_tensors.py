"""The tensors of a checkpoint as its network needs them, whether they are stored plainly or quantised.

| name           | what                                                                                              |
|----------------|---------------------------------------------------------------------------------------------------|
| read           | the ``quantization_config`` of a checkpoint's config.json; None for a plain one                   |
| stored_specs   | each tensor in the files, the several tensors of a quantised weight included                       |
| NetworkTensors | by their plain names: arrays, and for quantised weights a ``Linear``, each read when asked for     |

Which tensors a quantised weight has, and what they hold, is known to ``formats.layouts`` alone.

Left out: quantised embeddings. Writing is ``quant.export``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from refllm.backend import Array
from refllm.checkpoints.tensor_files import (
    EMBEDDING,
    FLOATS,
    CheckpointError,
    Shape,
    TensorFiles,
    check_tensors,
    check_tied,
    converted,
    read_json,
    tensor_shapes,
)
from refllm.formats import float_layouts
from refllm.formats.layouts import from_tensors
from refllm.formats.quantization_config import Quantization, UnsupportedQuantization, parse
from refllm.formats.stored import FLOAT, FLOAT8, Spec, Stored, tensor_specs
from refllm.model.config import ModelConfig

# Written by some, of no effect when zero: zero points of symmetric weights, biases that a family does not have
OPTIONAL = (".weight_zero_point", ".bias")


def read(directory: Path) -> Quantization | None:
    """How the weights of a checkpoint are stored; CheckpointError for what is not read, None for plain weights."""
    file = directory / "config.json"
    raw = read_json(file).get("quantization_config")
    if raw is None:
        return None
    try:
        return parse(raw)
    except UnsupportedQuantization as error:
        raise CheckpointError(f"{file}: {error}") from error


def stored_as(quantization: Quantization | None, name: str, shape: Shape, names: Container[str]) -> Stored | None:
    """How the tensor ``name`` of a network is stored in files with ``names``; None: as it is."""
    if quantization is None or len(shape) != 2 or name == EMBEDDING:
        return None
    return quantization.of(name.removesuffix(".weight"), names)


def stored_specs(config: ModelConfig, stored: Callable[[str, Shape], Stored | None]) -> Iterator[tuple[str, Spec]]:
    """Name, dtype and shape of each tensor in the files of a network, in the order of ``tensor_shapes``.

    ``stored`` says of each tensor how it is stored. A dtype of ``FLOAT`` is the checkpoint's own.

    Raises
    ------
    CheckpointError
        naming a weight that its layout has no place for.
    """
    for name, shape in tensor_shapes(config):
        how = stored(name, shape)
        if how is None:
            yield name, (FLOAT, shape)
            continue
        module = name.removesuffix("weight")
        try:
            specs = tensor_specs(how, (shape[0], shape[1]), module[:-1])
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        yield from ((module + suffix, spec) for suffix, spec in specs.items())


class NetworkTensors(Mapping[str, Any]):
    """The tensors of a network by their plain names, each read, converted and moved at the moment of the look-up.

    ``xp`` None leaves them on the host. ``dtype`` None keeps the stored type of plain tensors, and gives quantised
    weights in float32. A look-up raises CheckpointError for what ``formats.layouts`` does not read.
    """

    def __init__(
        self, files: TensorFiles, config: ModelConfig, quantization: Quantization | None, xp: Any, dtype: str | None
    ):
        self.files, self.config, self.quantization, self.xp, self.dtype = files, config, quantization, xp, dtype

    def check(self) -> NetworkTensors:
        """Itself, if names and shapes are the network's; CheckpointError says what is not."""
        files, where = self.files, self.files.directory
        specs = stored_specs(self.config, lambda name, shape: stored_as(self.quantization, name, shape, files))
        wanted = ((name, shape) for name, (_, shape) in specs)
        spare = check_tensors(self.config, files, where, wanted=wanted, spare=OPTIONAL if self.quantization else ())
        check_tied(self.config, files, where)
        for name in spare:
            if (files[name] if files.dtype(name) in FLOATS else files.integers(name)).any():
                raise CheckpointError(f"{files.file(name)}: {name!r} is not zero, and the network has no place for it: "
                                      "ignoring it would change the output")  # fmt: skip
        return self

    @cached_property
    def _shapes(self) -> dict[str, Shape]:
        return dict(tensor_shapes(self.config))  # not before the check: a config may claim a billion layers

    def __getitem__(self, name: str) -> Any:
        shape = self._shapes[name]
        stored = stored_as(self.quantization, name, shape, self.files)
        return self._plain(name) if stored is None else self._linear(name, stored, (shape[0], shape[1]))

    def _plain(self, name: str) -> Array:
        tensor = self.files[name]
        # converted on the host: CuPy has no bfloat16
        return self._moved(converted(tensor, self.dtype or tensor.dtype.name, name, self.files.file(name)))

    def _moved(self, host: np.ndarray) -> Array:
        return host if self.xp is None else self.xp.asarray(host)

    def _linear(self, name: str, stored: Stored, shape: tuple[int, int]) -> Any:
        module, tensors, scale_dtype = name.removesuffix("weight"), {}, None
        for suffix, (kind, _) in tensor_specs(stored, shape, name).items():
            full = module + suffix
            if kind == FLOAT:
                scale = self.files[full]
                scale_dtype = scale.dtype.name
                wide = "float64" if self.dtype == "float64" else "float32"  # computed with, until they are stored
                host = converted(scale, wide, full, self.files.file(full))
            else:
                host = self.files.integers(full, kind)
                host = host.view("uint8") if kind == FLOAT8 else host  # codes: neither library computes with the type
            tensors[suffix] = self._moved(host)
        try:
            if stored.floats:
                return float_layouts.from_tensors(
                    tensors, stored, shape, dtype=self.dtype or "float32", name=module[:-1]
                )
            return from_tensors(
                tensors, stored, shape, scale_dtype=scale_dtype, dtype=self.dtype or "float32", name=module[:-1]
            )
        except ValueError as error:
            raise CheckpointError(f"{self.files.directory}: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)
