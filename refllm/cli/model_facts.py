"""What a checkpoint is, as plain data, from the headers of its files: a Hugging Face
directory or a GGUF file. ``info`` prints it.

Weights are not read. What a reader would not expect is found by ``model_oddities``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from refllm.cli.model_oddities import (
    directory_oddities,
    gguf_oddities,
    spelling,
    token_oddities,
)
from refllm.errors import InputError

if TYPE_CHECKING:
    from refllm.array_types import Json, Namespace
    from refllm.checkpoints.chat_template import ChatTemplates
    from refllm.checkpoints.tokenizer import Tokenizer
    from refllm.checkpoints.weight_storage import StoredTensor
    from refllm.model.config import ModelConfig


def describe(path: Path, xp: Namespace, *, weights: str = "auto", verify: bool = False) -> Json:
    """Everything that ``info`` prints, as plain data.

    Raises
    ------
    CheckpointError
        if the path is no checkpoint that refllm reads.
    """
    from refllm.checkpoints.sources import is_gguf

    facts = _gguf_facts if is_gguf(path) else _directory_facts
    return facts(path, xp, weights, verify)


# --- Hugging Face directories ---------------------------------------------------------------


def _directory_facts(directory: Path, xp: Namespace, weights: str, verify: bool) -> Json:
    """``describe`` of a directory."""
    from refllm.checkpoints.chat_template_files import templates_from_directory
    from refllm.checkpoints.loading import NetworkTensors, read_config
    from refllm.checkpoints.quantization_files import read_quantization
    from refllm.checkpoints.tensor_files import FLOATS, INTEGERS, TensorFiles, host_dtype
    from refllm.checkpoints.tokenizer import read_tokenizer

    config = read_config(directory)
    quantization = read_quantization(directory)
    names = FLOATS | INTEGERS
    with TensorFiles(directory) as files:
        tensors = NetworkTensors(files, config, quantization, None, None)
        tensors.check()
        types = {name: names.get(files.dtype(name), files.dtype(name)) for name in files}
        nbytes = sum(
            math.prod(files.shape(n)) * host_dtype(types[n]).itemsize
            for n in files
            if types[n] in names.values()
        )
        stored = list(tensors.stored())
    tokenizer = read_tokenizer(directory, config)
    unusual = token_oddities(tokenizer, config) + directory_oddities(directory)
    return _facts(
        directory.resolve().name,
        config,
        weights=_weight_facts(types.values(), nbytes, config, stored, quantization),
        loaded=_loaded_as(weights, stored, xp, directory),
        tokenizer=_tokenizer_facts(tokenizer, config, None),
        templates=templates_from_directory(directory),
        unusual=unusual,
        card=_read_json(directory / "card.json"),
        files=list_files(directory, verify=verify),
    )


def list_files(directory: Path, *, verify: bool) -> list[Json]:
    """Each file of the directory or its manifest: name, size, recorded hash and state.

    The state is "recorded" or "not recorded" in the manifest, "the record" (the manifest
    itself), "missing", or with ``verify`` "verified" or "differs".
    """
    manifest = _read_json(directory / "manifest.json") or {}
    recorded = manifest.get("files", {})
    if not isinstance(recorded, dict) or not all(isinstance(f, dict) for f in recorded.values()):
        raise InputError(f"{directory / 'manifest.json'} is no manifest of files with their hashes")
    present = {p.name: p for p in directory.iterdir() if p.is_file() and not p.name.startswith(".")}
    found = []
    for name in sorted({*present, *recorded}):
        digest = recorded.get(name, {}).get("sha256")
        if digest is not None:
            digest = str(digest)
        size = 0
        file = present.get(name)
        if file is not None:
            size = file.stat().st_size
        state = _file_state(name, file, digest, verify)
        found.append({"name": name, "bytes": size, "sha256": digest, "state": state})
    return found


def _file_state(name: str, file: Path | None, digest: str | None, verify: bool) -> str:
    """How a file compares with its entry in the manifest."""
    from refllm.checkpoints.writer import file_sha256

    if file is None:
        return "missing"
    if verify and digest is not None:
        return "verified" if file_sha256(file) == digest else "differs"
    if name == "manifest.json":  # it cannot hold its own hash
        return "the record"
    return "not recorded" if digest is None else "recorded"


def _read_json(path: Path) -> Json | None:
    """The object in a JSON file; None if there is no such file."""
    from refllm.checkpoints.tensor_files import read_json

    if not path.is_file():
        return None
    return read_json(path)


# --- GGUF files -----------------------------------------------------------------------------


def _gguf_facts(path: Path, xp: Namespace, weights: str, verify: bool) -> Json:
    """``describe`` of a GGUF file."""
    from refllm.checkpoints.chat_template_files import templates_from_metadata
    from refllm.checkpoints.gguf import GGUFTensors, open_file, read_tokenizer
    from refllm.checkpoints.sources import SMOLLM2_FILE, SMOLLM2_SHA256
    from refllm.checkpoints.writer import file_sha256

    with open_file(path) as file:
        tensors = GGUFTensors(file, None, None)
        tensors.check()
        config = tensors.config
        metadata = file.metadata
        types = [record.type.name for record in file.tensors.values()]
        nbytes = sum(record.nbytes for record in file.tensors.values())
        stored = list(tensors.stored())
        tokenizer = read_tokenizer(file, config)
        unusual = gguf_oddities(file, config, tokenizer)
        if tensors.rope_factors is not None:
            unusual.append("rope_freqs.weight divides the RoPE frequencies, besides the keys")
    name = metadata.get("general.name")
    pre = metadata.get("tokenizer.ggml.pre")
    parts = file.paths
    known = {SMOLLM2_FILE: SMOLLM2_SHA256}  # a GGUF file brings no manifest
    return _facts(
        name if isinstance(name, str) else path.stem,
        config,
        weights=_weight_facts(types, nbytes, config, stored, None),
        loaded=_loaded_as(weights, stored, xp, path),
        tokenizer=_tokenizer_facts(tokenizer, config, pre if isinstance(pre, str) else None),
        templates=templates_from_metadata(metadata, str(path)),
        unusual=unusual,
        card=None,
        files=[
            {
                "name": part.name,
                "bytes": part.stat().st_size,
                "sha256": file_sha256(part) if verify else known.get(part.name),
                "state": _file_state(part.name, part, known.get(part.name), verify),
            }
            for part in parts
        ],
    )


# --- both -----------------------------------------------------------------------------------


def _facts(
    name: str,
    config: ModelConfig,
    *,
    weights: Json,
    loaded: str,
    tokenizer: Json | None,
    templates: ChatTemplates,
    unusual: list[str],
    card: Json | None,
    files: list[Json],
) -> Json:
    """The facts in the order in which they are printed."""
    from refllm.measure.memory import kv_bytes_per_token

    scaling = config.rope_scaling
    return {
        "model": name,
        "config": config.to_hf(),
        "summary": config.summary,
        "parameters": config.num_parameters,
        "weights": weights,
        "loaded as": loaded,
        "KV cache bytes per token": {
            dtype: int(kv_bytes_per_token(config, bits))
            for dtype, bits in (("float16", 16), ("float32", 32))
        },
        "RoPE": {
            "base": config.rope_theta,
            "scaling": None if scaling is None else _scaling(scaling),
        },
        "tokenizer": tokenizer,
        "chat template": _template_facts(templates),
        "unusual": unusual,
        "card": card,
        "training runs": training_runs(card),
        "files": files,
    }


def _scaling(scaling: object) -> str:
    """A RoPE scaling in words.

    >>> from refllm.model.rope import LinearScaling
    >>> _scaling(LinearScaling(4.0))
    'linear: factor 4, attention_factor 1'
    """
    kind = type(scaling).__name__.removesuffix("Scaling").lower()
    numbers = ", ".join(f"{key} {_plain(value)}" for key, value in vars(scaling).items())
    return f"{kind}: {numbers}"


def _plain(value: object) -> str:
    """A number without needless digits."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _weight_facts(
    types: Iterable[str],
    nbytes: int,
    config: ModelConfig,
    stored: Iterable[StoredTensor],
    quantization: object,
) -> Json:
    """Types of the tensors with their counts, bytes, bits per weight, quantisation."""
    formats = sorted({tensor.format for tensor in stored if tensor.format is not None})
    if quantization is not None:
        formats = [str(quantization)]
    return {
        "tensors": dict(sorted(Counter(types).items(), key=lambda item: (-item[1], item[0]))),
        "bytes": nbytes,
        "bits per weight": 8 * nbytes / config.num_parameters,
        "quantised": ", ".join(formats) or None,
    }


def _loaded_as(weights: str, stored: Iterable[StoredTensor], xp: Namespace, where: Path) -> str:
    """How ``load`` would hold the weights now, or why it would not load them."""
    from refllm.checkpoints.tensor_files import CheckpointError
    from refllm.checkpoints.weight_storage import choose
    from refllm.terminal import format_bytes

    try:
        chosen = choose(weights, stored, "float32", xp, where)
    except CheckpointError as error:
        return f"not here: {str(error).removeprefix(f'{where}: ')}"
    return f"{chosen.summary}, {format_bytes(chosen.nbytes)}"


def _tokenizer_facts(tokenizer: Tokenizer, config: ModelConfig, pre: str | None) -> Json | None:
    """Kind, name of the pre-tokenizer, size, and the tokens that begin and end; None if the
    checkpoint has none.
    """
    if not tokenizer.available:
        return None
    return {
        "kind": type(tokenizer.inner.model).__name__,
        "pre": pre,
        "tokens": tokenizer.vocab_size,
        "begin": spelling(tokenizer, config.bos_token_id),
        "begins text": tokenizer.encode("", special=True)[:1] == [config.bos_token_id],
        "end": [spelling(tokenizer, i) for i in config.eos_token_ids],
    }


def _template_facts(templates: ChatTemplates) -> Json | None:
    """Names and first line of the chat templates; None if there is none."""
    if not templates.sources:
        return None
    text = next(iter(templates.sources.values()))
    return {"names": sorted(templates.sources), "first line": text.strip().split("\n", 1)[0]}


def training_runs(card: Json | None) -> list[Json]:
    """The runs that made a model, the first one first: each began from the weights of the one
    before it. Empty for a record of another program.

    >>> first = {"steps": 10, "tokens": 320, "start": None}
    >>> last = {"steps": 5, "tokens": 160, "start": {"training": first}, "seconds": 60.0}
    >>> [run["steps"] for run in training_runs({"training": last})]
    [10, 5]
    """
    runs: list[Json] = []
    found = None if card is None else card.get("training")
    while isinstance(found, dict):
        keys = ("steps", "tokens", "seconds", "teacher", "command", "remark")
        runs.append({key: found.get(key) for key in keys})
        start = found.get("start")
        found = start.get("training") if isinstance(start, dict) else None
    return runs[::-1]
