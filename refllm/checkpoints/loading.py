"""The tensors of a checkpoint as its network needs them, whether they are stored plainly or
quantised.

| name           | what                                                                                              |
|----------------|---------------------------------------------------------------------------------------------------|
| read           | the ``quantization_config`` of a checkpoint's config.json; None for a plain one                   |
| stored_specs   | each tensor in the files, the several tensors of a quantised weight included                       |
| NetworkTensors | by their plain names: arrays, and for quantised weights a ``Linear``, each read when asked for     |

Which tensors a quantised weight has, and what they hold, is known to ``formats.layouts``
alone.

Left out: quantised embeddings. Writing is ``quant.export``'s.

<<MERGED>> Checkpoints: a Hugging Face directory read into a weight tree, and written so
that transformers loads it.

Reading is here, in ``shards`` (the tensors' files) and ``quantized`` (weights of several
tensors); writing is in ``writer``.

| file                   | read                                     | written                                   |
|------------------------|------------------------------------------|-------------------------------------------|
| config.json            | ``ModelConfig.from_hf``, and its         | ``to_hf`` and the stored type             |
|                        | ``quantization_config``                  |                                           |
| model.safetensors      | or shards with an index (``shards``)     | one file, or shards of a given size       |
| tokenizer.json         | ``Tokenizer.from_file``                  | as the tokenizers library saves it        |
| generation_config.json | its end-of-text ids win over the config's| end and beginning of text                 |
| tokenizer_config.json  | not read                                 | the class and special tokens              |

Every tensor is read, checked, converted and laid out before the next one is read, so
loading needs one model of memory and one tensor, never two models. Weights are never
unpickled.

Quantised weights stay quantised: they multiply in the form in which they are stored.

Left out: chat templates, downloading, tensors that the network does not use (refused,
but for the rotary tables of old Llama files, which are recomputed).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from refllm.backend import Array, get
from refllm.checkpoints.tensor_files import (
    EMBEDDING,
    FLOATS,
    CheckpointError,
    Shape,
    TensorFiles,
    check_tensors,
    check_tied,
    check_vocabulary,
    converted,
    read_json,
    tensor_shapes,
)
from refllm.checkpoints.tokenizer import Tokenizer
from refllm.formats import float_layouts
from refllm.formats.layouts import FLOAT, FLOAT8, Spec, WeightLayout, from_tensors, tensor_specs
from refllm.formats.quantization_config import Quantization, UnsupportedQuantization, parse
from refllm.model.config import ModelConfig
from refllm.model.llama import Weights, build

# Written by some, of no effect when zero: zero points of symmetric weights, biases that a
# family does not have
OPTIONAL = (".weight_zero_point", ".bias")
BUNDLED = Path(__file__).parent.parent / "models"  # the models that come with the package


def bundled() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(p.parent.name for p in BUNDLED.glob("*/config.json"))


def locate(path_or_name: str | os.PathLike[str]) -> Path:
    """The directory of a bundled model, or the path itself; CheckpointError if it is
    neither.
    """
    if isinstance(path_or_name, str) and path_or_name in bundled():
        return BUNDLED / path_or_name
    path = Path(os.path.expanduser(path_or_name))  # unlike Path's, leaves an unknown ~user as it is
    if not os.path.exists(path):  # unlike Path's, False for a name that the file system cannot hold
        names = ", ".join(bundled()) or "none is installed"
        raise CheckpointError(
            f"{os.fspath(path_or_name)!r} is neither a folder nor a bundled model ({names})"
        )
    return path


def is_gguf(path: str | Path) -> bool:
    """Whether a path names a file that calls itself GGUF, by its suffix or by its first
    bytes.
    """
    path = Path(os.path.expanduser(path))  # unlike Path's, leaves an unknown ~user as it is
    try:
        if not path.is_file():
            return False
    except OSError:  # a name that the file system cannot hold
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF" or path.suffix == ".gguf"


def read(directory: Path) -> Quantization | None:
    """How the weights of a checkpoint are stored; CheckpointError for what is not read,
    None for plain weights.
    """
    file = directory / "config.json"
    raw = read_json(file).get("quantization_config")
    if raw is None:
        return None
    try:
        return parse(raw)
    except UnsupportedQuantization as error:
        raise CheckpointError(f"{file}: {error}") from error


def layout_for(
    quantization: Quantization | None, name: str, shape: Shape, names: Container[str]
) -> WeightLayout | None:
    """How the tensor ``name`` of a network is stored in files with ``names``; None: as it
    is.
    """
    if quantization is None or len(shape) != 2 or name == EMBEDDING:
        return None
    return quantization.of(name.removesuffix(".weight"), names)


def stored_specs(
    config: ModelConfig, stored: Callable[[str, Shape], WeightLayout | None]
) -> Iterator[tuple[str, Spec]]:
    """Name, dtype and shape of each tensor in the files of a network, in the order of
    ``tensor_shapes``.

    ``stored`` says of each tensor how it is stored. A dtype of ``FLOAT`` is the
    checkpoint's own.

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
    """The tensors of a network by their plain names, each read, converted and moved at the
    moment of the look-up.

    ``xp`` None leaves them on the host. ``dtype`` None keeps the stored type of plain
    tensors, and gives quantised weights in float32. A look-up raises CheckpointError for
    what ``formats.layouts`` does not read.
    """

    def __init__(
        self,
        files: TensorFiles,
        config: ModelConfig,
        quantization: Quantization | None,
        xp: Any,
        dtype: str | None,
    ):
        self.files = files
        self.config = config
        self.quantization = quantization
        self.xp = xp
        self.dtype = dtype

    def check(self) -> NetworkTensors:
        """Itself, if names and shapes are the network's; CheckpointError says what is not."""
        files = self.files
        where = self.files.directory
        specs = stored_specs(
            self.config, lambda name, shape: layout_for(self.quantization, name, shape, files)
        )
        wanted = ((name, shape) for name, (_, shape) in specs)
        spare = check_tensors(
            self.config, files, where, wanted=wanted, spare=OPTIONAL if self.quantization else ()
        )
        check_tied(self.config, files, where)
        for name in spare:
            if (files[name] if files.dtype(name) in FLOATS else files.integers(name)).any():
                raise CheckpointError(
                    f"{files.file(name)}: {name!r} is not zero, and the network has no place for it: "
                    "ignoring it would change the output"
                )
        return self

    @cached_property
    def _shapes(self) -> dict[str, Shape]:
        # not before the check: a config may claim a billion layers
        return dict(tensor_shapes(self.config))

    def __getitem__(self, name: str) -> Any:
        shape = self._shapes[name]
        stored = layout_for(self.quantization, name, shape, self.files)
        if stored is None:
            return self._plain(name)
        return self._linear(name, stored, (shape[0], shape[1]))

    def _plain(self, name: str) -> Array:
        tensor = self.files[name]
        # converted on the host: CuPy has no bfloat16
        return self._moved(
            converted(tensor, self.dtype or tensor.dtype.name, name, self.files.file(name))
        )

    def _moved(self, host: np.ndarray) -> Array:
        return host if self.xp is None else self.xp.asarray(host)

    def _linear(self, name: str, stored: WeightLayout, shape: tuple[int, int]) -> Any:
        module = name.removesuffix("weight")
        tensors = {}
        scale_dtype = None
        for suffix, (kind, _) in tensor_specs(stored, shape, name).items():
            full = module + suffix
            if kind == FLOAT:
                scale = self.files[full]
                scale_dtype = scale.dtype.name
                # computed with, until they are stored
                wide = "float64" if self.dtype == "float64" else "float32"
                host = converted(scale, wide, full, self.files.file(full))
            else:
                host = self.files.integers(full, kind)
                # codes: neither library computes with the type
                host = host.view("uint8") if kind == FLOAT8 else host
            tensors[suffix] = self._moved(host)
        try:
            if stored.is_float:
                return float_layouts.from_tensors(
                    tensors, stored, shape, dtype=self.dtype or "float32", name=module[:-1]
                )
            return from_tensors(
                tensors,
                stored,
                shape,
                scale_dtype=scale_dtype,
                dtype=self.dtype or "float32",
                name=module[:-1],
            )
        except ValueError as error:
            raise CheckpointError(f"{self.files.directory}: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


@dataclass(frozen=True)
class Checkpoint:
    """What the lower floors pass around: the network's shape, its weight tree, its
    tokenizer, its origin.
    """

    config: ModelConfig
    weights: Weights
    tokenizer: Tokenizer
    path: Path


def load(path: str | Path, *, backend: str | None = None, dtype: str = "float32") -> Checkpoint:
    """Load a directory or a GGUF file for ``backend`` ("numpy", "cupy", None: the
    environment's) in ``dtype``.

    Raises
    ------
    CheckpointError
        for every kind of bad input, naming the file and what to do.
    ValueError
        for a dtype that the backend does not compute in.
    BackendUnavailable
        if CuPy is asked for and cannot run.
    """
    xp = get(backend)
    types = ("float32", "float64") if xp is np else ("float16", "float32", "float64")
    if dtype not in types:
        raise ValueError(
            f"load: dtype {dtype!r} is not computed in on {xp.__name__}; choose one of {', '.join(types)}"
        )
    if is_gguf(path):
        from refllm.checkpoints import gguf  # only where there is such a file

        return Checkpoint(*gguf.load(path, xp, dtype), Path(path))
    directory = _directory(path)
    config = read_config(directory)
    tokenizer = read_tokenizer(directory, config)
    with TensorFiles(directory) as files:
        weights = build(config, NetworkTensors(files, config, read(directory), xp, dtype).check())
    return Checkpoint(config, weights, tokenizer, directory)


def read_config(path: str | Path) -> ModelConfig:
    """The network's shape from ``config.json``, with the end-of-text ids of
    ``generation_config.json``.
    """
    directory = _directory(path)
    file = directory / "config.json"
    if not file.is_file():
        raise CheckpointError(
            f"{directory} has no config.json: pass the directory of a Hugging Face checkpoint"
        )
    raw = read_json(file)
    try:
        config = ModelConfig.from_hf(raw)
    except KeyError as error:
        raise CheckpointError(f"{file}: the entry {error} is missing") from error
    except (
        ValueError,
        TypeError,
        AttributeError,
        OverflowError,
    ) as error:  # UnsupportedModel, or a wrong JSON type
        raise CheckpointError(f"{file}: {error}") from error
    eos = _generation_eos(directory / "generation_config.json")
    if eos is None:
        return config
    return replace(config, eos_token_ids=eos)


def build_weights(config: ModelConfig, tensors: Mapping[str, Array]) -> Weights:
    """``llama.build`` after a check of names and shapes; CheckpointError says which tensor
    is wrong.
    """
    check_tensors(config, tensors, Path("tensors"))
    return build(config, tensors)


def iter_tensors(path: str | Path, dtype: str | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """(name, host array) of every tensor of a network, layer by layer, one in memory at a
    time.

    ``dtype`` None keeps the stored type (bfloat16 is ml_dtypes'); what is stored quantised
    comes as the floats that it stands for, float32 then.
    """
    directory = _directory(path)
    config = read_config(directory)
    with TensorFiles(directory) as files:
        tensors = NetworkTensors(files, config, read(directory), None, dtype).check()
        for name in tensors:
            yield name, _floats(tensors[name])


def read_tensor(path: str | Path, name: str, dtype: str | None = None) -> np.ndarray:
    """One tensor of a checkpoint directory by its Hugging Face name, as ``iter_tensors``
    gives it.
    """
    directory = _directory(path)
    config = read_config(directory)
    with TensorFiles(directory) as files:
        tensors = NetworkTensors(files, config, read(directory), None, dtype).check()
        if name not in tensors:
            raise CheckpointError(f"{directory} holds no tensor {name!r}")
        return _floats(tensors[name])


def _floats(tensor: Any) -> np.ndarray:
    floats: np.ndarray = tensor.dequantize() if hasattr(tensor, "dequantize") else tensor
    return floats


def _directory(path: str | Path) -> Path:
    directory = Path(os.path.expanduser(path))  # unlike Path's, leaves an unknown ~user as it is
    # unlike Path's, False for a name that the file system cannot hold
    if not os.path.exists(directory):
        raise CheckpointError(
            f"{directory} does not exist: pass the directory of a Hugging Face checkpoint"
        )
    if directory.is_file() and directory.suffix == ".gguf":
        raise CheckpointError(
            f"{directory} is a GGUF file: here a Hugging Face directory is needed; load, generate, eval and convert "
            "read GGUF"
        )
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} is a file: pass the directory that holds it and config.json"
        )
    return directory


def _generation_eos(file: Path) -> tuple[int, ...] | None:
    if not file.is_file():
        return None
    eos = read_json(file).get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**31 for i in ids):
        raise CheckpointError(
            f"{file}: eos_token_id must be a token id or a list of them, got {eos!r}"
        )
    return tuple(ids) or None


def read_tokenizer(directory: Path, config: ModelConfig) -> Tokenizer:
    """The tokenizer of a directory; CheckpointError if it is broken, or has ids beyond the
    model's vocabulary.
    """
    try:
        tokenizer = Tokenizer.from_file(directory / "tokenizer.json")
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    check_vocabulary(tokenizer, config, directory / "tokenizer.json")
    return tokenizer
