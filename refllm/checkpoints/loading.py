"""Load a checkpoint: read its tensors, build the weight tree (``sources`` finds it).

| file                   | what is read                                                     |
|------------------------|------------------------------------------------------------------|
| config.json            | the network's shape, and how its weights are quantised           |
|                        | (``quantization_files``; older writers have a file for that)     |
| model.safetensors      | the weights, in one file or in shards (``tensor_files``)         |
| tokenizer.json         | the tokenizer                                                    |
| generation_config.json | its eos ids, which take precedence over the config's             |

A GGUF file instead of a directory is read by ``checkpoints.gguf``.

Each tensor is read, checked, converted and laid out before the next one is read, so loading
needs the memory of one model and one tensor, never of two models. Quantised weights stay
quantised or are decoded one by one (``weight_storage``); only ``formats.layouts`` knows which
tensors such a weight consists of. Pickled files are never opened.

Left out: quantised embeddings, tensors that the network does not use
(rejected, except for the rotary tables of old Llama files, which are recomputed).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from refllm.backend import NUMPY, Array, Namespace, get
from refllm.checkpoints.chat_template import ChatTemplates
from refllm.checkpoints.chat_template_files import templates_beside, templates_from_directory
from refllm.checkpoints.quantization_files import read_quantization
from refllm.checkpoints.sources import is_gguf
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
from refllm.checkpoints.tokenizer import Tokenizer, read_tokenizer
from refllm.checkpoints.weight_storage import Decoded, StoredTensor, check_choice, choose
from refllm.errors import InputError
from refllm.formats import float_layouts
from refllm.formats.layouts import FLOAT, FLOAT8, Spec, WeightLayout, from_tensors, tensor_specs
from refllm.formats.quantization_config import Quantization
from refllm.model.config import ModelConfig
from refllm.model.llama import Weights, build
from refllm.model.weights import Linear

# Tensors that some writers store although they have no effect where they are zero: zero
# points of symmetric weights, biases that a family does not have
OPTIONAL = (".weight_zero_point", ".bias")
# bytes of an element of a quantised weight's tensors in memory
_ITEMSIZE = {FLOAT: 4, FLOAT8: 1, "int8": 1, "int32": 4, "int64": 8}


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: the network's shape, its weight tree, its tokenizer, its path, how
    the weights are held, in words, and its chat templates, if it has any.
    """

    config: ModelConfig
    weights: Weights
    tokenizer: Tokenizer
    path: Path
    storage: str
    chat_templates: ChatTemplates


def load(
    path: str | Path,
    *,
    backend: str | None = None,
    dtype: str = "float32",
    weights: str = "stored",
    tokenizer: str | os.PathLike[str] | None = None,
) -> Checkpoint:
    """Load a directory or a GGUF file for ``backend`` ("numpy", "cupy", None: the
    environment's) in ``dtype``; ``weights`` says what becomes of quantised weights
    (``weight_storage``), ``tokenizer`` is a folder whose tokenizer.json is read in place of
    the checkpoint's own.

    Raises
    ------
    CheckpointError
        for every kind of bad input, naming the file and what to do; for weights that do not
        fit into the free memory.
    ValueError
        for a dtype that the backend does not compute in, or another ``weights``.
    BackendUnavailable
        if CuPy is asked for and cannot run.
    """
    xp = get(backend)
    types = ["float32", "float64"]
    if xp is not NUMPY:
        types = ["float16", *types]
    if dtype not in types:
        raise InputError(
            f"load: {xp.__name__} does not compute in dtype {dtype!r}; choose one of "
            f"{', '.join(types)}"
        )
    check_choice(weights)
    if is_gguf(path):
        from refllm.checkpoints import gguf  # a directory does not need GGUF's modules

        config, tree, text, storage, templates = gguf.load(path, xp, dtype, weights, tokenizer)
        templates = templates_beside(tokenizer, templates)
        return Checkpoint(config, tree, text, Path(path), storage, templates)
    directory = _directory(path)
    config = read_config(directory)
    text = read_tokenizer(directory, config, tokenizer)
    templates = templates_beside(tokenizer, templates_from_directory(directory))
    with open_tensors(directory, config, xp, dtype) as tensors:
        chosen = choose(weights, tensors.stored(), dtype, xp, directory)
        found: Mapping[str, Any] = tensors
        if chosen.decoded:
            found = Decoded(tensors, chosen.decoded)
        tree = build(config, found)
    return Checkpoint(config, tree, text, directory, chosen.summary, templates)


# --- configuration and tokenizer ------------------------------------------------------------


def _directory(path: str | Path) -> Path:
    """The path of a directory, ~ expanded; CheckpointError if it is none."""
    directory = Path(os.path.expanduser(path))  # unlike Path's, leaves an unknown ~user as it is
    # unlike Path's, False for a name that the file system cannot hold
    if not os.path.exists(directory):
        raise CheckpointError(
            f"{directory} does not exist: pass the directory of a Hugging Face checkpoint"
        )
    if directory.is_file() and directory.suffix == ".gguf":
        raise CheckpointError(
            f"{directory} is a GGUF file: here a Hugging Face directory is needed; load, "
            "generate, chat, eval, info, simulate and convert read GGUF"
        )
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} is a file, and no GGUF file: pass the directory of a checkpoint"
        )
    return directory


def read_config(path: str | Path) -> ModelConfig:
    """The network's shape from ``config.json``, with the eos ids of
    ``generation_config.json``; CheckpointError for anything wrong with either.
    """
    directory = _directory(path)
    file = directory / "config.json"
    if not file.is_file():
        held = sorted(each.name for each in directory.glob("*.gguf"))
        what = "the directory of a Hugging Face checkpoint"
        if held:
            what = f"the path of a GGUF file in it, such as {held[0]}"
        raise CheckpointError(f"{directory} has no config.json: pass {what}")
    raw = read_json(file)
    try:
        config = ModelConfig.from_hf(raw)
    except KeyError as error:
        raise CheckpointError(f"{file}: the entry {error} is missing") from error
    # UnsupportedModel (a ValueError), or an entry of the wrong JSON type
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{file}: {error}") from error
    eos = _generation_eos(directory / "generation_config.json")
    if eos is None:
        return config
    return replace(config, eos_token_ids=eos)


def _generation_eos(file: Path) -> tuple[int, ...] | None:
    """The eos ids of a ``generation_config.json``; None if it states none."""
    if not file.is_file():
        return None
    eos = read_json(file).get("eos_token_id")
    if eos is None:
        return None
    ids = eos if isinstance(eos, list) else [eos]
    if not all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < 2**31 for i in ids):
        raise CheckpointError(
            f"{file}: eos_token_id must be a token id or a list of them, got {eos!r}"
        )
    return tuple(ids) or None


# --- tensors --------------------------------------------------------------------------------


def weight_layout(
    quantization: Quantization | None, name: str, shape: Shape, names: Container[str]
) -> WeightLayout | None:
    """The layout of the network's tensor ``name`` in files with ``names``; None for a plain
    tensor.
    """
    if quantization is None or len(shape) != 2 or name == EMBEDDING:
        return None
    return quantization.of(name.removesuffix(".weight"), names)


def stored_specs(
    config: ModelConfig, layout_of: Callable[[str, Shape], WeightLayout | None]
) -> Iterator[tuple[str, Spec]]:
    """Name, dtype and shape of each tensor in a network's files, in the order of
    ``tensor_shapes``; a quantised weight is several tensors.

    ``layout_of(name, shape)`` returns the layout of a quantised weight, None for a plain
    tensor. A dtype of ``FLOAT`` is the checkpoint's own.

    Raises
    ------
    CheckpointError
        naming a weight that its layout cannot hold.
    """
    for name, shape in tensor_shapes(config):
        layout = layout_of(name, shape)
        if layout is None:
            yield name, (FLOAT, shape)
            continue
        module = name.removesuffix("weight")
        try:
            specs = tensor_specs(layout, (shape[0], shape[1]), module[:-1])
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        yield from ((module + suffix, spec) for suffix, spec in specs.items())


class NetworkTensors(Mapping[str, Any]):
    """The tensors of a network under their plain names: arrays, and a ``Linear`` for each
    quantised weight, read, converted and moved when they are looked up.

    ``xp`` None leaves them on the host. ``dtype`` None keeps the stored type of plain
    tensors, and computes with quantised weights in float32. A look-up raises CheckpointError
    for values that are not finite, or that ``formats.layouts`` rejects.
    """

    def __init__(
        self,
        files: TensorFiles,
        config: ModelConfig,
        quantization: Quantization | None,
        xp: Namespace | None,
        dtype: str | None,
    ):
        self.files = files
        self.config = config
        self.quantization = quantization
        self.xp = xp
        self.dtype = dtype

    def check(self) -> NetworkTensors:
        """Itself, if names and shapes are the network's; CheckpointError otherwise."""
        files = self.files
        specs = stored_specs(
            self.config, lambda name, shape: weight_layout(self.quantization, name, shape, files)
        )
        wanted = ((name, shape) for name, (_, shape) in specs)
        optional = OPTIONAL if self.quantization else ()
        spare = check_tensors(self.config, files, files.directory, wanted=wanted, optional=optional)
        check_tied(self.config, files, files.directory)
        for name in spare:
            tensor = files[name] if files.dtype(name) in FLOATS else files.integers(name)
            if tensor.any():
                raise CheckpointError(
                    f"{files.file(name)}: {name!r} is not zero, and the network has no place for "
                    "it: ignoring it would change the output"
                )
        return self

    def stored(self) -> Iterator[StoredTensor]:
        """Each tensor of the network as the files store it; scales count as float32."""
        for name, shape in self._shapes.items():
            elements = math.prod(shape)
            layout = weight_layout(self.quantization, name, shape, self.files)
            if layout is None:
                yield StoredTensor(name, elements)
                continue
            more = ", activations too" if layout.activations else ""
            format = f"{layout.name} ({layout.bits} bits{more})"
            specs = tensor_specs(layout, (shape[0], shape[1]), name)
            nbytes = sum(math.prod(s) * _ITEMSIZE[kind] for kind, s in specs.values())
            yield StoredTensor(name, elements, format, nbytes, layout.activations)

    @cached_property
    def _shapes(self) -> dict[str, Shape]:
        """Name → shape of the network's tensors."""
        # not before the check: a config may claim a billion layers
        return dict(tensor_shapes(self.config))

    def __getitem__(self, name: str) -> Any:
        shape = self._shapes[name]
        layout = weight_layout(self.quantization, name, shape, self.files)
        if layout is None:
            return self._plain(name)
        return self._linear(name, layout, (shape[0], shape[1]))

    def _plain(self, name: str) -> Array:
        """A tensor that is stored as an array."""
        tensor = self.files[name]
        # converted on the host: CuPy has no bfloat16
        dtype = self.dtype or tensor.dtype.name
        return self._moved(converted(tensor, dtype, name, self.files.file(name)))

    def _moved(self, host: np.ndarray) -> Array:
        """A host array on the library's device."""
        return host if self.xp is None else self.xp.asarray(host)

    def _linear(self, name: str, layout: WeightLayout, shape: tuple[int, int]) -> Linear:
        """A quantised weight, from its several tensors."""
        module = name.removesuffix("weight")
        tensors = {}
        scale_dtype = None
        for suffix, (kind, _) in tensor_specs(layout, shape, name).items():
            full = module + suffix
            if kind == FLOAT:
                scale = self.files[full]
                scale_dtype = scale.dtype.name
                # scales are computed with in at least float32
                wide = "float64" if self.dtype == "float64" else "float32"
                host = converted(scale, wide, full, self.files.file(full))
            else:
                host = self.files.integers(full, kind)
                if kind == FLOAT8:  # as codes: neither library computes with the type
                    host = host.view("uint8")
            tensors[suffix] = self._moved(host)
        dtype = self.dtype or "float32"
        try:
            if layout.is_float:
                return float_layouts.from_tensors(
                    tensors, layout, shape, dtype=dtype, name=module[:-1]
                )
            return from_tensors(
                tensors, layout, shape, scale_dtype=scale_dtype, dtype=dtype, name=module[:-1]
            )
        except ValueError as error:
            raise CheckpointError(f"{self.files.directory}: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


@contextmanager
def open_tensors(
    directory: Path, config: ModelConfig, xp: Namespace | None = None, dtype: str | None = None
) -> Iterator[NetworkTensors]:
    """The checked tensors of a directory while its files are open, see ``NetworkTensors``."""
    with TensorFiles(directory) as files:
        yield NetworkTensors(files, config, read_quantization(directory), xp, dtype).check()


def iter_tensors(path: str | Path, dtype: str | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """(name, host array) of every tensor of a network, layer by layer, one in memory at a time.

    ``dtype`` None keeps the stored type (bfloat16 is ml_dtypes'). Quantised weights are
    dequantised, to float32 then.
    """
    directory = _directory(path)
    with open_tensors(directory, read_config(directory), dtype=dtype) as tensors:
        for name in tensors:
            yield name, _floats(tensors[name])


def read_tensor(path: str | Path, name: str, dtype: str | None = None) -> np.ndarray:
    """One tensor of a checkpoint directory by its Hugging Face name, as ``iter_tensors``
    gives it; CheckpointError if there is none.
    """
    directory = _directory(path)
    with open_tensors(directory, read_config(directory), dtype=dtype) as tensors:
        if name not in tensors:
            raise CheckpointError(f"{directory} holds no tensor {name!r}")
        return _floats(tensors[name])


def build_weights(config: ModelConfig, tensors: Mapping[str, Array]) -> Weights:
    """``llama.build`` after a check of names and shapes; CheckpointError says which tensor
    is wrong.
    """
    check_tensors(config, tensors, Path("tensors"))
    return build(config, tensors)


def _floats(tensor: Any) -> np.ndarray:
    """A host array as it is; a ``Linear`` dequantised."""
    if hasattr(tensor, "dequantize"):
        tensor = tensor.dequantize()
    return np.asarray(tensor)
