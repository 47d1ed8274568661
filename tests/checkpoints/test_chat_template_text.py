"""Text that knows which characters a template wrote: whatever is done to it, no other
character counts as written, and it behaves as the ``str`` that it is.

The tests draw the template's characters and the user's from two alphabets without a common
letter, also after a change of case, so each character of a result tells where it came from.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.checkpoints.chat_template_text import TemplateText, concat, literal, runs, written

OURS = "abAB<|ß"  # what literals are made of
THEIRS = "xyXY>.é"
BOTH = " \n"  # white space, in either

ours = st.text(OURS + BOTH, max_size=6)
theirs = st.text(THEIRS + BOTH, max_size=6)
# Pieces that come from a literal or from a user, joined
pieces = st.lists(st.tuples(st.booleans(), ours, theirs), max_size=5)
small = st.integers(-4, 8)

OPERATIONS = {
    "add": lambda s, a, i, j: s + a,
    "radd": lambda s, a, i, j: "x" + s,
    "mul": lambda s, a, i, j: s * (i % 3),
    "rmul": lambda s, a, i, j: (i % 3) * s,
    "slice": lambda s, a, i, j: s[i:j],
    "stride": lambda s, a, i, j: s[:: i or 1],
    "item": lambda s, a, i, j: s[i % len(s)] if s else "",
    "item from the end": lambda s, a, i, j: s[-1 - i % len(s)] if s else "",
    "join": lambda s, a, i, j: s.join([a, "x", s]),
    "join one": lambda s, a, i, j: s.join([a]),
    "replace": lambda s, a, i, j: s.replace("x", a),
    "replace some": lambda s, a, i, j: s.replace("a", "y", i),
    "replace nothing": lambda s, a, i, j: s.replace("", "y", i),
    "replace two": lambda s, a, i, j: s.replace("a<", a),
    "split": lambda s, a, i, j: s.split(),
    "split some": lambda s, a, i, j: s.split(None, i),
    "split at": lambda s, a, i, j: s.split("a"),
    "split at two": lambda s, a, i, j: s.split("ab", i),
    "rsplit": lambda s, a, i, j: s.rsplit(None, i),
    "rsplit at": lambda s, a, i, j: s.rsplit("ab", i),
    "splitlines": lambda s, a, i, j: s.splitlines(),
    "keepends": lambda s, a, i, j: s.splitlines(True),
    "strip": lambda s, a, i, j: s.strip(),
    "lstrip": lambda s, a, i, j: s.lstrip("ax"),
    "rstrip": lambda s, a, i, j: s.rstrip("a\n"),
    "removeprefix": lambda s, a, i, j: s.removeprefix("a"),
    "removesuffix": lambda s, a, i, j: s.removesuffix("x"),
    "upper": lambda s, a, i, j: s.upper(),
    "lower": lambda s, a, i, j: s.lower(),
    "title": lambda s, a, i, j: s.title(),
    "capitalize": lambda s, a, i, j: s.capitalize(),
    "str": lambda s, a, i, j: str(s),
}
UNTRACKED = {
    "center": lambda s, a, i, j: s.center(20),
    "zfill": lambda s, a, i, j: s.zfill(9),
    "swapcase": lambda s, a, i, j: s.swapcase(),
    "expandtabs": lambda s, a, i, j: s.expandtabs(),
    "partition": lambda s, a, i, j: list(s.partition("a")),
    "translate": lambda s, a, i, j: s.translate({97: "x"}),
    "as a value": lambda s, a, i, j: f"{s}",
    "plain join": lambda s, a, i, j: "".join([s, a]),
    "plain percent": lambda s, a, i, j: str.__mod__("%s.", s),
}


def built(parts: list[tuple[bool, str, str]]) -> TemplateText:
    return concat(literal(mine) if by_template else other for by_template, mine, other in parts)


def plain(value: Any) -> Any:
    """A copy without provenance."""
    return [plain(v) for v in value] if isinstance(value, list) else str.__str__(value)


def flat(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]


@pytest.mark.theorem(
    "no operation on a template's text makes a character of a user's text the template's",
    source="chat_template_text",
)
@pytest.mark.parametrize("name", [*OPERATIONS, *UNTRACKED])
@given(pieces, pieces, st.booleans(), small, small)
def test_no_operation_makes_a_users_character_the_templates(name, parts, more, mixed, i, j):
    operation = (OPERATIONS | UNTRACKED)[name]
    text = built(parts)
    argument = built(more) if mixed else plain(built(more))
    result = operation(text, argument, i, j)
    assert plain(result) == operation(plain(text), plain(argument), i, j)  # as a str does
    for piece in flat(result):
        assert len(written(piece)) == len(piece)
        for character, by_template in zip(piece, written(piece), strict=True):
            if by_template:
                assert character in OURS + OURS.upper() + OURS.lower() + OURS.title() + BOTH


@pytest.mark.parametrize("name", sorted(OPERATIONS.keys() - {"replace nothing"}))
@given(
    st.lists(st.tuples(st.booleans(), st.text("abAB<|", max_size=6), st.text("xyXY", max_size=6))),
    small,
    small,
)
def test_tracked_operations_keep_what_the_template_wrote(name, parts, i, j):
    """Without white space, which either may have written, and letters that grow in upper
    case.
    """
    result = OPERATIONS[name](built(parts), literal("b"), i, j)
    for piece in flat(result):
        for character, by_template in zip(piece, written(piece), strict=True):
            assert by_template == (character in "abAB<|")


@pytest.mark.theorem(
    "what raises an error on a str raises the same error on a template's text",
    source="jinja2 looks an attribute up as an item, and takes some errors for 'there is none'",
)
@pytest.mark.parametrize(
    "operation",
    [
        *(lambda s, key=key: s[key] for key in ("name", 1.5, None, (0, 1), 99, -99)),
        lambda s: s["a":"b"],  # type: ignore[misc]
        lambda s: s * "a",
        lambda s: s + 1,
        lambda s: 1 + s,
        lambda s: s % 1,
        *(lambda s, bad=bad: s.replace("a", bad) for bad in (1, None)),
        *(lambda s, bad=bad: s.join(bad) for bad in (1, [1], ["a", None])),
        *(lambda s, name=name: getattr(s, name)(1) for name in ("split", "strip", "lstrip")),
        *(lambda s, name=name: getattr(s, name)("") for name in ("split", "rsplit")),
        *(lambda s, name=name: getattr(s, name)(1) for name in ("removeprefix", "removesuffix")),
    ],
)
def test_errors_are_those_of_a_str(operation):
    with pytest.raises((TypeError, ValueError, LookupError, AttributeError)) as expected:
        operation("ab")
    with pytest.raises(type(expected.value)) as caught:
        operation(literal("ab"))
    assert type(caught.value) is type(expected.value)


def test_a_case_that_changes_the_length_loses_what_was_written():
    text = literal("aß")
    assert text.upper() == "ASS"
    assert written(text.upper()) == b"\0\0\0"
    assert written(text.lower()) == b"\1\1"


@pytest.mark.parametrize(
    ("template", "values", "marks"),
    [
        ("<%s>", "a", b"\1\0\1"),
        ("<%s|%s>", ("a", literal("b")), b"\1\0\1\0\1"),
        ("%(n)s%%>", {"n": "a"}, b"\0\1\1"),
        ("%5.1f|", 1.25, b"\0\0\0\0\0\1"),
        ("%-3d|", 1, b"\0\0\0\1"),
        ("none", (), b"\1\1\1\1"),
    ],
)
def test_values_that_are_formatted_are_the_users(template, values, marks):
    result = literal(template) % values
    assert result == template % values
    assert written(result) == marks


@pytest.mark.parametrize(
    ("template", "values", "marks"),
    [
        ("<{}>", ("a",), b"\1\0\1"),
        ("{0}{1}{{}}", ("a", "b"), b"\0\0\1\1"),
        ("{:>3}|", ("a",), b"\0\0\0\1"),
        ("{:>{}}|", ("a", 2), b"\0\0\1"),
    ],
)
def test_values_in_braces_are_the_users(template, values, marks):
    result = literal(template).braces_formatted(lambda text: text.format(*values))
    assert result == template.format(*values)
    assert written(result) == marks


def test_a_format_string_that_holds_a_users_text_is_the_users():
    text = literal("<") + "%s" + literal(">")
    assert text % "a" == "<a>"
    assert written(text % "a") == b"\0\0\0"


@given(st.text(max_size=8), st.text(max_size=8))
def test_any_value_can_be_formatted(template, value):
    template = template.replace("%", "") + "%s|"
    assert literal(template) % value == template % value
    assert written(literal(template) % value) in (
        b"\1" * (len(template) - 3) + b"\0" * len(value) + b"\1",
        bytes(len(template) - 2 + len(value)),
    )


def test_it_is_the_str_that_it_is():
    text = literal("role")
    assert {"role": 1}[text] == 1
    assert text == "role"
    assert hash(text) == hash("role")
    assert f"{text!r}" == "'role'"
    with pytest.raises(TypeError):
        text + 1
    with pytest.raises(TypeError):
        1 + text
    with pytest.raises(IndexError):
        text[4]


@given(pieces)
def test_runs_are_the_text_in_pieces(parts):
    text = built(parts)
    found = list(runs(text))
    assert "".join(run for _, run in found) == text
    marks = b"".join((b"\1" if by_template else b"\0") * len(run) for by_template, run in found)
    assert marks == written(text)
    kinds = [kind for kind, _ in found]
    assert all(a != b for a, b in pairwise(kinds))
