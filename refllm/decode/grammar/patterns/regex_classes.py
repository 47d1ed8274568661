"""The characters that an escape or a class in brackets stands for, read from a pattern's text.

The lower half of the parser in ``regex_syntax.py``, which states what is read and what is not.
"""

from __future__ import annotations

from typing import Literal, NoReturn

from refllm.decode.grammar.automata.alphabet import SURROGATES
from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.patterns.unicode_classes import (
    Set,
    any_case,
    category,
    chars,
    escape_set,
    joined,
    negated,
    without,
)

Dialect = Literal["ecma", "python", "re2"]

_CONTROLS = {"t": "\t", "n": "\n", "r": "\r", "v": "\v", "f": "\f", "0": "\0"}
_HEXADECIMAL = frozenset("0123456789abcdefABCDEF")


class ClassScanner:
    """A place in the text of a pattern, and what reads a set of characters there."""

    def __init__(self, pattern: str, dialect: Dialect) -> None:
        self.text = pattern
        self.dialect = dialect
        self.at = 0
        self.ignore_case = False

    def fail(self, what: str, at: int | None = None) -> NoReturn:
        shown = self.text if len(self.text) <= 60 else self.text[:57] + "..."
        place = self.at if at is None else at
        raise GrammarError(f"regular expression {shown!r}: {what}, at position {place}")

    def peek(self, text: str) -> bool:
        return self.text.startswith(text, self.at)

    def take(self, text: str) -> bool:
        found = self.peek(text)
        if found:
            self.at += len(text)
        return found

    def escaped_set(self) -> Set:
        """The characters of an escape, inside of a class or outside."""
        start = self.at
        letter = self.text[start + 1 : start + 2]
        self.at += 2
        if letter in ("d", "w", "s"):
            return escape_set(letter, self.dialect)
        if letter in ("D", "W", "S"):
            return negated(escape_set(letter.lower(), self.dialect))
        if letter in ("p", "P"):
            return self.property_set(start, inverted=letter == "P")
        code = self.code_point(letter, start)
        return ((code, code),)

    def property_set(self, start: int, *, inverted: bool) -> Set:
        """``\\p{name}``, or in RE2 ``\\pN`` with a name of one letter."""
        end = self.text.find("}", self.at)
        if self.peek("{") and end > 0:
            name = self.text[self.at + 1 : end]
            self.at = end + 1
        elif self.dialect == "re2":
            name = self.text[self.at : self.at + 1]
            self.at += 1
        else:
            self.fail("a Unicode property lacks its name in braces", start)
        if name.startswith("^") and self.dialect == "re2":
            name = name[1:]
            inverted = not inverted
        members = category(name)
        if members is None:
            self.fail(f"the Unicode property {name!r} is not supported", start)
        return negated(members) if inverted else members

    def code_point(self, letter: str, start: int) -> int:
        """The character that an escape stands for, ``letter`` being what follows the backslash."""
        if letter == "":
            self.fail("a backslash ends it", start)
        if letter in _CONTROLS:
            if letter == "0" and self.text[self.at : self.at + 1].isdecimal():
                self.fail("octal escapes are not supported", start)
            return ord(_CONTROLS[letter])
        if letter == "a" and self.dialect != "ecma":
            return 0x07
        if letter == "c" and self.text[self.at : self.at + 1].isascii():
            control = self.text[self.at : self.at + 1]
            if control.isalpha():
                self.at += 1
                return ord(control) % 32
        if letter == "x":
            return self.hexadecimal(2, start)
        if letter == "u":
            return self.unicode_escape(start)
        if letter == "U" and self.dialect == "python":
            return self.hexadecimal(8, start)
        if letter.isascii() and letter.isalnum():
            self.fail(f"the escape '\\{letter}' is not known", start)
        return ord(letter)

    def hexadecimal(self, digits: int, start: int) -> int:
        """``digits`` hexadecimal digits, or any number of them in braces."""
        if self.peek("{"):
            end = self.text.find("}", self.at)
            text = self.text[self.at + 1 : end]
            self.at = end + 1
        else:
            text = self.text[self.at : self.at + digits]
            self.at += digits
            if len(text) < digits:
                text = ""
        if not text or not _HEXADECIMAL.issuperset(text):
            self.fail("an escape lacks hexadecimal digits", start)
        code = int(text, 16)
        if code > 0x10FFFF:
            self.fail("an escape is no Unicode character", start)
        return code

    def unicode_escape(self, start: int) -> int:
        """``\\uXXXX``, two of them for a pair of surrogates, or ``\\u{X…}``."""
        code = self.hexadecimal(4, start)
        if 0xD800 <= code <= 0xDBFF and self.peek("\\u"):
            here = self.at
            self.at += 2
            low = self.hexadecimal(4, here)
            if 0xDC00 <= low <= 0xDFFF:
                return 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00)
            self.at = here
        return code

    def bracket(self) -> Set:
        """A class in brackets."""
        start = self.at
        self.at += 1
        inverted = self.take("^")
        found = list(chars("]")) if self.dialect != "ecma" and self.take("]") else []
        while not self.take("]"):
            if self.at >= len(self.text):
                self.fail("a class is not closed", start)
            found += self.class_item()
        members = joined(found)
        if self.ignore_case:
            members = any_case(members)
        return negated(members) if inverted else without(members, [SURROGATES])

    def class_item(self) -> Set:
        """One character, escape or range of a class."""
        start = self.at
        low = self.class_atom()
        if not (self.peek("-") and not self.peek("-]")):
            return low
        if len(low) != 1 or low[0][0] != low[0][1]:
            return low  # after \\w and the like the dash stands for itself
        self.at += 1
        if self.at >= len(self.text):
            self.fail("a class is not closed", start)
        high = self.class_atom()
        if len(high) != 1 or high[0][0] != high[0][1]:
            return joined([*low, *high, *chars("-")])
        if high[0][0] < low[0][0]:
            self.fail("a range of a class is out of order", start)
        return ((low[0][0], high[0][0]),)

    def class_atom(self) -> Set:
        letter = self.text[self.at]
        if letter != "\\":
            self.at += 1
            return chars(letter)
        if self.text.startswith("\\b", self.at):
            self.at += 2
            return chars("\b")
        return self.escaped_set()
