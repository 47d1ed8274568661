"""Regular expressions against Python's ``re`` and against derivatives, on all short texts."""

from __future__ import annotations

import re
import time
from contextlib import suppress

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from automata import LETTERS, all_texts, patterns
from refllm.decode.grammar.automata.dfa import DFA
from refllm.decode.grammar.automata.dfa_minimization import minimize, same_language
from refllm.decode.grammar.automata.dfa_operations import MAX_STATES, complement, with_length
from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.patterns.derivatives import matches
from refllm.decode.grammar.patterns.regex import COUNTED, from_pattern, from_pattern_with_length

TEXTS = all_texts(LETTERS, 4)


def supported(pattern: str, *, search: bool, dialect: str = "ecma") -> DFA:
    """The automaton; a random pattern with what is not supported is left out."""
    try:
        return from_pattern(pattern, search=search, dialect=dialect)
    except GrammarError as error:
        if "at the beginning of a lookahead" not in str(error):
            raise
    assume(False)
    raise AssertionError


def accepted(pattern: str, *, search: bool, dialect: str) -> list[str]:
    dfa = supported(pattern, search=search, dialect=dialect)
    return [text for text in TEXTS if dfa.matches(text)]


@pytest.mark.theorem(
    "a pattern accepts exactly what Python's re.search and re.fullmatch accept, on all texts of "
    "4 characters or fewer over 4 letters",
    source="re",
)
@given(patterns(lookaheads=True))
@example("(?:^a|b)$")
@example(r"(?:a|^)*\b-")
@example("(?:(?:^){2}a){1,2}")
@example("(?:a$|\n)*")
@example("(?:(?:a|\\b){2}){2}$")
@example(r"(?:\ba-|a|\b){2}")
@example("((?!ab).)*$")
@example("^(?=.*a)(?=.*b)[ab]{2,3}$")
@example("a(?!$)")
@example("(?:(?=a)[ab]|-(?!-))*")
@example("(?!(?!a))")
@example("(?!)|(?=)")
def test_accepts_what_re_accepts(pattern: str):
    compiled = re.compile(pattern)
    found = accepted(pattern, search=True, dialect="python")
    whole = accepted(pattern, search=False, dialect="python")
    # Before Python 3.14, \\B does not match in the empty text.
    start = 1 if r"\B" in pattern else 0
    texts = TEXTS[start:]
    assert [t for t in found if t in texts] == [t for t in texts if compiled.search(t)]
    assert [t for t in whole if t in texts] == [t for t in texts if compiled.fullmatch(t)]


@pytest.mark.theorem(
    "a pattern accepts exactly what its derivatives accept, on all texts of 4 characters or "
    "fewer over 4 letters",
    source="Brzozowski 1964",
)
@given(patterns(lookaheads=True), st.booleans(), st.sampled_from(["ecma", "python", "re2"]))
@example("(?:x|^){2}a", True, "ecma")
@example(r"a\B", False, "ecma")
@example("a$", True, "ecma")
@example("^$", True, "python")
def test_accepts_what_derivatives_accept(pattern: str, search: bool, dialect: str):
    found = accepted(pattern, search=search, dialect=dialect)
    short = [text for text in TEXTS if len(text) < 4]
    assert [text for text in found if len(text) < 4] == [
        text for text in short if matches(pattern, text, search=search, dialect=dialect)
    ]


@given(patterns(lookaheads=True))
def test_the_automaton_is_minimal_and_lookahead_is_complement(pattern: str):
    dfa = supported(pattern, search=True)
    negated = supported(f"^(?![^]*(?:{pattern}))", search=True)
    assert minimize(dfa).states == dfa.states
    if not re.search(r"\^|\\[bB]|\?", pattern):
        assert same_language(negated, complement(dfa))


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("^[a-f0-9]{8}$", ["c0ffee00"], ["c0ffee0", "c0ffee000", "C0FFEE00", "c0ffee00\n"]),
        ("^dev|rc$", ["dev", "devil", "my rc"], ["a dev", "rcs"]),
        ("(^Hpt_|_Armour_)", ["Hpt_x", "x_Armour_"], ["xHpt_"]),
        ("^([^,]|$)", ["", "a,"], [","]),
        ("^$|^x$", ["", "x"], ["xx"]),
        (r"\bcat\b", ["cat", "a cat.", "-cat-"], ["concat", "cat_", "cats"]),
        (r"^\p{Lu}\p{L}*$", ["Élan", "Δx"], ["élan", "X1"]),
        (r"^\P{Nd}$", ["x"], ["٣"]),
        (r"^\p{General_Category=Uppercase_Letter}$", ["Ä"], ["ä"]),
        (r"^\u00e9\xe9\u{e9}$", ["ééé"], ["éé"]),
        (r"^\ud83d\ude00$", ["😀"], ["\ufffd"]),
        ("^😀{2}$", ["😀😀"], ["😀"]),
        (r"^\cA\0\/\-\_$", ["\x01\0/-_"], ["A"]),
        ("^(?<year>[0-9]{4})(?P<rest>x)$", ["2026x"], ["2026"]),
        ("^[\\w-.]+$", ["a-.b"], ["a b"]),
        ("^[]$", [], ["", "]"]),
        ("^[^]$", ["\n", "]"], [""]),
        ("^x{,2}$", ["x{,2}"], ["xx"]),
        ("^a]}{$", ["a]}{"], ["a"]),
        ("^(?i:straße)$", ["STRAßE", "straße"], ["strasse"]),
        ("(?i)^[a-c]$", ["B", "b"], ["d"]),
        ("^(?s:.)$", ["\n"], [""]),
        ("^.$", ["x", "\x85"], ["\n", "\r", "\u2028"]),
        ("^((?!mode)(?!Mode).)*$", ["mod", ""], ["a mode", "Mode"]),
        ("^(?!.*--)[a-z-]+$", ["a-b"], ["a--b"]),
        ("^(?=.*[0-9])(?=.*[a-z]).{3,}$", ["ab1"], ["abc", "a1"]),
        ("", ["", "x"], []),
        (r"^[\b\x41-\x43]$", ["\b", "B"], ["b", "D", "-"]),
        (r"^[a-\d]$", ["a", "-", "7"], ["b"]),
        (r"^[\d-z]$", ["z", "-", "7"], ["a"]),
        ("^[a-]$", ["a", "-"], ["b"]),
        ("^[-a]$", ["a", "-"], ["b"]),
        ("^[^^]$", ["a"], ["^"]),
        (r"^[\]\\[]$", ["]", "\\", "["], ["a"]),
        ("^a(?#a comment)b$", ["ab"], ["a"]),
        ("^(?i:a(?-i:b))c$", ["Abc", "abc"], ["aBc", "abC"]),
        ("^((?i)a)b$", ["Ab"], ["AB"]),
        ("^(?i:[^a])$", ["b"], ["a", "A"]),
        (r"^(?i:\u004b)$", ["k", "K", "\u212a"], ["l"]),
        (r"^[\uD800-\uDFFF]$", [], ["a", "-"]),
        (r"^[\ud83d\ude00-\u{1F610}]$", ["\U0001f605"], ["a", "\U0001f611"]),
        (r"^(?i:[a-\u{ff}])$", ["A", "a", "\u0178"], ["@", "[", "\u0100"]),
        (r"^(?i:[\u0100-\u017f])$", ["s", "S", "\u017f"], ["r", "t"]),
        ("^a{2}{$", ["aa{"], ["aa"]),
        ("^a{,}$", ["a{,}"], ["a"]),
        ("^a{2,$", ["a{2,"], ["aa"]),
        ("^(a|b|[cd])$", ["a", "b", "c", "d"], ["ab", ""]),
        ("^(|a)$", ["", "a"], ["aa"]),
    ],
)  # fmt: skip
def test_ecma_examples(pattern: str, yes: list[str], no: list[str]):
    dfa = from_pattern(pattern, search=True)
    assert [text for text in yes if not dfa.matches(text)] == []
    assert [text for text in no if dfa.matches(text)] == []


@pytest.mark.parametrize(
    ("pattern", "text", "accepting"),
    [
        (r"^\d$", "٣", {"python"}),
        (r"^\w$", "é", {"python"}),
        (r"^\s$", "\x1c", {"python"}),
        (r"^\s$", "\ufeff", {"ecma"}),
        (r"^\s$", "\v", {"ecma", "python"}),
        ("^.$", "\r", {"python", "re2"}),
        ("^a$", "a\n", {"python"}),
        ("^[]a]$", "]", {"python", "re2"}),
        ("^x{,2}$", "xx", {"python"}),
        (r"^\pL{2}$", "éa", {"re2"}),
        (r"^\p{^L}$", "1", {"re2"}),
        (r"^\a$", "\a", {"python", "re2"}),
        (r"^\U0001f600$", "\U0001f600", {"python"}),
        (r"^\A\w\Z$", "x", {"ecma", "python", "re2"}),
    ],
)
def test_where_the_dialects_differ(pattern: str, text: str, accepting: set[str]):
    found = set()
    for dialect in ("ecma", "python", "re2"):
        with suppress(GrammarError):
            if from_pattern(pattern, search=True, dialect=dialect).matches(text):
                found.add(dialect)
    assert found == accepting


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        ("(a", "a group is not closed, at position 0"),
        ("a)", r"unbalanced '\)', at position 1"),
        ("[a", "a class is not closed, at position 0"),
        ("[b-a]", "out of order"),
        ("a{3,2}", "out of order"),
        ("*a", "nothing to repeat"),
        ("{2}", "nothing to repeat"),
        ("a**", "a quantifier follows"),
        ("a*+", "possessive"),
        ("a\\", "a backslash ends it"),
        (r"(a)\1", "back-references"),
        (r"(?<n>a)\k<n>", "back-references"),
        ("(?P=n)", "back-references"),
        ("(?<=a)b", "lookbehind"),
        ("(?<!a)b", "lookbehind"),
        ("(?>a)", "atomic groups"),
        ("(?(1)a)", "conditional groups"),
        ("(?m)^a", "flag"),
        (r"\q", "escape"),
        (r"\p{Greek}", "Unicode property 'Greek'"),
        (r"\u12", "hexadecimal"),
        (r"\u{}", "hexadecimal"),
        (r"\xg0", "hexadecimal"),
        (r"\012", "octal"),
        (r"\pL", "in braces"),
        ("(?<1>a)", "name of a group"),
        ("(?<a", "name of a group"),
        ("(?#a", "comment is not closed"),
        ("(?i", "not closed"),
        ("[a-", "not closed"),
        (r"\u{110000}", "no Unicode character"),
        ("(?=^a)", "'\\^' or"),
        ("(" * 101 + ")" * 101, "nested more than 100"),
        ("a{9999999999}", "too large"),
    ],
)
def test_what_is_malformed_or_not_supported_is_rejected_by_name(pattern: str, what: str):
    with pytest.raises(GrammarError, match=what) as raised:
        from_pattern(pattern, search=True)
    assert str(raised.value).startswith("regular expression '")


@pytest.mark.parametrize(
    "pattern",
    [
        "a{1000000}",
        "^(a{1000}){1000}$",
        "((a{0,9}){0,9}){0,999999}",
        "(a|b)*a(a|b){40}$",
        "^.{0,60000}$",
        "(.*a){30}.{30}",
        "^((?!a.{20}b).)*$",
        "(?!.*a.{30}$)",
        "(((((a{99}){99}){99}){99}){99}){99}",
    ],
)
def test_what_is_too_large_is_rejected_in_one_sentence_and_little_time(pattern: str):
    start = time.process_time()
    with pytest.raises(GrammarError, match="needs .*more than"):
        from_pattern(pattern, search=True)
    assert time.process_time() - start < 5  # about a second on an idle core


def test_counted_repetition_has_one_state_per_count():
    for count in (0, 1, 255, 5000):
        dfa = from_pattern(f"^[a-z]{{0,{count}}}$", search=True)
        assert dfa.states == count + 2  # and the dead state
        assert dfa.longest == count
    assert from_pattern("^(a{0,9}){3,9}$", search=True).longest == 81
    assert from_pattern("^(?:^|$){1000000}$", search=True).words(2) == [()]
    assert MAX_STATES == 50_000


@pytest.mark.parametrize("pattern", ["^x(?:[^]*a[^]{30}b)?", "^(?=x)x(?:[^]*a[^]{30}b)?"])
def test_nothing_is_followed_after_a_search_has_found_its_match(pattern: str):
    dfa = from_pattern(pattern, search=True)
    assert dfa.states == 3


def test_equal_calls_share_one_automaton():
    assert from_pattern("^ab$", search=True) is from_pattern("^ab$", search=True)


@pytest.mark.theorem(
    "the automaton and the range of lengths of a pattern together are the pattern",
    source="regex.py",
)
@pytest.mark.parametrize(
    ("pattern", "low", "high"),
    [
        (f"^[a-c]{{0,{COUNTED + 1}}}$", 0, COUNTED + 1),
        (f"^.{{{COUNTED + 1},}}$", COUNTED + 1, None),
        (r"^\d{70}$", 70, 70),
        (f"^[a-c]{{0,{COUNTED}}}$", 0, None),
        ("^[a-c]{2,90}", 0, None),
        ("[a-c]{2,90}$", 0, None),
        ("^(?:ab){2,90}$", 0, None),
        ("^x[a-c]{2,90}$", 0, None),
        (r"^[a-c]{2,90}\b", 0, None),
    ],
)
def test_a_long_repetition_is_a_class_with_a_range_of_lengths(
    pattern: str, low: int, high: int | None
):
    dfa, minimum, maximum = from_pattern_with_length(pattern)
    assert (minimum, maximum) == (low, high)
    assert dfa.states == 2 or (minimum, maximum) == (0, None)
    limited = with_length(dfa, minimum, maximum)
    assert same_language(limited, from_pattern(pattern, search=True))
