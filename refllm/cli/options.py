"""Options that several commands share, and the two ways to write one.

An option is a module-level alias, ``BatchOption = Annotated[int, opt("Windows per step.")]``,
above the command that takes it; its default stands in the command's signature.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from refllm.backend import ENVIRONMENT_VARIABLE


def opt(text: str, *flags: str, **rules: Any) -> Any:
    """An option that takes a value; ``text`` is its help. ``rules`` are typer's, with the
    placeholder N by default.
    """
    return typer.Option(*flags, help=text, **{"metavar": "N", **rules})


_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "0": "\0", "\\": "\\"}
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|([ntr0\\]))")


def unescape(text: str) -> str:
    r"""Text as it is typed in a shell: \n \t \r \0 \\ \xHH and \uHHHH are the characters that they
    are in Python, any other backslash is itself.

    >>> unescape(r"a\n\\n\x41\d") == "a\n\\nA\\d"
    True
    """

    def character(found: re.Match[str]) -> str:
        digits = found[1] or found[2]
        return chr(int(digits, 16)) if digits else _ESCAPES[found[3]]

    return _ESCAPE.sub(character, text)


def flag(text: str, *flags: str) -> Any:
    """An option without a value."""
    return typer.Option(*flags, help=text)


BackendOption = Annotated[
    str,
    opt(
        "Compute with NumPy, or CuPy on a GPU.",
        "--backend",
        metavar="numpy|cupy",
        envvar=ENVIRONMENT_VARIABLE,
    ),
]
ModelOption = Annotated[
    str, opt("A bundled model or a Hugging Face directory.", "--model", "-m", metavar="NAME|DIR")
]
AnyModelOption = Annotated[
    str,
    opt(
        "A bundled model, smollm2, a Hugging Face directory, a GGUF file or org/name on the Hub.",
        "--model",
        "-m",
        metavar="NAME|DIR|FILE",
    ),
]
WeightsOption = Annotated[
    str,
    opt(
        "Keep quantised weights stored, or decode them to float once; auto decodes what fits "
        "into half of the free memory.",
        "--weights",
        metavar="auto|float|stored",
    ),
]
TokenizerOption = Annotated[
    Path | None,
    opt(
        "Read the tokenizer.json of this folder in place of the model's own tokenizer.",
        "--tokenizer",
        metavar="DIR",
    ),
]
JsonOption = Annotated[bool, flag("Print one JSON object instead of text.", "--json")]
OverwriteOption = Annotated[bool, flag("Replace an existing model.", "--overwrite")]
