r"""Strings and regular expressions in the text of a Lark grammar, with their escapes and flags.

| escape in a string                                    | its text                                 |
|-------------------------------------------------------|------------------------------------------|
| ``\n \r \t \f``, ``\xHH``, ``\uHHHH``, ``\UHHHHHHHH`` | that character                           |
| ``\"``, ``\\``                                        | the character after the first ``\``      |
| any other                                             | both characters: ``"\."`` is ``\.``      |

Escapes of a regular expression are left to ``regex``, except that ``\/`` is ``/``.

Source: Lark's documentation, "Grammar Reference", and ``load_grammar.py`` (``eval_escaping``).
"""

from __future__ import annotations

import re

from refllm.decode.grammar.rule_grammars.rules import is_character
from refllm.decode.grammar.rule_grammars.scanner import Scanner

STRING = re.compile(r'"((?:\\.|[^"\\\n])*)"(i?)')
PATTERN = re.compile(r"/(?!/)((?:\\.|[^/\\\n])*)/([a-z]*)")
ESCAPE = re.compile(
    r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([xuU])|(.))", re.DOTALL
)
LETTERS = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", '"': '"', "\\": "\\"}
FLAGS = "is"


def read_string(scanner: Scanner) -> tuple[str, bool]:
    """The text of a string, and whether the flag ``i`` follows it."""
    begin = scanner.offset
    found = STRING.match(scanner.text, begin)
    if found is None:
        raise scanner.error("this string does not end on its line", begin)
    scanner.offset = found.end()

    def unescaped(escape: re.Match[str]) -> str:
        *digits, incomplete, letter = escape.groups()
        code = next(filter(None, digits), None)
        if code is not None and is_character(int(code, 16)):
            return chr(int(code, 16))
        if code is not None or incomplete is not None:
            at = begin + 1 + escape.start()
            raise scanner.error(f"the escape {escape.group()!r} is no character", at)
        return LETTERS.get(letter, escape.group())

    return ESCAPE.sub(unescaped, found.group(1)), found.group(2) == "i"


def read_pattern(scanner: Scanner) -> tuple[str, str]:
    """The source of a regular expression, and its flags."""
    begin = scanner.offset
    found = PATTERN.match(scanner.text, begin)
    if found is None:
        raise scanner.error("this regular expression does not end on its line", begin)
    scanner.offset = found.end()
    source, flags = found.groups()
    for flag in flags:
        if flag not in FLAGS:
            raise scanner.error(f"the flag {flag!r} of a regular expression is not supported")
    return source.replace(r"\/", "/"), flags
