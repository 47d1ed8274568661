r"""The common part of Lark's grammar syntax: text to rules.

    start: pair ("," pair)*             // rules in small letters; the texts are those of start
    pair: NAME "=" (NUMBER | "on"i)     // "..."i: in any letter case
    NAME: /[a-z]\w*/ | "A".."Z"         // terminals in capitals
    %import common.NUMBER
    %ignore " "

| element                     | its texts                                                      |
|-----------------------------|----------------------------------------------------------------|
| ``"text"`` ``"text"i``      | the text; in any letter case                                   |
| ``"a".."z"``                | one character of the range                                     |
| ``/regex/is``               | what the regular expression matches as a whole (Python's syntax) |
| ``rule`` ``TERMINAL``       | the texts of that rule, of that terminal                       |
| ``( ... )`` ``... | ...``   | a group, alternatives; an alternative may be empty             |
| ``[ ... ]``                 | an optional group                                              |
| ``x?`` ``x*`` ``x+`` ``x~n`` ``x~n..m`` | repetition                                         |
| ``... -> name``             | an alias, which changes no text                                |
| ``%ignore x``               | x may stand before every terminal of a rule, and at the end    |
| ``%import common.X``        | a terminal of ``lark_terminals``; ``common (X, Y)``, ``-> NAME`` |
| ``?rule`` ``!rule`` ``rule.1`` | modifiers and priorities, which change no text              |
| ``// ...`` ``# ...``        | a comment, up to the end of the line                           |

A definition ends with its line; the next line may go on with ``|``, and lines may break within
groups.

There is no lexer: a terminal is wherever its text is, as in Lark with ``parser="earley"`` and
``lexer="dynamic_complete"``. So a keyword may also be read as a name, and a non-greedy repetition
reads as a greedy one.

Source: Lark's documentation, "Grammar Reference". Differences: lines may break anywhere within
groups, and terminals may match the empty text.

Left out, and rejected by name: templates, ``%declare``, ``%override``, ``%extend``, imports of
other modules and of files, and flags of regular expressions other than i and s.
"""

from __future__ import annotations

import re
from dataclasses import replace

from refllm.decode.grammar.automata.alphabet import SURROGATES
from refllm.decode.grammar.patterns.unicode_classes import without
from refllm.decode.grammar.rule_grammars.lark_literals import read_pattern, read_string
from refllm.decode.grammar.rule_grammars.lark_terminals import COMMON
from refllm.decode.grammar.rule_grammars.rules import (
    EMPTY,
    Alternatives,
    Characters,
    Concatenation,
    Expression,
    Literal,
    Pattern,
    Reference,
    Repetition,
    Rule,
    RuleSet,
    alternatives,
    concatenation,
    missing_start,
)
from refllm.decode.grammar.rule_grammars.scanner import DIGITS, Scanner
from refllm.errors import did_you_mean

START = "start"
RULE = re.compile(r"_?[a-z][_a-z0-9]*")
NAME = re.compile(r"_?[a-z][_a-z0-9]*|_?[A-Z][_A-Z0-9]*")
WORD = re.compile(r"[A-Za-z_][A-Za-z_0-9]*")
MODIFIERS = re.compile(r"[?!]{1,2}(?=[_a-z])")
PRIORITY = re.compile(r"\.[+-]?[0-9]+")
DIRECTIVE = re.compile(r"%[a-z_]*")
OPERATOR = re.compile(r"[+*]|\?(?![a-z_])")
COUNTS: dict[str, tuple[int, int | None]] = {"?": (0, 1), "*": (0, None), "+": (1, None)}
BLANK = r"[ \t]|\\[ ]*\r?\n|//[^\r\n]*|#[^\r\n]*"
BAR = re.compile(rf"(?:{BLANK}|\s)*\|")
IGNORED = "%ignore"  # the rule of what is ignored; no name of a grammar contains %
WHOLE = "%start"


def parse_lark(text: str, start: str = START) -> RuleSet:
    """The rules of a grammar in Lark's syntax, whose texts are derived from the rule ``start``.

    Raises
    ------
    GrammarError
        with line and column, if the text is not of the common part of Lark's syntax. References
        are checked in ``rule_checks``.
    """
    scanner = Scanner(text, blank=BLANK)
    rules: dict[str, Rule] = {}
    ignored: list[Expression] = []
    scanner.skip(lines=True)
    while not scanner.at_end:
        begin = scanner.offset
        found = _directive(scanner, ignored) if scanner.next_is("%") else [_definition(scanner)]
        for rule in found:
            if rule.name in rules:
                first = rules[rule.name].position.line
                message = f"{rule.name!r} is defined a second time (first on line {first})"
                raise scanner.error(message, begin)
            rules[rule.name] = rule
        _end_of_line(scanner)
    if start not in rules:
        raise missing_start(start, rules)
    return RuleSet(start, rules) if not ignored else _with_ignored(start, rules, ignored)


def _with_ignored(start: str, rules: dict[str, Rule], ignored: list[Expression]) -> RuleSet:
    """The rules, with ignored text before each terminal of a rule and at the end of all."""
    position = rules[start].position
    space = Reference(IGNORED, position)
    spaced = {
        name: replace(rule, body=_spaced(rule.body, space)) if RULE.fullmatch(name) else rule
        for name, rule in rules.items()
    }
    any_ignored = Repetition(alternatives(ignored), 0, None)
    spaced[IGNORED] = Rule(IGNORED, any_ignored, position)
    spaced[WHOLE] = Rule(WHOLE, Concatenation((Reference(start, position), space)), position)
    return RuleSet(WHOLE, spaced)


def _spaced(node: Expression, space: Reference) -> Expression:
    """The tree of a rule with ``space`` before each of its terminals."""
    match node:
        case Concatenation(items):
            return Concatenation(tuple(_spaced(item, space) for item in items))
        case Alternatives(options):
            return Alternatives(tuple(_spaced(option, space) for option in options))
        case Repetition(item, minimum, maximum):
            return Repetition(_spaced(item, space), minimum, maximum)
        case Reference(name) if RULE.fullmatch(name):
            return node
    return Concatenation((space, node))


def _end_of_line(scanner: Scanner) -> None:
    scanner.skip(lines=False)
    if not scanner.at_end and scanner.text[scanner.offset] not in "\r\n":
        raise scanner.error(f"expected the end of the line, found {scanner.found()}")
    scanner.skip(lines=True)


def _definition(scanner: Scanner) -> Rule:
    """``name: alternatives``, with modifiers and priority, up to the end of the line."""
    position = scanner.position()
    scanner.match(MODIFIERS)
    name = scanner.match(NAME)
    if name is None or scanner.peek(WORD):
        raise scanner.error(
            "expected the name of a rule (small letters) or of a terminal (capitals), found "
            f"{scanner.found()}"
        )
    if scanner.next_is("{"):
        raise scanner.error(f"the rule {name!r} has parameters: templates are not supported")
    scanner.match(PRIORITY)
    scanner.skip(lines=False)
    scanner.expect(":", f"after the name {name!r}")
    scanner.skip(lines=False)
    return Rule(name, _alternatives(scanner), position)


def _directive(scanner: Scanner, ignored: list[Expression]) -> list[Rule]:
    """The terminals that a directive defines; what ``%ignore`` names is appended to ``ignored``."""
    begin = scanner.offset
    name = scanner.match(DIRECTIVE)
    scanner.skip(lines=False)
    if name == "%ignore":
        ignored.append(_alternatives(scanner))
        return []
    if name == "%import":
        return _imports(scanner)
    raise scanner.error(f"the directive {name} is not supported", begin)


def _imports(scanner: Scanner) -> list[Rule]:
    """``common.X``, ``common.X -> Y`` or ``common (X, Y)``"""
    begin = scanner.offset
    module = scanner.match(WORD)
    if module != "common":
        raise scanner.error("terminals can be imported from the module 'common' only", begin)
    scanner.skip(lines=False)
    if scanner.take("("):
        with scanner.group(begin):
            imported = [_import(scanner)]
            while scanner.take(","):
                imported.append(_import(scanner))
            scanner.expect(")", "after the names of the import")
        return imported
    scanner.expect(".", "after 'common'")
    return [_import(scanner)]


def _import(scanner: Scanner) -> Rule:
    """``X`` or ``X -> Y``"""
    scanner.skip_in_rule()
    begin = scanner.offset
    position = scanner.position()
    name = scanner.match(WORD) or ""
    if name not in COMMON:
        raise scanner.error(
            f"there is no terminal {name!r} in 'common'{did_you_mean(name, COMMON)}", begin
        )
    scanner.skip_in_rule()
    renamed = _alias(scanner) or name
    scanner.skip_in_rule()
    return Rule(renamed, Pattern(COMMON[name], "", position), position)


def _alias(scanner: Scanner) -> str | None:
    """``-> name``, or None if that does not come next."""
    if not scanner.take("->"):
        return None
    scanner.skip_in_rule()
    name = scanner.match(NAME)
    if name is None:
        raise scanner.error(f"expected a name after '->', found {scanner.found()}")
    scanner.skip_in_rule()
    return name


def _alternatives(scanner: Scanner) -> Expression:
    """``sequence -> alias | sequence | ...``"""
    options = []
    while True:
        options.append(_sequence(scanner))
        _alias(scanner)
        if not scanner.match(BAR):
            return alternatives(options)
        scanner.skip(lines=False)


def _sequence(scanner: Scanner) -> Expression:
    """Elements with their repetitions, until none follows."""
    items: list[Expression] = []
    scanner.skip_in_rule()
    while (element := _element(scanner)) is not None:
        items.append(_repetition(scanner, element))
        scanner.skip_in_rule()
    return concatenation(items)


def _element(scanner: Scanner) -> Expression | None:
    """One element without its repetition; None if none begins here."""
    begin = scanner.offset
    position = scanner.position()
    if scanner.next_is('"'):
        return _string_or_range(scanner)
    if scanner.next_is("/"):
        source, flags = read_pattern(scanner)
        return Pattern(source, flags, position)
    if scanner.take("("):
        return _group(scanner, begin, ")")
    if scanner.take("["):
        return Repetition(_group(scanner, begin, "]"), 0, 1)
    name = scanner.match(NAME)
    if name is None:
        return None
    if scanner.peek(WORD):
        raise scanner.error(
            "a name is in small letters (a rule) or in capitals (a terminal)", begin
        )
    if scanner.next_is("{"):
        raise scanner.error(f"{name!r} has arguments: templates are not supported", begin)
    return Reference(name, position)


def _group(scanner: Scanner, begin: int, end: str) -> Expression:
    """``alternatives``, up to ``end``"""
    with scanner.group(begin):
        inner = _alternatives(scanner)
        scanner.skip(lines=True)
        opened = f"{scanner.text[begin]!r} of {scanner.position(begin)}"
        scanner.expect(end, f"for the {opened}")
    return inner


def _string_or_range(scanner: Scanner) -> Expression:
    """``"text"``, ``"text"i`` or ``"a".."z"``"""
    begin = scanner.offset
    text, ignore_case = read_string(scanner)
    if not scanner.take(".."):
        return Literal(text, ignore_case) if text else EMPTY
    if not scanner.next_is('"'):
        raise scanner.error(f"expected a string after '..', found {scanner.found()}")
    last, last_ignores_case = read_string(scanner)
    if len(text) != 1 or len(last) != 1 or ignore_case or last_ignores_case:
        raise scanner.error("the ends of a range are one character each, without flags", begin)
    if last < text:
        raise scanner.error(f"the range {text!r} to {last!r} is empty", begin)
    return Characters(without(((ord(text), ord(last)),), [SURROGATES]))


def _repetition(scanner: Scanner, element: Expression) -> Expression:
    """The element with the one repetition that may follow it."""
    scanner.skip_in_rule()
    operator = scanner.match(OPERATOR)
    if operator is not None:
        return Repetition(element, *COUNTS[operator])
    if not scanner.take("~"):
        return element
    scanner.skip_in_rule()
    low = scanner.match(DIGITS)
    if low is None:
        raise scanner.error(f"expected a count after '~', found {scanner.found()}")
    minimum = maximum = scanner.count(low)
    scanner.skip_in_rule()
    if scanner.take(".."):
        scanner.skip_in_rule()
        high = scanner.match(DIGITS)
        if high is None:
            raise scanner.error(f"expected a count after '..', found {scanner.found()}")
        maximum = scanner.count(high)
    scanner.check_range(minimum, maximum)
    return Repetition(element, minimum, maximum)
