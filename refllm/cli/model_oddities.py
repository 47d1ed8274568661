"""What a reader would not expect of a checkpoint: ids without a row, types that a mix fell
back to, entries that contradict each other. Each is one sentence of ``info``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refllm.array_types import JsonView
    from refllm.checkpoints.tokenizer import Tokenizer
    from refllm.formats.gguf.reader import GGUFFile
    from refllm.model.config import ModelConfig


def token_oddities(tokenizer: Tokenizer, config: ModelConfig) -> list[str]:
    """Special tokens and sizes that do not fit the network."""
    if not tokenizer.available:
        return ["no tokenizer that refllm reads: token ids in, token ids out"]
    found = []
    more = tokenizer.vocab_size - config.vocab_size
    if more > 0:
        found.append(
            f"the tokenizer has {more:,} more ids than the embedding has rows: they are rejected "
            "where they are used"
        )
    names: Mapping[str, Iterable[int | None]] = {
        "begin": [config.bos_token_id],
        "end": config.eos_token_ids,
    }
    for name, ids in names.items():
        for token in ids:
            if token is not None and spelling(tokenizer, token) is None:
                found.append(f"the {name} token {token} is none of the tokenizer's")
    if not config.eos_token_ids:
        found.append("no end token: generation ends at its limit alone")
    return found


def directory_oddities(directory: Path) -> list[str]:
    """Entries of config.json that another file overrides."""
    from refllm.checkpoints.tensor_files import read_json

    file = directory / "generation_config.json"
    if not file.is_file():
        return []
    ours = read_json(directory / "config.json").get("eos_token_id")
    theirs = read_json(file).get("eos_token_id")
    if ours is None or theirs is None or _id_set(ours) == _id_set(theirs):
        return []
    return [
        f"config.json names the end token {ours}, generation_config.json {theirs}: the latter "
        "is used, as in transformers"
    ]


def _id_set(value: Any) -> set[Any]:
    """One id, or a list of them, as a set."""
    return set(value) if isinstance(value, list) else {value}


def gguf_oddities(file: GGUFFile, config: ModelConfig, tokenizer: Tokenizer) -> list[str]:
    """What is unusual about a file."""
    from refllm.formats.gguf.mixes import FILE_TYPES, MIXES

    found = token_oddities(tokenizer, config)
    types = Counter(record.type.name for record in file.tensors.values())
    number = file.metadata.get("general.file_type")
    mix = None
    if number is not None:
        mix = FILE_TYPES.get(int(number))
    if mix is not None and MIXES[mix][0] not in types:
        found.append(
            f"general.file_type says {mix}, and no tensor has the type {MIXES[mix][0]}: the file "
            "was made otherwise"
        )
    narrow = Counter(
        (record.type.name, record.shape[-1])
        for record in file.tensors.values()
        if record.type.quantized and record.type.block < 256 and record.shape[-1] % 256
    )
    if mix is not None and MIXES[mix][0].endswith("_K"):
        for (type, width), count in sorted(narrow.items()):
            found.append(
                f"{count} tensors fell back to {type}: blocks of 256 do not divide their rows of "
                f"{width}"
            )
    return found + _end_oddities(file.metadata, config, tokenizer)


def _end_oddities(metadata: JsonView, config: ModelConfig, tokenizer: Tokenizer) -> list[str]:
    """End tokens that no key of a file names."""
    named = {
        int(metadata[key])
        for key in (f"tokenizer.ggml.{end}_token_id" for end in ("eos", "eot", "eom"))
        if key in metadata
    }
    spelled = [spelling(tokenizer, i) for i in config.eos_token_ids if i not in named]
    if not spelled:
        return []
    return [f"generation also ends at {', '.join(map(str, spelled))}: recognised by the spelling"]


def spelling(tokenizer: Tokenizer, token: int | None) -> str | None:
    """The text of a special token."""
    if token is None or not tokenizer.available:
        return None
    spelling: str | None = tokenizer.inner.id_to_token(token)
    return spelling
