"""Classes of characters against ``re`` and ``unicodedata``, for every code point."""

from __future__ import annotations

import re
import unicodedata
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.decode.grammar.automata.alphabet import CHARACTERS
from refllm.decode.grammar.patterns.unicode_classes import (
    Set,
    any_case,
    category,
    chars,
    dot_set,
    escape_set,
    gaps,
    joined,
    negated,
    without,
)

EVERY = [chr(code) for code in range(CHARACTERS) if not 0xD800 <= code < 0xE000]


def members(intervals: Set) -> np.ndarray:
    """bool[0x110000]: which code points are in a set."""
    found = np.zeros(CHARACTERS, dtype=bool)
    for low, high in intervals:
        found[low : high + 1] = True
    return found


def matched(pattern: str, flags: int = 0) -> np.ndarray:
    """bool[0x110000]: which characters ``re`` matches with a pattern."""
    found = np.zeros(CHARACTERS, dtype=bool)
    found[[ord(c) for c in re.findall(pattern, "".join(EVERY), flags | re.DOTALL)]] = True
    return found


@pytest.mark.theorem(
    r"\d, \w, \s of the Python dialect hold the characters that re matches, of all code points",
    source="re",
)
@pytest.mark.parametrize("letter", ["d", "w", "s"])
def test_escapes_are_those_of_re(letter: str):
    np.testing.assert_array_equal(members(escape_set(letter, "python")), matched(rf"\{letter}"))
    inverted = matched(rf"\{letter.upper()}")
    np.testing.assert_array_equal(members(negated(escape_set(letter, "python"))), inverted)
    if letter != "s":
        ascii_only = matched(rf"\{letter}", re.ASCII)
        np.testing.assert_array_equal(members(escape_set(letter, "ecma")), ascii_only)
        np.testing.assert_array_equal(members(escape_set(letter, "re2")), ascii_only)


def test_white_space_of_ecma_262():
    # ECMA 262, WhiteSpace and LineTerminator: tab, VT, FF, ZWNBSP, category Zs; LF, CR, LS, PS.
    zs = [c for c in EVERY if unicodedata.category(c) == "Zs"]
    expected = {*"\t\v\f\ufeff\n\r\u2028\u2029", *zs}
    np.testing.assert_array_equal(
        members(escape_set("s", "ecma")), members(chars("".join(sorted(expected))))
    )


def test_the_dot_leaves_out_line_ends():
    left_out = {
        dialect: {c for c in "\n\r\u2028\u2029\x85" if not members(dot_set(dialect))[ord(c)]}
        for dialect in ("ecma", "python", "re2")
    }
    assert left_out == {"ecma": set("\n\r\u2028\u2029"), "python": {"\n"}, "re2": {"\n"}}
    assert not members(dot_set("python"))[0xD800:0xE000].any()


@pytest.mark.parametrize(
    ("name", "prefixes"),
    [
        ("Lu", ["Lu"]),
        ("L", ["L"]),
        ("gc=Nd", ["Nd"]),
        ("General_Category=Punctuation", ["P"]),
        ("LC", ["Lu", "Ll", "Lt"]),
        ("Cased_Letter", ["Lu", "Ll", "Lt"]),
        ("Private_Use", ["Co"]),
        ("Any", [""]),
    ],
)
def test_categories_are_those_of_unicodedata(name: str, prefixes: list[str]):
    found = members(category(name) or ())
    expected = np.zeros(CHARACTERS, dtype=bool)
    expected[[ord(c) for c in EVERY if unicodedata.category(c).startswith(tuple(prefixes))]] = True
    np.testing.assert_array_equal(found, expected)


def test_unknown_properties_are_none():
    assert category("Greek") is None
    assert category("Script=Greek") is None
    assert category("Lx") is None
    assert category("ASCII") == ((0, 127),)


@pytest.mark.theorem(
    "with (?i), a character matches the characters that re.IGNORECASE lets it match",
    source="re",
)
def test_any_case_of_each_cased_character_is_that_of_re():
    cased = [c for c in EVERY if c.lower() != c or c.upper() != c]
    text = "".join(cased)
    for character in cased:
        expected = set(re.findall(re.escape(character), text, re.IGNORECASE))
        found = members(any_case(chars(character)))
        ours = {chr(code) for code in np.flatnonzero(found).tolist()}
        assert ours == expected


intervals = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)), max_size=6).map(
    lambda pairs: [(low, low + length) for low, length in pairs]
)


@given(intervals, intervals)
def test_set_algebra_is_that_of_sets(a: list[tuple[int, int]], b: list[tuple[int, int]]):
    def expand(pairs: Set) -> set[int]:
        return {code for low, high in pairs for code in range(low, high + 1)}

    in_a, in_b = expand(tuple(a)), expand(tuple(b))
    assert expand(joined(a)) == in_a
    assert expand(gaps(joined(a), 45)) == set(range(45)) - in_a
    assert expand(without(joined(a), joined(b))) == in_a - in_b
    for result in (joined(a), gaps(joined(a), 45), without(joined(a), joined(b))):
        ends = [edge for pair in result for edge in pair]
        assert ends == sorted(ends)
        assert all(high + 1 < low for (_, high), (low, _) in pairwise(result))
