"""String formats of JSON Schema as automata over characters.

A format means what the ``FormatChecker()`` of the package ``jsonschema`` accepts, in every draft,
with its optional packages installed; a format that it does not know is an annotation. So an email
is any string with an @, a time is hours, minutes and seconds without a zone, and a leap day needs
a leap year. Where an exact automaton would be too large, or the format is not regular, ``accepted``
holds only strings that are accepted for certain and ``rejected`` only strings that are not.

| format | difference from the checker |
|---|---|
| regex | a subset: ``format_patterns.regex_subset`` |
| idn-hostname | a subset: labels of letters and digits of ASCII and hyphens |
| uuid | a subset: hexadecimal digits and hyphens; what ``uuid.UUID`` removes is not accepted |
| time, relative-json-pointer | a subset: digits of ASCII |
| hostname | a subset: letters and digits of ASCII, 253 characters with a final dot |
| duration | neither accepted nor rejected with an exponent of more than five digits |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from refllm.decode.grammar.automata.alphabet import CHARACTERS
from refllm.decode.grammar.automata.dfa import DFA
from refllm.decode.grammar.automata.dfa_builders import anything
from refllm.decode.grammar.automata.dfa_operations import complement
from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.json_scalars import format_patterns as patterns
from refllm.decode.grammar.patterns.regex import from_pattern

Languages = tuple[tuple[DFA, int, int | None], ...]  # (automaton, least length, greatest length)


@dataclass(frozen=True)
class FormatRule:
    """What a format accepts. Automata are built when they are asked for, once."""

    name: str
    pattern: Callable[[], str]
    possible: Callable[[], str] | None  # of all strings that may be accepted; None: unknown
    maximum: int | None = None  # characters
    exact: bool = True

    @property
    def accepted(self) -> Languages:
        """Languages whose strings are accepted, as an "or"."""
        return ((_automaton(self.pattern()), 0, self.maximum),)

    def rejected(self) -> Languages:
        """Languages whose strings are not accepted, as an "or".

        ``GrammarError`` if the format is known only in part.
        """
        if self.possible is None:
            raise GrammarError(
                f"the opposite of the format {self.name!r} cannot be enforced: the format is known "
                "in part only",
                keyword="format",
            )
        others = (_complement(self.possible()), 0, None)
        if self.maximum is None:
            return (others,)
        return (others, (anything(CHARACTERS), self.maximum + 2, None))


@lru_cache(maxsize=64)
def _automaton(pattern: str) -> DFA:
    return from_pattern(pattern, search=False, dialect="python")


@lru_cache(maxsize=64)
def _complement(pattern: str) -> DFA:
    return complement(_automaton(pattern))


def format_rule(name: str) -> FormatRule | None:
    """The rule of a format; None if it is unknown and therefore an annotation."""
    return _RULES.get(name)


def _exact(name: str, pattern: str) -> FormatRule:
    return FormatRule(name, lambda: pattern, lambda: pattern)


def _reference(name: str, *, relative: bool, international: bool) -> FormatRule:
    @lru_cache
    def pattern() -> str:
        return patterns.reference(relative=relative, international=international)

    return FormatRule(name, pattern, pattern)


_ANYTHING_WITH_AT = r"[\s\S]*@[\s\S]*"
_RULES = {
    rule.name: rule
    for rule in (
        _exact("date", patterns.DATE),
        _exact("date-time", patterns.DATE_TIME),
        _exact("email", _ANYTHING_WITH_AT),
        _exact("idn-email", _ANYTHING_WITH_AT),
        _exact("ipv4", patterns.IPV4),
        _exact("ipv6", patterns.IPV6),
        _exact("json-pointer", patterns.JSON_POINTER),
        _exact("uri-template", patterns.URI_TEMPLATE),
        _exact("color", patterns.COLOR),
        _reference("uri", relative=False, international=False),
        _reference("uri-reference", relative=True, international=False),
        _reference("iri", relative=False, international=True),
        _reference("iri-reference", relative=True, international=True),
        FormatRule(
            "duration",
            lambda: patterns.duration("0*[0-9]{1,5}"),
            lambda: patterns.duration("[0-9]+"),
            exact=False,
        ),
        FormatRule(
            "time",
            lambda: patterns.clock_time("[0-9]"),
            lambda: patterns.clock_time("(?:[0-9]|[^\\x00-\\x7f])"),
            exact=False,
        ),
        FormatRule(
            "hostname",
            lambda: patterns.hostname(patterns.LETTER),
            lambda: patterns.hostname(f"(?:{patterns.POSSIBLE_LETTER})"),
            patterns.HOSTNAME_LENGTH,
            exact=False,
        ),
        FormatRule("uuid", lambda: patterns.UUID, lambda: patterns.POSSIBLE_UUID, exact=False),
        FormatRule(
            "relative-json-pointer",
            lambda: patterns.RELATIVE_JSON_POINTER,
            lambda: patterns.POSSIBLE_RELATIVE_JSON_POINTER,
            exact=False,
        ),
        FormatRule("regex", patterns.regex_subset, None, exact=False),
        FormatRule(
            "idn-hostname",
            lambda: patterns.IDN_HOSTNAME,
            None,
            patterns.HOSTNAME_LENGTH,
            exact=False,
        ),
    )
}
FORMATS = tuple(_RULES)
