"""Where a checkpoint keeps its chat templates, and the special tokens that they may write.

| place                                   | holds                                            |
|-----------------------------------------|--------------------------------------------------|
| chat_template.jinja                     | the default template                             |
| additional_chat_templates/NAME.jinja    | further ones                                     |
| tokenizer_config.json, ``chat_template``| the default one; or a list of named ones         |
| chat_template.json, ``chat_template``   | the same, of older processors                    |
| GGUF ``tokenizer.chat_template``        | the default one                                  |
| GGUF ``tokenizer.chat_template.NAME``   | further ones, listed by ``.chat_templates``      |

Of a directory, the first place in this order that has a template is read, and the Jinja files
belong together, as in ``transformers``. Special tokens (``bos_token`` …) stand in
tokenizer_config.json, in older directories in special_tokens_map.json; in GGUF by their ids.

Left out: templates of other names than these, writing templates to directories.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from refllm.array_types import JsonView
from refllm.checkpoints.chat_template import DEFAULT, ChatTemplates
from refllm.checkpoints.tensor_files import CheckpointError, read_json

__all__ = [
    "templates_beside",
    "templates_from_directory",
    "templates_from_metadata",
    "templates_metadata",
    "tokens_read_otherwise",
]

KEY = "chat_template"
GGUF_KEY = "tokenizer.chat_template"
# GGUF's names of special tokens (one of them misspelled there) and those of templates
GGUF_TOKENS = {
    "bos": "bos_token",
    "eos": "eos_token",
    "unknown": "unk_token",
    "seperator": "sep_token",
    "padding": "pad_token",
    "cls": "cls_token",
    "mask": "mask_token",
}


# --- directories ----------------------------------------------------------------------------


def templates_from_directory(directory: Path) -> ChatTemplates:
    """The chat templates of a Hugging Face directory, none if it has none; CheckpointError
    for a file that cannot be read.
    """
    config = _json(directory / "tokenizer_config.json")
    sources = (
        _jinja_files(directory)
        or _named(config.get(KEY), directory / "tokenizer_config.json")
        or _named(
            _json(directory / "chat_template.json").get(KEY), directory / "chat_template.json"
        )
    )
    older = _json(directory / "special_tokens_map.json")
    return ChatTemplates(sources, _special_tokens(older) | _special_tokens(config))


def templates_beside(tokenizer: str | os.PathLike[str] | None, own: ChatTemplates) -> ChatTemplates:
    """The templates of the folder whose tokenizer is read in place of a checkpoint's own; the
    checkpoint's where there is no such folder, or no template in it.
    """
    if tokenizer is None:
        return own
    found = templates_from_directory(Path(os.path.expanduser(tokenizer)))
    return found if found.sources else own


def _jinja_files(directory: Path) -> dict[str, str]:
    """Templates that are files of their own."""
    folder = directory / "additional_chat_templates"
    files = {path.stem: path for path in sorted(folder.glob("*.jinja"))}
    default = directory / "chat_template.jinja"
    if default.is_file():
        files[DEFAULT] = default
    return {name: _text(path) for name, path in files.items()}


def _text(path: Path) -> str:
    """A template's text."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text (byte {error.start})") from error


def _json(path: Path) -> JsonView:
    """An object of a JSON file; empty if the file does not exist."""
    return read_json(path) if path.is_file() else {}


def _named(entry: Any, where: Path) -> dict[str, str]:
    """The templates of a ``chat_template`` entry: a text, or a list of named ones."""
    if entry is None:
        return {}
    if isinstance(entry, str):
        return {DEFAULT: entry}
    found = {}
    for item in entry if isinstance(entry, list) else [None]:
        named = item if isinstance(item, dict) else {}
        name = named.get("name")
        source = named.get("template")
        if not isinstance(name, str) or not isinstance(source, str):
            raise CheckpointError(
                f"{where}: {KEY} must be a template, or a list of objects with a name and a "
                "template"
            )
        found[name] = source
    return found


def _special_tokens(entries: JsonView) -> dict[str, str]:
    """The entries that name a special token: text, or an object with its ``content``."""
    found = {}
    for name, value in entries.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            found[name] = content
    return found


# --- GGUF -----------------------------------------------------------------------------------


def templates_from_metadata(metadata: Mapping[str, Any], where: str) -> ChatTemplates:
    """The chat templates of a GGUF file, none if it has none; CheckpointError for an entry
    that is no text.
    """
    sources = {}
    for key, value in metadata.items():
        if key != GGUF_KEY and not key.startswith(f"{GGUF_KEY}."):
            continue
        if not isinstance(value, str):
            raise CheckpointError(f"{where}: {key} must be text, got {type(value).__name__}")
        sources[key.removeprefix(GGUF_KEY).removeprefix(".") or DEFAULT] = value
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    special = {}
    for key, name in GGUF_TOKENS.items():
        token = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(token, int | np.integer) and 0 <= token < len(tokens):
            special[name] = tokens[int(token)]
    return ChatTemplates(sources, special)


def templates_metadata(templates: ChatTemplates) -> dict[str, Any]:
    """The entries of a GGUF file for chat templates."""
    sources = dict(templates.sources)
    entries: dict[str, Any] = {}
    if DEFAULT in sources:
        entries[GGUF_KEY] = sources.pop(DEFAULT)
    if sources:
        entries[f"{GGUF_KEY}s"] = list(sources)
    return entries | {f"{GGUF_KEY}.{name}": source for name, source in sources.items()}


def tokens_read_otherwise(templates: ChatTemplates, metadata: Mapping[str, Any]) -> list[str]:
    """A sentence for each special token that a template writes and that these entries of a
    GGUF file give another spelling.
    """
    read = templates_from_metadata(metadata, "convert").special_tokens
    sentences = []
    for name in GGUF_TOKENS.values():
        own = templates.special_tokens.get(name)
        used = any(re.search(rf"\b{name}\b", source) for source in templates.sources.values())
        if used and own != read.get(name):
            sentences.append(
                f"the chat template's {name} is {own!r}, and {read.get(name)!r} in the GGUF file"
            )
    return sentences
