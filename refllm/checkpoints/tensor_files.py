"""Reading safetensors: a checkpoint's tensors in one file or in shards, each read on demand,
and what a network requires of them.

Format: eight bytes of header length (little-endian), a JSON header
``{name: {dtype, shape, data_offsets}}`` padded with spaces to a multiple of eight, then the
tensors' bytes without gaps. Nothing in it can run code; files that hold pickles are never
opened. A sharded checkpoint adds ``model.safetensors.index.json``, whose ``weight_map`` names the
shard of each tensor.

| name          | meaning                                                              |
|---------------|----------------------------------------------------------------------|
| TensorFiles   | the tensors of a directory, each read when it is looked up           |
| converted     | a tensor in another float type, rejected if a value is not finite    |
| tensor_shapes | name and shape of every tensor that a network needs                  |
| check_…       | compare the tensors that are there with those that the network needs |

Left out: 8-bit floats other than E4M3, big-endian hosts. ``loading`` puts quantised weights
together; ``writer`` writes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import ml_dtypes  # also teaches safetensors' NumPy reader the bfloat16 type
import numpy as np
from safetensors import SafetensorError, safe_open

from refllm.array_types import Json
from refllm.backend import Array, to_numpy
from refllm.errors import InputError
from refllm.model.config import ModelConfig

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# names of the types in safetensors → in NumPy
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# the same, for the codes of quantised weights
INTEGERS = {"I64": "int64", "I32": "int32", "I8": "int8", "F8_E4M3": "float8_e4m3fn"}
# Files in which older writers describe quantised weights → the method that they imply. The
# weights of such directories lie in a file of any name
QUANTIZATION_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

# Names of tensors of a mixture of experts, in Hugging Face's files and in GGUF's
_EXPERT = re.compile(r"\.experts\.|\.block_sparse_moe\.|_exps\.|\.ffn_gate_inp\.|\.ffn_\w+\.\d+\.")

Shape = tuple[int, ...]


class CheckpointError(InputError):
    """A checkpoint cannot be read or written; the message names the file and says what to do."""


def host_dtype(name: str) -> np.dtype:
    """The NumPy type called ``name``; ``"bfloat16"`` is ml_dtypes', since NumPy has none."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def read_json(path: Path) -> Json:
    """The object in a JSON file; CheckpointError if there is none."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, endless nesting
        raise CheckpointError(
            f"{path} is not valid JSON ({error}): download the file again"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(
            f"{path} holds a JSON {type(raw).__name__}, not an object: is it another file?"
        )
    return raw


class TensorFiles(Mapping[str, np.ndarray]):
    """The tensors of a checkpoint directory by name; ``files[name]`` reads one, in its stored type.

    Opening reads the headers only: ``shape`` and ``dtype`` cost nothing, and memory holds
    only what the caller keeps. It is a context manager, since the files stay open.

    Raises
    ------
    CheckpointError
        for missing, truncated or unsafe files.
    """

    def __init__(self, directory: str | Path, file: str = SINGLE):
        self.directory = Path(directory)
        self._shards: dict[Path, Any] = {}
        self._where: dict[str, Path] = {}
        single = self.directory / file
        index = self.directory / INDEX
        if not (file != SINGLE or single.is_file() or index.is_file()):
            single, index = _by_older_writers(self.directory, single, index)
        if single.is_file():
            self._where = dict.fromkeys(self._open(single).keys(), single)
        elif index.is_file():
            self._open_shards(index)
        else:
            raise CheckpointError(_no_weights(self.directory))

    def _open_shards(self, index: Path) -> None:
        """Open the shards that an index names, and check that both agree."""
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(v, str) for v in weight_map.values()
        ):
            raise CheckpointError(
                f"{index} has no 'weight_map' from tensor names to file names: download it again"
            )
        paths = {
            file: _inside(self.directory, file, index)
            for file in dict.fromkeys(weight_map.values())
        }
        held = {file: set(self._open(path).keys()) for file, path in paths.items()}
        for name, file in weight_map.items():
            if name not in held[file]:
                raise CheckpointError(
                    f"{paths[file]} does not hold {name!r}, which {index} says it does: "
                    "index and shards belong to different checkpoints"
                )
            self._where[name] = paths[file]
        # two shards may hold the same name; the index says which one is meant
        for file, names in held.items():
            if twice := [name for name in sorted(names) if weight_map.get(name, file) != file]:
                raise CheckpointError(
                    f"{paths[file]} holds {twice[0]!r}, which {index} puts into another shard: "
                    "index and shards belong to different checkpoints"
                )

    def _open(self, path: Path) -> Any:
        """safetensors' handle of a file (its stubs have no types)."""
        try:
            self._shards[path] = safe_open(path, framework="numpy")
        except (SafetensorError, OSError) as error:
            if not os.access(path, os.R_OK):  # the library reports a missing file then
                raise CheckpointError(f"{path} cannot be read: permission denied") from error
            raise CheckpointError(
                f"{path} is truncated or no safetensors file ({error}): download or write it again"
            ) from error
        return self._shards[path]

    def __getitem__(self, name: str) -> np.ndarray:
        if self.dtype(name) not in FLOATS:
            raise CheckpointError(
                f"{self._where[name]}: {name!r} is stored as {self.dtype(name)}; supported are "
                f"{', '.join(sorted(FLOATS))}. A quantised checkpoint says so in config.json's "
                "quantization_config"
            )
        return self.raw(name)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of a floating-point matrix, in its stored type; nothing else is
        read. A vector is returned complete.
        """
        if self.dtype(name) not in FLOATS or len(self.shape(name)) == 1:
            return self[name]
        part: np.ndarray = self._shards[self._where[name]].get_slice(name)[start:stop]
        return part

    def integers(self, name: str, dtype: str | None = None) -> np.ndarray:
        """A tensor of integers, or of 8-bit floats, which ``__getitem__`` rejects.

        ``dtype``, if given, is the type of the result: narrower integers are widened.

        Raises
        ------
        CheckpointError
            if it holds anything else.
        """
        kind = INTEGERS.get(self.dtype(name))
        if kind is None or not (kind == (dtype or kind) or _widens(kind, str(dtype))):
            raise CheckpointError(
                f"{self._where[name]}: {name!r} is stored as {self.dtype(name)}, not as "
                f"{dtype or 'integers'}: the file is damaged, or has another layout"
            )
        return self.raw(name).astype(dtype or kind, copy=False)

    def raw(self, name: str) -> np.ndarray:
        """A tensor in its stored type: any that NumPy has, or 8-bit floats."""
        if self.dtype(name) == "F8_E4M3":  # safetensors' NumPy reader has no such type (0.8)
            return self._bytes(name).view(host_dtype("float8_e4m3fn")).reshape(self.shape(name))
        tensor: np.ndarray = self._shards[self._where[name]].get_tensor(name)
        return tensor

    def _bytes(self, name: str) -> np.ndarray:
        """A tensor's bytes, at the offsets in the header (checked when the file was opened)."""
        with self._where[name].open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            begin, end = json.loads(file.read(length))[name]["data_offsets"]
            file.seek(8 + length + begin)
            return np.frombuffer(file.read(end - begin), dtype=np.uint8)

    def __contains__(self, name: object) -> bool:
        return name in self._where  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._where[name]

    def shape(self, name: str) -> Shape:
        """A tensor's shape, from the header."""
        return tuple(self._shards[self._where[name]].get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """A tensor's type as safetensors writes it: ``"F32"``, ``"F16"``, ``"BF16"`` …"""
        return str(self._shards[self._where[name]].get_slice(name).get_dtype())

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *exception: object) -> None:
        self._shards.clear()  # drops the last references, which unmaps the files


def _widens(kind: str, dtype: str) -> bool:
    """Whether every value of the integer type ``kind`` is a value of ``dtype``; False for
    8-bit floats.
    """
    return "float8_e4m3fn" not in (kind, dtype) and bool(np.can_cast(kind, dtype))


def converted(tensor: np.ndarray, dtype: str, name: str, where: Path) -> np.ndarray:
    """``tensor`` as a contiguous array of ``dtype``; CheckpointError if a value is, or
    becomes, NaN or ±∞.
    """
    if dtype not in FLOATS.values():
        raise InputError(f"weights are one of {', '.join(FLOATS.values())}, not {dtype!r}")
    if tensor.dtype.name not in FLOATS.values():
        raise CheckpointError(
            f"{where}: {name!r} has type {tensor.dtype}; weights are one of "
            f"{', '.join(FLOATS.values())}"
        )
    with np.errstate(over="ignore", invalid="ignore"):  # both are checked below
        out = np.ascontiguousarray(tensor.astype(host_dtype(dtype), copy=False))
        out = out.reshape(tensor.shape)  # a 0-d tensor stays 0-d
        if np.isfinite(out).all():
            return out
        bad = ~np.isfinite(tensor)
    if bad.any():
        first = tuple(int(i) for i in np.unravel_index(int(bad.argmax()), tensor.shape))
        raise CheckpointError(
            f"{where}: {name!r} holds {int(bad.sum())} values that are NaN or infinite, the first "
            f"at {first}: the weights are damaged, or their training diverged"
        )
    limit = float(ml_dtypes.finfo(host_dtype(dtype)).max)
    wider = {"float16": "float32 or bfloat16", "bfloat16": "float32", "float32": "float64"}
    raise CheckpointError(
        f"{where}: {name!r} holds {float(np.abs(tensor).max()):.6g}, beyond the largest {dtype}, "
        f"{limit:g}: choose {wider[dtype]}"
    )


def tensor_shapes(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    """Name and shape of each stored tensor, in the order in which the network uses them.

    A generator, so that a config that claims a billion layers fails at the first missing one.

    >>> config = ModelConfig("llama", 300, 8, 12, 1, 4, 2, 2, tie_word_embeddings=True)
    >>> [shape for name, shape in tensor_shapes(config) if "proj" in name]  # q k v o gate up down
    [(8, 8), (4, 8), (4, 8), (8, 8), (12, 8), (12, 8), (8, 12)]
    """
    n = config.hidden_size
    d = config.head_dim
    f = config.intermediate_size
    wide = config.num_attention_heads * d
    narrow = config.num_key_value_heads * d
    yield EMBEDDING, (config.vocab_size, n)
    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}."
        yield prefix + "input_layernorm.weight", (n,)
        for letter, rows in (("q", wide), ("k", narrow), ("v", narrow)):
            yield f"{prefix}self_attn.{letter}_proj.weight", (rows, n)
            if config.attention_bias:
                yield f"{prefix}self_attn.{letter}_proj.bias", (rows,)
        if config.qk_norm:
            yield prefix + "self_attn.q_norm.weight", (d,)
            yield prefix + "self_attn.k_norm.weight", (d,)
        yield prefix + "self_attn.o_proj.weight", (n, wide)
        yield prefix + "post_attention_layernorm.weight", (n,)
        yield prefix + "mlp.gate_proj.weight", (f, n)
        yield prefix + "mlp.up_proj.weight", (f, n)
        yield prefix + "mlp.down_proj.weight", (n, f)
    yield "model.norm.weight", (n,)
    if not config.tie_word_embeddings:
        yield HEAD, (config.vocab_size, n)


def shapes_of(tensors: Mapping[str, Array]) -> dict[str, Shape]:
    """Name → shape, for ``TensorFiles`` without reading a tensor."""
    if isinstance(tensors, TensorFiles):
        return {name: tensors.shape(name) for name in tensors}
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_tensors(
    config: ModelConfig,
    tensors: Mapping[str, Array],
    where: Path,
    *,
    wanted: Iterable[tuple[str, Shape]] | None = None,
    optional: tuple[str, ...] = (),
    described_by: str = "config.json",
    spelled: Callable[[str], str] = str,
) -> list[str]:
    """CheckpointError if a tensor that the network needs is missing or has another shape, or
    one is left over that it does not use.

    ``wanted`` replaces ``tensor_shapes(config)``, for files that store some weights as
    several tensors. Names that end with one of ``optional`` may be left over, and are
    returned. For the sentence: ``described_by`` is where the config comes from, ``spelled``
    gives the file's own name of a tensor.
    """
    shapes = shapes_of(tensors)
    if wanted is None:
        wanted = tensor_shapes(config)
    needed = set()
    expert = next((n for n in shapes if _EXPERT.search(n)), None)
    if expert is not None:
        raise CheckpointError(
            f"{where}: {spelled(expert)!r} belongs to a mixture of experts: experts are not "
            "computed here"
        )
    for name, shape in wanted:
        if name == HEAD and HEAD not in shapes:
            raise CheckpointError(
                f"{where}: the tensor {HEAD!r} is missing: if the head is the embedding, set "
                "tie_word_embeddings to true in config.json; otherwise download it again"
            )
        if name not in shapes:
            raise CheckpointError(
                f"{where}: the tensor {spelled(name)!r} is missing, which a {config.family} of "
                f"{config.num_hidden_layers} layers needs: compare it with {described_by}"
            )
        if shapes[name] != shape:
            raise CheckpointError(
                f"{where}: {spelled(name)!r} has shape {shapes[name]}, but {described_by} says "
                f"{shape}: they belong to different checkpoints"
            )
        needed.add(name)
    if config.tie_word_embeddings:
        needed.add(HEAD)
    left = [
        name for name in shapes if name not in needed and not name.endswith("rotary_emb.inv_freq")
    ]
    if unknown := [name for name in left if not name.endswith(optional)]:
        raise CheckpointError(
            f"{where}: no {config.family} network as {described_by} describes it has the tensor "
            f"{spelled(unknown[0])!r}{_and_more(len(unknown) - 1)}: to ignore it would change the "
            "output"
        )
    return left


def _and_more(count: int) -> str:
    """How many there are besides.

    >>> _and_more(0), _and_more(2)
    ('', ' and 2 more')
    """
    return f" and {count} more" if count else ""


def check_tied(config: ModelConfig, tensors: Mapping[str, Array], where: Path) -> None:
    """CheckpointError if a file stores a tied head that differs from the embedding."""
    if not config.tie_word_embeddings or HEAD not in tensors:
        return
    if not np.array_equal(to_numpy(tensors[HEAD]), to_numpy(tensors[EMBEDDING])):
        raise CheckpointError(
            f"{where}: {HEAD} differs from {EMBEDDING}, though config.json says that they are "
            "tied: set tie_word_embeddings to false"
        )


def _inside(directory: Path, name: str, index: Path) -> Path:
    """The path of a shard; CheckpointError if it leaves the directory, since an index comes
    from others and is not trusted.
    """
    for kind in (PurePosixPath(name), PureWindowsPath(name)):
        if kind.anchor or ".." in kind.parts:
            raise CheckpointError(
                f"{index} names the shard {name!r}, which points outside {directory}: rejected"
            )
    path = directory / name
    # unlike Path.is_file, False for a name that the file system cannot hold
    if not os.path.isfile(path):
        raise CheckpointError(
            f"{path} is missing, though {index.name} names it: download that shard"
        )
    home = directory.resolve()
    real = path.resolve()
    roots = [home]
    # Hugging Face's download cache links each file to ../../blobs/<hash>
    if home.parent.name == "snapshots":
        roots.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(root) for root in roots):
        raise CheckpointError(
            f"{path} is a link to {real}, outside {directory}: rejected; copy the file instead"
        )
    return path


def _by_older_writers(directory: Path, single: Path, index: Path) -> tuple[Path, Path]:
    """(file, index) of a directory of AutoGPTQ or AutoAWQ: what is the only one of its kind
    there; as given for another directory.
    """
    if not any((directory / name).is_file() for name in QUANTIZATION_FILES):
        return single, index
    files = list(directory.glob("*.safetensors"))
    indices = list(directory.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        return single, indices[0]
    if len(files) == 1:
        return files[0], index
    return single, index


def _no_weights(directory: Path) -> str:
    """Why a directory has no readable weights."""
    others = sorted(p.name for p in directory.glob("*.safetensors"))
    if others:
        return (
            f"{directory} holds {others[0]}, but neither {SINGLE} nor {INDEX}: rename the file if "
            "it is complete, or download the index that belongs to its shards"
        )
    pickled = sorted(
        p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")
    )
    pickled += [p.name for p in directory.iterdir() if p.name.endswith(".bin.index.json")]
    if pickled:
        return (
            f"{directory} holds {pickled[0]} but no {SINGLE}: pickled weights can run code and "
            "are never opened. Convert them once, where you trust them: "
            "AutoModelForCausalLM.from_pretrained(path).save_pretrained(new)"
        )
    return f"{directory} holds neither {SINGLE} nor {INDEX}: is the download complete?"
