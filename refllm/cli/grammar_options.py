"""Structured output on the command line: the options that name a grammar, and the grammar."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from refllm.cli.options import flag, opt
from refllm.errors import InputError, alternatives

if TYPE_CHECKING:
    from refllm.checkpoints.tokenizer import Tokenizer
    from refllm.decode.grammar import Grammar

RegexOption = Annotated[
    str | None,
    opt("The whole output matches this regular expression.", "--regex", metavar="PATTERN"),
]
JsonSchemaOption = Annotated[
    Path | None,
    opt("The output is JSON that this JSON Schema accepts.", "--json-schema", metavar="FILE"),
]
ChoicesOption = Annotated[
    list[str] | None,
    opt(
        r"The output is one of these; \, is a comma within one. May be repeated.",
        "--choices",
        metavar="A,B,…",
    ),
]
GrammarOption = Annotated[
    Path | None,
    opt(
        "The output is a text of this grammar: a file in GBNF or Lark, or one that comes with the "
        "package, such as json.",
        "--grammar",
        metavar="FILE|NAME",
    ),
]
JumpForwardOption = Annotated[
    bool,
    flag(
        "Append what the grammar forces without sampling: faster, and another distribution.",
        "--jump-forward",
    ),
]


def grammar_from_options(
    regex: str | None,
    json_schema: Path | None,
    choices: list[str] | None,
    grammar: Path | None,
    tokenizer: Tokenizer,
) -> Grammar | None:
    """The grammar that the options name, for a tokenizer; None if they name none.

    InputError for two of them, for a file that is not what it must be, and for what cannot be
    enforced.
    """
    check_one_grammar(regex, json_schema, choices, grammar)
    if regex is None and json_schema is None and not choices and grammar is None:
        return None
    from refllm.decode.grammar import compile

    if regex is not None:
        return compile(regex=regex, tokenizer=tokenizer)
    if json_schema is not None:
        return compile(json_schema=_read_json(json_schema), tokenizer=tokenizer)
    if choices:
        return compile(choices=split_choices(choices), tokenizer=tokenizer)
    assert grammar is not None
    return compile(ebnf=_read_ebnf(grammar), tokenizer=tokenizer)


def check_one_grammar(
    regex: str | None,
    json_schema: Path | None,
    choices: list[str] | None,
    grammar: Path | None,
    jump_forward: bool | None = None,
) -> None:
    """InputError if more than one option names a grammar, or none where ``jump_forward`` asks for
    one.
    """
    options = {
        "--regex": regex is not None,
        "--json-schema": json_schema is not None,
        "--choices": bool(choices),
        "--grammar": grammar is not None,
    }
    given = [name for name, is_given in options.items() if is_given]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} each say what the output is: choose one")
    if jump_forward and not given:
        raise InputError(
            f"--jump-forward appends what a grammar forces: add one of {', '.join(options)}"
        )


def split_choices(texts: list[str]) -> list[str]:
    r"""Choices separated by commas, in one or several texts; ``\,`` is a comma.

    >>> split_choices(["yes,no", r"so\, so"])
    ['yes', 'no', 'so, so']
    """
    parts = [part for text in texts for part in re.split(r"(?<!\\),", text)]
    choices = [part.replace("\\,", ",") for part in parts]
    if "" in choices:
        raise InputError("--choices: a choice is empty; write them as yes,no,maybe")
    return choices


def _read_ebnf(file: Path) -> str:
    """A grammar's text, from a file or by the name of one that comes with the package."""
    from refllm.decode.grammar.rule_grammars.shipped import names, shipped

    if not file.exists() and str(file) in names():
        return shipped(str(file))
    try:
        return _read_text(file, "--grammar")
    except InputError as error:
        if file.exists():
            raise
        raise InputError(f"{error}; by name: {alternatives(file, names())}") from error


def _read_json(file: Path) -> object:
    """A file's JSON; InputError if it is none."""
    try:
        return json.loads(_read_text(file, "--json-schema"))
    except json.JSONDecodeError as error:
        raise InputError(
            f"--json-schema: {file} is no JSON: {error.msg} in line {error.lineno}"
        ) from error


def _read_text(file: Path, option: str) -> str:
    """A file's text; InputError if it cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{option}: {file} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise InputError(f"{option}: {file} cannot be read: {error.strerror}") from error
