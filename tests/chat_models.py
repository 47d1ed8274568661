"""Tiny random chat models: a network, a tokenizer with control tokens, a chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from chat_templates import SPECIAL_TOKENS, TEMPLATES
from chat_tokenizer import chat_tokenizer
from refllm.api import Model
from refllm.checkpoints.chat_template import ChatTemplates
from refllm.checkpoints.writer import save
from refllm.decode import generate
from refllm.model.llama import build
from tiny_models import tiny_config, tiny_params

END = "<|im_end|>"


def chat_model(
    seed: int = 0, template: str = "chatml", *, positions: int = 2048, **changes: Any
) -> Model:
    """A random network in float64, whose answers end where ``<|im_end|>`` comes."""
    tokenizer = chat_tokenizer()
    changes = {"eos_token_ids": (tokenizer.inner.token_to_id(END),)} | changes
    config = tiny_config(
        vocab_size=tokenizer.vocab_size, max_position_embeddings=positions, **changes
    )
    templates = ChatTemplates({"default": TEMPLATES[template]}, SPECIAL_TOKENS)
    weights = build(config, tiny_params(config, seed))
    return Model(config, weights, tokenizer, chat_templates=templates)


@contextmanager
def computed_tokens(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The tokens of each pass through the network, prefill and decode steps alike."""
    passes: list[int] = []

    def forward(weights: Any, config: Any, tokens: Any, *rest: Any) -> Any:
        passes.append(len(tokens))
        return original_forward(weights, config, tokens, *rest)

    def make_decode_step(*parts: Any) -> Any:
        step = original_step(*parts)

        def counted(tokens: Any, *rest: Any) -> Any:
            passes.append(len(tokens))
            return step(tokens, *rest)

        return counted

    original_forward = generate.forward
    original_step = generate.make_decode_step
    with monkeypatch.context() as patched:
        patched.setattr(generate, "forward", forward)
        patched.setattr(generate, "make_decode_step", make_decode_step)
        yield passes


def save_chat_model(path: Path, seed: int = 0, template: str = "chatml", **changes: Any) -> Path:
    """A directory with the model in float32; returns its path."""
    model = chat_model(seed, template, **changes)
    params = tiny_params(model.config, seed, "float32")
    save(path, model.config, params, model.tokenizer, dtype="float32")
    (path / "chat_template.jinja").write_text(TEMPLATES[template], encoding="utf-8")
    (path / "tokenizer_config.json").write_text(json.dumps(SPECIAL_TOKENS), encoding="utf-8")
    return path
