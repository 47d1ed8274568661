"""The tour's last stop: two questions to a chat model, or how to install one."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from chat_models import chat_model
from refllm.checkpoints.tensor_files import CheckpointError
from refllm.terminal import printable
from refllm.tour import chat_stop, context, stops


def visit(tmp_path: Path) -> str:
    out = Console(file=io.StringIO(), width=10_000, markup=False, emoji=False)
    stops.run(context.Tour("stdlib", "numpy", tmp_path, out), ["chat"])
    return out.file.getvalue()


def test_it_is_the_last_stop():
    assert stops.STOPS[-1].name == "chat"


def test_without_the_model_it_says_how_to_install_it(tmp_path, monkeypatch):
    def missing(name: str) -> Path:
        raise CheckpointError("'smollm2' is not installed")

    monkeypatch.setattr(chat_stop, "locate", missing)
    text = visit(tmp_path)
    assert "`make chat` downloads a real one" in text
    assert "> " not in text


def test_the_second_question_finds_the_first_in_the_cache(tmp_path, monkeypatch):
    model = chat_model()
    monkeypatch.setattr(chat_stop, "locate", lambda name: Path())
    monkeypatch.setattr(chat_stop, "load", lambda name, backend: model)
    text = visit(tmp_path)
    conversation = model.conversation()
    for question in chat_stop.QUESTIONS:
        answer = printable("".join(conversation.say(question, chat_stop.ANSWER_TOKENS)))
        shown = text[text.index(f"> {question}\n") :].removeprefix(f"> {question}\n")
        assert "".join(shown.split()).startswith("".join(answer.split()))
        read = re.compile(
            rf"{conversation.computed} tokens read in \d+\.\d\d s(.*), then [\d,]+ tok"
        )
        assert read.search(text)
    assert f" ({conversation.reused} were in the cache), then" in text
    assert f"{model.config.num_parameters:,} parameters" in text


@pytest.mark.real
def test_the_real_model_answers(tmp_path):
    text = visit(tmp_path)
    assert "The capital of France is Paris." in text
    assert "Berlin" in text
    assert "134,515,008 parameters" in text
