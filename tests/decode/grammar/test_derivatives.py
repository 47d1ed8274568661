"""Derivatives, the naive twin: against ``re`` on all short texts, and the definition by hand."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from automata import LETTERS, all_texts, patterns
from refllm.decode.grammar.patterns.derivatives import matches


@pytest.mark.theorem(
    "a text matches iff its derivative accepts the empty text: what re accepts",
    source="Brzozowski 1964",
)
@given(patterns(lookaheads=True), st.booleans())
def test_derivatives_accept_what_re_accepts(pattern: str, search: bool):
    compiled = re.compile(pattern)
    decide = compiled.search if search else compiled.fullmatch
    # Before Python 3.14, \\B does not match in the empty text.
    for text in all_texts(LETTERS, 3)[1 if r"\B" in pattern else 0 :]:
        assert matches(pattern, text, search=search, dialect="python") == bool(decide(text)), text


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        ("(?:a|^){2}", "a", True),  # one copy reads nothing, the other one the letter
        ("(?:a|^){2}", "", True),
        ("(?:a|^){3}", "aa", True),
        ("(?:a|$){2}b", "ab", False),
        ("a{2,3}", "a", False),
        ("a{2,3}", "aaa", True),
        ("a{2,3}", "aaaa", False),
        ("(?!ab)a.", "ab", False),
        ("(?!ab)a.", "ac", True),
        (r"a\b.b", "a-b", True),
        (r"a\b.b", "aab", False),
        ("[^a]", "\U0001f600", True),
        ("a{0}", "", True),
        ("a{0}", "a", False),
    ],
)
def test_worked_examples(pattern: str, text: str, expected: bool):
    assert matches(pattern, text, search=False) == expected
