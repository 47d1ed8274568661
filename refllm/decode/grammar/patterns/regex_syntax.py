"""From the text of a regular expression to its syntax tree (``regex_tree.py``).

Read is the common part of ECMA 262, Python's ``re`` and RE2.

Groups leave no trace: only *whether* a text matches matters, not what a group captured. Where the
dialects differ, ``unicode_classes.py`` has the table of classes, and: ``[]`` and ``[^]`` are
the empty class and any character in ECMA 262 alone; ``{,m}`` counts in Python alone; ``$`` may
stand before a final line end in Python alone. Patterns are read as Unicode mode of ECMA 262 reads
them, but more leniently, since real schemas need it: an escaped character without a meaning of
its own (``\\-``, ``\\_``) stands for itself, so do ``]``, ``{`` and ``}`` that begin or end
nothing, and ``\\A`` and ``\\Z`` are the beginning and the end of the text.

**Rejected by name** (``GrammarError``): back-references, lookbehind, atomic groups, possessive
quantifiers, conditional groups, flags other than i and s, unknown escapes and properties.
"""

from __future__ import annotations

from refllm.decode.grammar.automata.alphabet import SURROGATES
from refllm.decode.grammar.patterns.regex_classes import ClassScanner, Dialect
from refllm.decode.grammar.patterns.regex_tree import (
    BEGIN,
    BOUNDARY,
    END,
    END_OR_NEWLINE,
    NOT_BOUNDARY,
    Assertion,
    Choice,
    Lookahead,
    Node,
    Repeat,
    Sequence,
    Symbols,
)
from refllm.decode.grammar.patterns.unicode_classes import (
    ANY,
    Set,
    any_case,
    chars,
    dot_set,
    joined,
    without,
)

MAX_DEPTH = 100  # groups in groups
_QUANTIFIERS = {"*": (0, None), "+": (1, None), "?": (0, 1)}


def parse(pattern: str, dialect: Dialect = "ecma") -> Node:
    """The syntax tree of a regular expression.

    Raises ``GrammarError`` with the position of what is malformed or not supported.
    """
    return _Parser(pattern, dialect).parse()


class _Parser(ClassScanner):
    """Recursive descent over the text: choice → sequence → quantified atom."""

    def __init__(self, pattern: str, dialect: Dialect) -> None:
        super().__init__(pattern, dialect)
        self.depth = 0
        self.dot_all = False

    def parse(self) -> Node:
        node = self.choice()
        if self.at < len(self.text):
            self.fail("unbalanced ')'")
        return node

    # --- structure ----------------------------------------------------------------------------

    def choice(self) -> Node:
        parts = [self.sequence()]
        while self.take("|"):
            parts.append(self.sequence())
        if len(parts) > 1 and all(isinstance(part, Symbols) for part in parts):
            # One class in place of a choice of characters: one position.
            return Symbols(joined(pair for part in parts for pair in _members(part)))
        return parts[0] if len(parts) == 1 else Choice(tuple(parts))

    def sequence(self) -> Node:
        parts: list[Node] = []
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            before = self.at
            atom = self.atom()
            if atom is None:
                continue
            parts.append(self.quantified(atom, before))
        return parts[0] if len(parts) == 1 else Sequence(tuple(parts))

    def quantified(self, atom: Node, start: int) -> Node:
        bounds = self.quantifier()
        if bounds is None:
            return atom
        if self.peek("+"):
            self.fail("possessive quantifiers are not supported")
        self.take("?")  # lazy: the same words
        after = self.at
        if self.quantifier() is not None:
            self.fail("a quantifier follows a quantifier", after)
        if bounds[1] is not None and bounds[1] < bounds[0]:
            self.fail("the numbers of a quantifier are out of order", start)
        return Repeat(atom, *bounds)

    def quantifier(self) -> tuple[int, int | None] | None:
        """The bounds of a quantifier that stands here, or None if none does."""
        if self.at >= len(self.text):
            return None
        letter = self.text[self.at]
        if letter in _QUANTIFIERS:
            self.at += 1
            return _QUANTIFIERS[letter]
        end = self.text.find("}", self.at)
        if letter != "{" or end < 0:
            return None
        low, comma, high = self.text[self.at + 1 : end].partition(",")
        if not all(part == "" or (part.isascii() and part.isdecimal()) for part in (low, high)):
            return None
        if not low and not (comma and high and self.dialect == "python"):
            return None
        self.at = end + 1
        minimum = self.count(low) if low else 0
        if not comma:
            return minimum, minimum
        return minimum, self.count(high) if high else None

    def count(self, digits: str) -> int:
        if len(digits) > 9:
            self.fail(f"the repetition count {digits[:12]}… is too large")
        return int(digits)

    # --- atoms --------------------------------------------------------------------------------

    def atom(self) -> Node | None:
        """What one quantifier applies to; None for a comment or flags, which match nothing."""
        letter = self.text[self.at]
        if letter == "(":
            return self.group()
        if letter == "[":
            return Symbols(self.bracket())
        if letter == "\\":
            return self.escape()
        if letter in "*+?":
            self.fail(f"the quantifier {letter!r} has nothing to repeat")
        if letter == "{":
            here = self.at
            if self.quantifier() is not None:
                self.fail("a quantifier has nothing to repeat", here)
        self.at += 1
        if letter == "^":
            return Assertion(BEGIN)
        if letter == "$":
            return Assertion(END_OR_NEWLINE if self.dialect == "python" else END)
        if letter == ".":
            return Symbols(ANY if self.dot_all else dot_set(self.dialect))
        return self.character(letter)

    def character(self, letter: str) -> Symbols:
        members = without(chars(letter), [SURROGATES]) if letter > "\ud7ff" else chars(letter)
        return Symbols(any_case(members) if self.ignore_case else members)

    def group(self) -> Node | None:
        start = self.at
        self.at += 1
        flags = (self.ignore_case, self.dot_all)
        if self.take("?"):
            kind = self.group_kind(start)
            if kind is None:
                return None
        else:
            kind = ":"
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.fail(f"groups are nested more than {MAX_DEPTH} deep", start)
        node = self.choice()
        self.depth -= 1
        if not self.take(")"):
            self.fail("a group is not closed", start)
        self.ignore_case, self.dot_all = flags
        return node if kind == ":" else Lookahead(node, kind == "=")

    def group_kind(self, start: int) -> str | None:
        """After ``(?``: ``":"`` for a plain group, ``"="``, ``"!"``, or None if nothing follows."""
        for kind in (":", "=", "!"):
            if self.take(kind):
                return kind
        if self.peek("<=") or self.peek("<!"):
            self.fail("lookbehind is not supported", start)
        if self.peek("P=") or self.peek("P>"):
            self.fail("back-references are not supported", start)
        if self.take("P<") or self.take("<"):
            name, closed, _ = self.text[self.at :].partition(">")
            if not closed or not name.isidentifier():
                self.fail("the name of a group is malformed", start)
            self.at += len(name) + 1
            return ":"
        if self.peek("#"):
            end = self.text.find(")", self.at)
            if end < 0:
                self.fail("a comment is not closed", start)
            self.at = end + 1
            return None
        if self.peek(">"):
            self.fail("atomic groups are not supported", start)
        if self.peek("("):
            self.fail("conditional groups are not supported", start)
        return self.flags(start)

    def flags(self, start: int) -> str | None:
        """``(?i)`` and ``(?i:…)``; the former holds to the end of the group around it."""
        value = True
        while self.at < len(self.text) and self.text[self.at] not in ":)":
            letter = self.text[self.at]
            if letter == "-" and value:
                value = False
            elif letter == "i":
                self.ignore_case = value
            elif letter == "s":
                self.dot_all = value
            elif letter != "u":
                self.fail(f"the group or flag '(?{letter}' is not supported", start)
            self.at += 1
        if self.take(":"):
            return ":"
        if not self.take(")"):
            self.fail("a group is not closed", start)
        return None

    def escape(self) -> Node:
        start = self.at
        letter = self.text[start + 1 : start + 2]
        if letter in ("b", "B"):
            self.at += 2
            return Assertion(BOUNDARY if letter == "b" else NOT_BOUNDARY)
        if letter == "A":
            self.at += 2
            return Assertion(BEGIN)
        if letter in ("Z", "z"):
            self.at += 2
            return Assertion(END)
        if letter == "k" or (letter.isascii() and letter.isdecimal() and letter != "0"):
            self.fail("back-references are not supported")
        members = without(self.escaped_set(), [SURROGATES])
        return Symbols(any_case(members) if self.ignore_case else members)


def _members(node: Node) -> Set:
    return node.members if isinstance(node, Symbols) else ()
