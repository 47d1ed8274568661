"""``refllm chat`` over a pipe: messages in, answers out, counts on stderr."""

from __future__ import annotations

import io
import shlex
from pathlib import Path

import pytest

from chat_models import save_chat_model
from command_line import as_lines, run
from refllm.api import load
from refllm.cli import chat_loop
from refllm.cli.chat_loop import ChatLoop
from refllm.decode.sampling_params import SamplingParams
from refllm.errors import InputError

DEFAULT = SamplingParams(repetition_penalty=1.1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("chat") / "tiny", positions=512)


def answers(
    model: Path, *texts: str, system: str | None = None, count: int = 5, sampling=DEFAULT, rng=0
) -> str:
    """What a conversation answers, as lines."""
    conversation = load(model).conversation(system, rng=rng)
    return "".join(
        as_lines("".join(conversation.say(text, count, sampling=sampling))) for text in texts
    )


def chat(model: Path, text: str, *options: str):
    return run("chat", "--model", model, "-n", "5", *options, stdin=text)


def test_each_line_is_a_message_and_the_answers_are_all_of_stdout(model):
    result = chat(model, "ab\ncd e\n\n  \nf\n")
    assert result.exit_code == 0
    assert result.stdout == answers(model, "ab", "cd e", "f")
    notes = result.stderr.splitlines()
    assert len(notes) == 6  # two for each answer, none of a banner or a prompt
    assert all(len(note) <= 80 for note in notes)
    first = load(model).chat_tokenizer.encode(
        [{"role": "user", "content": "ab"}], add_generation_prompt=True
    )
    assert notes[0] == "cut at --max-tokens 5"
    assert notes[1].startswith(f"read {len(first)} in 0.")
    assert " s, wrote 5 at " in notes[1]
    assert notes[1].endswith(f" tokens/s, context {len(first) + 5} of 512")


def test_the_last_line_needs_no_line_break(model):
    assert chat(model, "ab\ncd").stdout == answers(model, "ab", "cd")
    assert chat(model, "ab\ncd\\").stdout == answers(model, "ab", "cd")
    assert chat(model, "").stdout == ""


def test_a_line_that_ends_in_a_backslash_is_continued(model):
    assert chat(model, "ab\\\ncd\\\n\\\ne\nf\n").stdout == answers(model, "ab\ncd\n\ne", "f")


def test_lines_of_windows_are_the_same_lines(model):
    text = "ab\\\ncd\n/system Be kind.\nab\n/reset\nef\n/quit\nab\n"
    result = chat(model, text)
    windows = chat(model, "\ufeff" + text.replace("\n", "\r\n"))
    assert windows.stdout == result.stdout != ""
    assert windows.exit_code == result.exit_code == 0
    only = chat(model, "\ufeff/quit\r\nab")  # the byte-order mark stands before a command too
    assert (only.stdout, only.exit_code) == ("", 0)


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_bytes_that_are_no_text_are_named_in_every_locale(model, monkeypatch, capsys, errors):
    """Python's C locale keeps such bytes as half characters."""
    stdin = io.TextIOWrapper(io.BytesIO(b"ab\n\xff\xfe\ncd\n"), "utf-8", errors)
    monkeypatch.setattr("sys.stdin", stdin)
    conversation = load(model).conversation(rng=0)
    with pytest.raises(InputError, match="^standard input is not UTF-8 text$"):
        ChatLoop(conversation, DEFAULT, 5, interactive=False).run()
    assert "\udcff" not in str(conversation.messages)
    capsys.readouterr()


def test_a_turn_computes_what_is_new(model):
    notes = chat(model, "ab\nab\n").stderr.splitlines()
    read = [int(note.split()[1]) for note in notes if note.startswith("read")]
    assert read[1] < read[0]


def test_the_options_are_those_of_generate(model):
    sampling = SamplingParams(0.9, 30, 0.95, 0.001, 1.2)
    options = shlex.split(
        "-t 0.9 --top-k 30 --top-p 0.95 --min-p 0.001 --repetition-penalty 1.2 --seed 7"
    )
    expected = answers(model, "ab", "c", system="S", sampling=sampling, rng=7)
    assert chat(model, "ab\nc\n", "--system", "S", *options).stdout == expected
    assert chat(model, "ab\n", "--repetition-penalty", "1").stdout == answers(
        model, "ab", sampling=SamplingParams()
    )
    longer = run("chat", "--model", model, "-n", "7", stdin="ab\n")
    assert longer.stdout == answers(model, "ab", count=7)


# --- commands -----------------------------------------------------------------------------


def test_reset_forgets_the_conversation_and_keeps_the_system_message(model):
    result = chat(model, "ab\n/reset\nab\n", "--system", "S")
    once = answers(model, "ab", system="S")
    assert result.stdout == once + once
    assert "a new conversation" in result.stderr


def test_system_begins_a_conversation_with_another_system_message(model):
    result = chat(model, "/system\nab\n/system  Be kind. \n/system\nab\n/reset\n/system\n")
    expected = answers(model, "ab") + answers(model, "ab", system="Be kind.")
    assert result.stdout == expected
    assert "there is no system message" in result.stderr
    assert result.stderr.count("Be kind.") == 2  # shown twice: it outlives a reset


@pytest.mark.parametrize("command", ["/quit", "/exit"])
def test_quit_ends_the_chat(model, command):
    result = chat(model, f"ab\n{command}\ncd\n")
    assert result.exit_code == 0
    assert result.stdout == answers(model, "ab")


def test_help_lists_the_commands_within_80_columns(model):
    result = chat(model, "/help\n")
    assert result.stdout == ""
    for command in ("/help", "/reset", "/system", "/quit", "Ctrl-C", "Ctrl-D"):
        assert command in result.stderr
        assert command in run("chat", "--help").output
    assert max(map(len, result.stderr.splitlines())) <= 80


def test_a_message_may_begin_with_a_slash(model):
    assert chat(model, "//etc is a folder\n").stdout == answers(model, "/etc is a folder")


# --- bad input ------------------------------------------------------------------------------


def test_over_a_pipe_bad_input_ends_the_chat_with_one_sentence(model):
    for text, sentence in (
        ("ab\n/nope x\ncd\n", "Error: there is no command /nope: /help lists them"),
        ("ab\n" + "x" * 600 + "\ncd\n", "Error: the message is too long: with the system message"),
    ):
        result = chat(model, text)
        assert result.exit_code == 2
        assert result.stdout == answers(model, "ab")
        assert sentence in result.stderr
        assert "Traceback" not in result.stderr


def test_a_model_without_a_chat_template_is_named():
    result = run("chat", "--model", "stdlib-draft", stdin="Hi\n")
    assert result.exit_code == 2
    assert "has no chat template: it is no chat model" in result.stderr


def test_options_that_make_no_sense_are_named(model):
    assert chat(model, "", "--top-p", "2").exit_code == 2
    assert chat(model, "", "-n", "0").exit_code == 2


def test_what_is_left_out_of_a_full_context_is_told(model, monkeypatch):
    monkeypatch.setattr(chat_loop, "SLOW_TOKENS", 100)
    lines = "".join(f"{i} " + "x" * 100 + "\n" for i in range(5))
    result = chat(model, lines, "--system", "S")
    assert "the context is full: the oldest" in result.stderr
    assert "messages are left out from now on" in result.stderr
    assert "reading 1" in result.stderr
    assert max(map(len, result.stderr.splitlines())) <= 80
    assert result.stdout == answers(model, *lines.splitlines(), system="S")


def test_an_answer_that_fills_the_context_says_so(model):
    result = run("chat", "--model", model, "--max-tokens", "5000", stdin="ab\n")
    assert "cut: the context of 512 tokens is full\n" in result.stderr
    assert ", context 512 of 512\n" in result.stderr


def test_generate_answers_a_users_message(model):
    expected = load(model).chat([{"role": "user", "content": "a <|im_end|>"}], 6)
    result = run("generate", "--chat", "a <|im_end|>", "--model", model, "-n", "6")
    assert result.stdout == as_lines(expected)
    plain = run("generate", "a <|im_end|>", "--model", model, "-n", "6")
    assert plain.stdout != result.stdout
    refused = run("generate", "--chat", "Hi", "--model", "stdlib-draft")
    assert refused.exit_code == 2
    assert "has no chat template" in refused.stderr


@pytest.mark.real
def test_the_real_model_answers_a_script():
    result = run("chat", "--repetition-penalty", "1", stdin="What is the capital of France?\n")
    assert result.stdout == "The capital of France is Paris.\n"
    assert result.stderr.startswith("read 37 in ")
    assert "context 44 of 8,192" in result.stderr
    result = run("generate", "--chat", "What is the capital of France?", "--model", "smollm2")
    assert "Paris" in result.stdout
