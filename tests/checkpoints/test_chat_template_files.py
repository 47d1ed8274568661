"""Where a checkpoint keeps its chat templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chat_templates import SPECIAL_TOKENS, user
from chat_tokenizer import chat_tokenizer
from conftest import oracle
from refllm.checkpoints.chat_template_files import (
    templates_from_directory,
    templates_from_metadata,
)
from refllm.checkpoints.tensor_files import CheckpointError

NAMED = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]


def write(directory: Path, name: str, content: Any) -> None:
    path = directory / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("files", "sources"),
    [
        ({}, {}),
        ({"tokenizer_config.json": {}}, {}),
        ({"tokenizer_config.json": {"chat_template": None}}, {}),
        ({"tokenizer_config.json": {"chat_template": "C"}}, {"default": "C"}),
        ({"tokenizer_config.json": {"chat_template": ""}}, {"default": ""}),
        ({"tokenizer_config.json": {"chat_template": NAMED}}, {"default": "D", "tool_use": "T"}),
        ({"chat_template.json": {"chat_template": "P"}}, {"default": "P"}),
        ({"chat_template.jinja": "ü\n"}, {"default": "ü\n"}),
        (
            {"additional_chat_templates/rag.jinja": "R", "chat_template.jinja": "J"},
            {"rag": "R", "default": "J"},
        ),
        ({"additional_chat_templates/rag.txt": "R"}, {}),
        (  # a file of its own before an entry, and that before an older file
            {
                "chat_template.jinja": "J",
                "tokenizer_config.json": {"chat_template": NAMED},
                "chat_template.json": {"chat_template": "P"},
            },
            {"default": "J"},
        ),
        (
            {
                "tokenizer_config.json": {"chat_template": "C"},
                "chat_template.json": {"chat_template": "P"},
            },
            {"default": "C"},
        ),
    ],
)
def test_the_templates_of_a_directory(files, sources, tmp_path):
    for name, content in files.items():
        write(tmp_path, name, content)
    assert templates_from_directory(tmp_path).sources == sources


def test_special_tokens_are_text_or_objects(tmp_path):
    write(
        tmp_path,
        "tokenizer_config.json",
        {
            "bos_token": "<s>",
            "eos_token": {"content": "</s>", "lstrip": False},
            "pad_token": None,
            "add_bos_token": True,
            "image_token": "<image>",
            "model_max_length": 5,
        },
    )
    write(tmp_path, "special_tokens_map.json", {"bos_token": "<old>", "unk_token": "<unk>"})
    assert templates_from_directory(tmp_path).special_tokens == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "image_token": "<image>",
        "unk_token": "<unk>",
    }


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        (
            "tokenizer_config.json",
            {"chat_template": 3},
            "tokenizer_config.json: chat_template must",
        ),
        ("tokenizer_config.json", {"chat_template": {"a": "b"}}, "must be a template, or a list"),
        ("tokenizer_config.json", {"chat_template": ["x"]}, "must be a template, or a list"),
        ("tokenizer_config.json", {"chat_template": [{"name": "x"}]}, "with a name and a template"),
        (
            "chat_template.json",
            {"chat_template": [{"template": "x"}]},
            "chat_template.json: chat_t",
        ),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON"),
    ],
)
def test_an_entry_that_is_no_template_is_named(name, content, sentence, tmp_path):
    write(tmp_path, name, content)
    with pytest.raises(CheckpointError, match=sentence):
        templates_from_directory(tmp_path)


def test_a_template_that_is_no_text_is_named(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"a\xff")
    with pytest.raises(CheckpointError, match=r"chat_template.jinja is not UTF-8 text \(byte 1\)"):
        templates_from_directory(tmp_path)


def test_the_templates_of_a_gguf_file():
    metadata = {
        "tokenizer.chat_template": "D",
        "tokenizer.chat_template.tool_use": "T",
        "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>"],
        "tokenizer.ggml.bos_token_id": np.uint32(1),
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 3,  # beyond the vocabulary
    }
    found = templates_from_metadata(metadata, "x.gguf")
    assert found.sources == {"default": "D", "tool_use": "T"}
    assert found.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert templates_from_metadata({}, "x.gguf").sources == {}
    with pytest.raises(CheckpointError, match="x.gguf: tokenizer.chat_template must be text"):
        templates_from_metadata({"tokenizer.chat_template": 3}, "x.gguf")


@pytest.mark.oracle
@pytest.mark.parametrize("place", ["file", "entry", "named", "extra"])
def test_transformers_reads_the_same_template(place, tmp_path):
    transformers = oracle("transformers")
    chat_tokenizer().save(tmp_path / "tokenizer.json")
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **SPECIAL_TOKENS}
    source = "{{ bos_token }}{{ messages[0].content }}\r\n{{ eos_token }}\n"
    if place == "entry":
        config["chat_template"] = source
    elif place == "named":
        config["chat_template"] = [*NAMED[1:], {"name": "default", "template": source}]
    else:
        (tmp_path / "chat_template.jinja").write_bytes(source.encode())
        config["chat_template"] = "{{ 'never' }}"
    if place == "extra":
        write(tmp_path, "additional_chat_templates/tool_use.jinja", "T")
    write(tmp_path, "tokenizer_config.json", config)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = templates_from_directory(tmp_path)
    for tools in (None, [{"name": "f"}]):
        expected = theirs.apply_chat_template([user("x")], tools=tools, tokenize=False)
        assert ours.render([user("x")], tools=tools) == expected
