"""Where a checkpoint keeps its chat templates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chat_models import save_chat_model
from chat_templates import SPECIAL_TOKENS, user
from chat_tokenizer import chat_tokenizer
from conftest import oracle
from refllm.api import load
from refllm.checkpoints.chat_template import ChatTemplates
from refllm.checkpoints.chat_template_files import (
    templates_beside,
    templates_from_directory,
    templates_from_metadata,
    templates_metadata,
)
from refllm.checkpoints.tensor_files import CheckpointError
from refllm.quant.to_gguf import convert

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


@pytest.mark.parametrize(
    "sources", [{}, {"default": "D"}, {"default": "D", "tool_use": "T", "rag": "R"}, {"rag": "R"}]
)
def test_templates_written_to_gguf_are_read_back(sources):
    entries = templates_metadata(ChatTemplates(sources))
    assert templates_from_metadata(entries, "x").sources == sources
    assert set(entries.get("tokenizer.chat_templates", [])) == sources.keys() - {"default"}


def test_a_converted_chat_model_answers_as_its_source(tmp_path):
    """To GGUF, and from there to GGUF again, which finds more end tokens by their spelling."""
    source = save_chat_model(tmp_path / "model")
    once = tmp_path / "once.gguf"
    twice = tmp_path / "twice.gguf"
    convert(source, once, "F32")
    convert(once, twice, "F32")
    expected = load(source).chat([user("ab <|im_end|>")], 6, ignore_eos=True)
    for path in (once, twice):
        assert load(path).chat_templates.sources == load(source).chat_templates.sources
        assert load(path).chat([user("ab <|im_end|>")], 6, ignore_eos=True) == expected


def test_a_tokenizer_of_another_folder_brings_its_template(tmp_path):
    own = ChatTemplates({"default": "own"})
    assert templates_beside(None, own) is own
    assert templates_beside(tmp_path, own) is own
    write(tmp_path, "chat_template.jinja", "other")
    assert templates_beside(str(tmp_path), own).sources == {"default": "other"}


@pytest.mark.parametrize("gguf", [False, True])
def test_a_loaded_model_has_the_template_of_its_tokenizer(gguf, tmp_path):
    model = save_chat_model(tmp_path / "model")
    path = model
    if gguf:
        path = tmp_path / "model.gguf"
        convert(model, path, "F32")
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(model / "tokenizer.json", other)
    write(other, "chat_template.jinja", "other")
    assert load(path, tokenizer=other).chat_templates.sources == {"default": "other"}
    assert "<|im_start|>" in load(path).chat_templates.source()
    (other / "chat_template.jinja").unlink()
    assert load(path, tokenizer=other).chat_templates == load(path).chat_templates


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
