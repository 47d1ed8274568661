r"""GBNF, the grammar syntax of llama.cpp: text to rules.

    root  ::= "[" (item ("," ws item)*)? "]"    # the texts are those of ``root``
    item  ::= [0-9]{1,3} | [^"\n] | .
    ws    ::= " "?

| element                     | its texts                                                      |
|-----------------------------|----------------------------------------------------------------|
| ``"text"``                  | the text; escapes as below                                     |
| ``[a-zA-Z_]`` ``[^...]``    | one character of the set, or one that is not in it             |
| ``.``                       | any one character, an end of line too                          |
| ``name``                    | letters, digits, ``-`` and ``_``: the texts of that rule       |
| ``( ... )`` ``... | ...``   | a group, alternatives; an alternative may be empty             |
| ``x?`` ``x*`` ``x+``        | repetition                                                     |
| ``x{m}`` ``x{m,}`` ``x{m,n}`` | counted repetition; ``{,n}`` counts from 0                   |
| ``# ...``                   | a comment, up to the end of the line                           |

Escapes in texts and sets: ``\n \r \t \\ \" \[ \] \- \/ \^``, ``\xHH``, ``\uHHHH``,
``\UHHHHHHHH``. A rule ends with its line; the line may break after ``::=``, before and after
``|``, and anywhere within parentheses.

Source: llama.cpp, ``grammars/README.md`` and ``src/llama-grammar.cpp``. More is read than there:
left recursion, also that of ``x?+``; ``{,n}``; lines that begin with ``|``; names with ``_``; the
escapes ``\-``, ``\/`` and ``\^``. Less is read: a rule that is defined twice, an empty set and
a range whose end comes first are errors.

Left out: tokens of the vocabulary as elements (``<think>``, ``<[1000]>``), which are rejected by
name.
"""

from __future__ import annotations

import re

from refllm.decode.grammar.automata.alphabet import SURROGATES
from refllm.decode.grammar.patterns.unicode_classes import ANY, joined, without
from refllm.decode.grammar.rule_grammars.rules import (
    Characters,
    Concatenation,
    Expression,
    Literal,
    Reference,
    Rule,
    RuleSet,
    alternatives,
    concatenation,
    is_character,
    missing_start,
    repeated,
)
from refllm.decode.grammar.rule_grammars.scanner import DIGITS, Scanner

START = "root"
NAME = re.compile(r"[A-Za-z0-9_-]+")
BAR = re.compile(r"\s*\|")
ESCAPES = {"n": "\n", "r": "\r", "t": "\t"} | {each: each for each in '\\"[]-/^'}
HEX_LENGTHS = {"x": 2, "u": 4, "U": 8}
OPERATORS: dict[str, tuple[int, int | None]] = {"?": (0, 1), "*": (0, None), "+": (1, None)}


def parse_gbnf(text: str, start: str = START) -> RuleSet:
    """The rules of a grammar in GBNF, whose texts are derived from the rule ``start``.

    Raises
    ------
    GrammarError
        with line and column, if the text is not GBNF. References are checked in ``rule_checks``.
    """
    scanner = Scanner(text, blank=r"[ \t]|#[^\r\n]*")
    rules: dict[str, Rule] = {}
    scanner.skip(lines=True)
    while not scanner.at_end:
        begin = scanner.offset
        rule = _rule(scanner)
        if rule.name in rules:
            first = rules[rule.name].position.line
            message = f"the rule {rule.name!r} is defined a second time (first on line {first})"
            raise scanner.error(message, begin)
        rules[rule.name] = rule
        scanner.skip(lines=True)
    if start not in rules:
        raise missing_start(start, rules)
    return RuleSet(start, rules)


def _rule(scanner: Scanner) -> Rule:
    """``name ::= alternatives``, up to the end of the line."""
    position = scanner.position()
    name = scanner.match(NAME)
    if name is None:
        raise scanner.error(f"expected the name of a rule, found {scanner.found()}")
    scanner.skip(lines=False)
    scanner.expect("::=", f"after the name {name!r}")
    scanner.skip(lines=True)
    body = _alternatives(scanner)
    if not scanner.at_end and scanner.text[scanner.offset] not in "\r\n":
        raise scanner.error(f"expected the end of the rule {name!r}, found {scanner.found()}")
    return Rule(name, body, position)


def _alternatives(scanner: Scanner) -> Expression:
    """``sequence | sequence | ...``"""
    options = [_sequence(scanner)]
    while scanner.match(BAR):
        scanner.skip(lines=True)
        options.append(_sequence(scanner))
    return alternatives(options)


def _sequence(scanner: Scanner) -> Expression:
    """Elements with their repetitions, until none follows."""
    items: list[Expression] = []
    while (element := _element(scanner)) is not None:
        items.append(_repeated(scanner, element))
        scanner.skip_in_rule()
    return concatenation(items)


def _element(scanner: Scanner) -> Expression | None:
    """One element without its repetition; None if none begins here."""
    begin = scanner.offset
    if scanner.take('"'):
        return _literal(scanner)
    if scanner.take("["):
        return _characters(scanner)
    if scanner.take("("):
        return _group(scanner)
    if scanner.take("."):
        return Characters(ANY)
    position = scanner.position()
    name = scanner.match(NAME)
    if name is not None:
        return Reference(name, position)
    if scanner.next_is("<") or scanner.next_is("!<"):
        raise scanner.error("tokens as elements of a grammar are not supported: write text", begin)
    return None


def _repeated(scanner: Scanner, element: Expression) -> Expression:
    """The element with the repetitions that follow it, of which there may be several."""
    result = element
    while True:
        scanner.skip_in_rule()
        operator = next((each for each in OPERATORS if scanner.take(each)), None)
        if operator is not None:
            minimum, maximum = OPERATORS[operator]
        elif scanner.take("{"):
            minimum, maximum = _counts(scanner)
        else:
            return result
        first = result is element
        result = repeated(result, minimum, maximum)
        if not first and result.item is not element:
            raise scanner.error("counted repetitions of a repetition need parentheses")


def _counts(scanner: Scanner) -> tuple[int, int | None]:
    """``m}``, ``m,}``, ``m,n}`` or ``,n}``."""
    low = scanner.match(DIGITS)
    minimum = 0 if low is None else scanner.count(low)
    maximum: int | None = minimum
    if scanner.take(","):
        high = scanner.match(DIGITS)
        maximum = None if high is None else scanner.count(high)
        if low is None and high is None:
            raise scanner.error("a repetition without counts")
    elif low is None:
        raise scanner.error(f"expected a count after '{{', found {scanner.found()}")
    scanner.expect("}", "after the counts of a repetition")
    scanner.check_range(minimum, maximum)
    return minimum, maximum


def _group(scanner: Scanner) -> Expression:
    """``alternatives )``"""
    begin = scanner.offset - 1
    with scanner.group(begin):
        scanner.skip(lines=True)
        inner = _alternatives(scanner)
        scanner.expect(")", f"for the '(' of {scanner.position(begin)}")
    return inner


def _literal(scanner: Scanner) -> Expression:
    """``text"``"""
    begin = scanner.offset - 1
    letters = []
    while not scanner.take('"'):
        letters.append(_character(scanner, begin, "text"))
    return Literal("".join(letters)) if letters else Concatenation(())


def _characters(scanner: Scanner) -> Characters:
    """``a-z...]`` or ``^a-z...]``"""
    begin = scanner.offset - 1
    negated = scanner.take("^")
    ranges = []
    while not scanner.take("]"):
        at = scanner.offset
        first = last = ord(_character(scanner, begin, "set"))
        if scanner.next_is("-") and not scanner.next_is("-]"):
            scanner.take("-")
            last = ord(_character(scanner, begin, "set"))
        if last < first:
            raise scanner.error(f"the range {chr(first)!r} to {chr(last)!r} is empty", at)
        ranges.append((first, last))
    if not ranges:
        raise scanner.error("a set without characters", begin)
    members = joined(ranges)
    return Characters(without(ANY, members) if negated else without(members, [SURROGATES]))


def _character(scanner: Scanner, begin: int, what: str) -> str:
    """The next character of a text or a set that begins at ``begin``, escapes resolved."""
    if scanner.at_end or (what == "text" and scanner.text[scanner.offset] in "\r\n"):
        raise scanner.error(f"this {what} does not end", begin)
    at = scanner.offset
    letter = scanner.text[at]
    scanner.offset += 1
    if letter != "\\":
        return letter
    escape = scanner.text[scanner.offset : scanner.offset + 1]
    scanner.offset += 1
    if escape in HEX_LENGTHS:
        return _hexadecimal(scanner, HEX_LENGTHS[escape], at)
    if escape not in ESCAPES or not escape:
        raise scanner.error(f"unknown escape {scanner.text[at : at + 2]!r}", at)
    return ESCAPES[escape]


def _hexadecimal(scanner: Scanner, length: int, begin: int) -> str:
    digits = scanner.text[scanner.offset : scanner.offset + length]
    scanner.offset += length
    if not re.fullmatch(rf"[0-9a-fA-F]{{{length}}}", digits):
        raise scanner.error(f"expected {length} hexadecimal digits", begin)
    code = int(digits, 16)
    if not is_character(code):
        raise scanner.error(f"\\{digits} is no character", begin)
    return chr(code)
