"""``--regex``, ``--json-schema``, ``--choices`` and ``--grammar``: one of them says what the output
is, and bad ones are one sentence.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import refllm.decode.grammar
from chat_models import chat_model, save_chat_model
from command_line import as_lines, run, save_tiny_model
from grammars import WordGrammar
from refllm.api import Model, load
from refllm.cli.grammar_options import check_one_grammar, grammar_from_options, split_choices
from refllm.errors import InputError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture
def compiled(model: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What ``compile`` was called with; it gives a grammar of two words."""
    calls: list[dict[str, Any]] = []

    def compile_words(**arguments: Any) -> WordGrammar:
        calls.append(arguments)
        return WordGrammar.of(["yes", "no way"], load(model))

    monkeypatch.setattr(refllm.decode.grammar, "compile", compile_words, raising=False)
    return calls


def test_each_option_is_compiled_for_the_models_tokenizer(model, compiled, tmp_path):
    schema = {"type": "object"}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    (tmp_path / "some.gbnf").write_text('root ::= "yes"')
    options = [
        (["--regex", "(yes|no way)"], "regex", "(yes|no way)"),
        (["--json-schema", tmp_path / "schema.json"], "json_schema", schema),
        (["--choices", "yes,no way", "--choices", r"a\,b"], "choices", ["yes", "no way", "a,b"]),
        (["--grammar", tmp_path / "some.gbnf"], "ebnf", 'root ::= "yes"'),
    ]
    for arguments, name, value in options:
        result = run("generate", "def f", "--model", model, *arguments)
        assert result.exit_code == 0, result.stderr
        assert result.stdout in ("yes\n", "no way\n")
        call = compiled.pop()
        assert call.pop("tokenizer").vocab_size == load(model).tokenizer.vocab_size
        assert call == {name: value}
    assert not compiled


def test_the_output_is_that_of_generate_with_the_grammar(model, compiled):
    grammar = WordGrammar.of(["yes", "no way"], load(model))
    for jump in (False, True):
        flags = ["--jump-forward"] if jump else []
        for seed in range(3):
            expected = load(model).generate(
                "x", 20, grammar=grammar, temperature=1.0, rng=seed, jump_forward=jump
            )
            result = run(
                "generate", "x", "--model", model, "-n", "20", "-t", "1", "--seed", str(seed),
                "--choices", "yes,no way", *flags,
            )  # fmt: skip
            assert result.stdout == as_lines(expected)


def test_jump_forward_reaches_the_model(model, compiled, monkeypatch):
    asked: list[bool] = []
    stream = Model.stream

    def watched(*arguments: Any, **options: Any) -> Any:
        asked.append(options["jump_forward"])
        return stream(*arguments, **options)

    monkeypatch.setattr(Model, "stream", watched)
    for flags in ([], ["--jump-forward"]):
        run("generate", "x", "--model", model, "--choices", "yes,no", *flags)
    assert asked == [False, True]


def test_a_chat_answers_with_the_grammar(tmp_path, monkeypatch):
    chat = chat_model()
    folder = save_chat_model(tmp_path / "chat")
    monkeypatch.setattr(
        refllm.decode.grammar,
        "compile",
        lambda **arguments: WordGrammar.of(["yes", "no"], chat),
        raising=False,
    )
    result = run(
        "chat", "--model", folder, "--choices", "yes,no", "-t", "1", "--seed", "0", stdin="a\nb\n"
    )
    assert result.exit_code == 0, result.stderr
    assert set(result.stdout.splitlines()) <= {"yes", "no"}
    assert len(result.stdout.splitlines()) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--regex", "a", "--choices", "b"], "--regex and --choices each say what the output is"),
        (
            ["--json-schema", "x", "--grammar", "y", "--regex", "z"],
            "--regex and --json-schema and --grammar each say",
        ),
        (["--jump-forward"], "--jump-forward appends what a grammar forces: add one of --regex"),
        (["--json-schema", "missing.json"], "--json-schema: missing.json cannot be read: No such"),
        (["--grammar", "missing.gbnf"], "--grammar: missing.gbnf cannot be read: No such"),
        (["--json-schema", "{model}/broken.json"], "broken.json is no JSON: Expecting"),
        (["--grammar", "{model}/binary"], "binary is not UTF-8 text (byte 0)"),
        (["--choices", "a,,b"], "--choices: a choice is empty"),
        (["--choices", "a", "--ignore-eos"], "ignore_eos generates beyond the end of the text"),
    ],
)
def test_bad_options_are_one_sentence(model, compiled, options, message):
    (model / "broken.json").write_text("{\n")
    (model / "binary").write_bytes(b"\xff")
    given = [option.replace("{model}", str(model)) for option in options]
    result = run("generate", "x", "--model", model, *given)
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", " ")
    assert not result.stdout


def test_bad_options_of_a_chat_are_found_before_it_begins(model):
    result = run("chat", "--model", model, "--regex", "a", "--choices", "b", stdin="x\n")
    assert result.exit_code == 2
    assert "choose one" in result.stderr


def test_no_option_is_no_grammar():
    assert grammar_from_options(None, None, None, None, None) is None  # type: ignore[arg-type]
    check_one_grammar(None, None, [], None)


def test_choices_are_separated_by_commas():
    assert split_choices(["yes,no", r"so\, so,a b"]) == ["yes", "no", "so, so", "a b"]
    with pytest.raises(InputError, match="a choice is empty"):
        split_choices(["a,"])
