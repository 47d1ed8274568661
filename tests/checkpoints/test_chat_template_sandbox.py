"""A template is a program from somewhere: what goes wrong in it is one sentence, it reaches
nothing of Python, it ends, and its literals are marked wherever they go.
"""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any

import pytest

from refllm.checkpoints import chat_template_sandbox
from refllm.checkpoints.chat_template_sandbox import compiled, literals, rendered
from refllm.checkpoints.chat_template_text import literal, written
from refllm.errors import InputError


def render(source: str, now: datetime | None = None, **names: Any) -> str:
    return rendered(compiled(source), names, now)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "rejects the messages: Roles must"),
        ("a\n{% if %}", "no valid Jinja: line 2: Expected an expression"),
        ("{% for x in y %}", "no valid Jinja: line 1: Unexpected end of template"),
        ("{{ x | nonsense }}", "no valid Jinja: line 1: No filter named 'nonsense'"),
        ("{{ x is nonsense }}", "no valid Jinja: line 1: No test named 'nonsense'"),
        ("{{ nothing.role }}", "needs something that the messages do not give it: 'nothing'"),
        ("{{ {}.role.name }}", "needs something .*'dict object' has no attribute 'role'"),
        ("{{ 'a' + nothing }}", "needs something .*'nothing' is undefined"),
        ("{{ 'a' + none }}", "failed with TypeError: .*'str'"),
        ("{{ 1 // 0 }}", "failed with ZeroDivisionError"),
        ("{{ 'x' | tojson(indent='y') ~ {1: {2}} }}", "no valid Jinja"),
        ("{{ range(10 ** 9) }}", "failed with OverflowError: Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "failed with RecursionError"),
        ("{% include 'x' %}", "failed with TypeError: no loader"),
        ("{{ ''.__class__.__mro__ }}", "failed with SecurityError"),
        ("{{ [].append(1) }}", "failed with SecurityError"),
        ("{{ {}.update({1: 2}) }}", "failed with SecurityError"),
        ("{{ namespace(_x=1) }}", "failed with SecurityError"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "failed with SecurityError"),
        ("{{ namespace.__init__.__globals__ }}", "failed with SecurityError"),
        ("{{ raise_exception.__globals__.x }}", "failed with SecurityError"),
        ("{{ '{0.__class__.__mro__}'.format('a') }}", "failed with SecurityError"),
        ("{{ '{x.__class__.__mro__}'.format_map({'x': 1}) }}", "failed with SecurityError"),
        ("{{ 'x' * 10 ** 9 }}", "failed with OverflowError"),
        ("{{ [0] * 10 ** 9 }}", "failed with OverflowError"),
        ("{{ 10 ** 9 * 'x' }}", "failed with OverflowError"),
        ("{{ 10 ** (10 ** 10) }}", "failed with OverflowError"),
        ("{{ 3 ** 100000000 }}", "failed with OverflowError"),
    ],
)
def test_what_goes_wrong_in_a_template_is_one_sentence(source, sentence):
    with pytest.raises(InputError, match=sentence) as caught:
        render(source)
    assert str(caught.value).startswith("the chat template ")
    assert "TemplateText" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_loops_without_end_are_stopped():
    start = time.monotonic()
    nested = "{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}{% endfor %}{% endfor %}"
    with pytest.raises(InputError, match="more than 1,000,000 passes through its loops"):
        render("{% set r = range(99999) %}" + nested)
    assert time.monotonic() - start < 60


def test_the_passes_of_one_rendering_are_counted_up_to_the_bound(monkeypatch):
    monkeypatch.setattr(chat_template_sandbox, "MAX_LOOP_PASSES", 6)
    source = "{% for a in range(n) %}{% for b in [1] %}.{% endfor %}{% endfor %}"
    for _ in range(3):
        assert render(source, n=3) == "..."  # 3 + 3, anew each time
    with pytest.raises(InputError, match="more than 6 passes"):
        render(source, n=4)
    assert render("{% for a in range(9) if a < 2 %}x{% endfor %}") == "xx"
    with pytest.raises(InputError, match="more than 6 passes"):
        render(
            "{% for a in [[[[[[[]]]]]]] recursive %}x{{ loop(a) }}{% endfor %}"
            + "." * 9
            + "{% for a in range(7) %}{% endfor %}"
        )


def test_repetitions_are_possible_within_the_bound(monkeypatch):
    assert render("{{ 'ab' * 3 }}{{ 3 * 'x' }}{{ 'x' * -1 }}{{ 2 ** 3 }}{{ 2 ** -1 }}") == (
        "abababxxx80.5"
    )
    monkeypatch.setattr(chat_template_sandbox, "MAX_LENGTH", 6)
    assert render("{{ 'ab' * 3 }}") == "ababab"
    with pytest.raises(InputError, match="a result of \\* has more than 6 items"):
        render("{{ 'ab' * 4 }}")


def test_the_clock_is_the_given_one_or_the_current_one():
    source = "{{ strftime_now('%d %b %Y, %H:%M') }}"
    assert render(source, datetime(2026, 7, 4, 9, 5)) == "04 Jul 2026, 09:05"
    assert render("{{ strftime_now('%Y') }}") in {str(datetime.now().year + d) for d in (0, -1)}


def test_the_bounds_of_one_rendering_are_not_those_of_another_inside_it():
    """A rendering that fails leaves no clock behind."""
    with pytest.raises(InputError):
        render("{{ 1 // 0 }}", datetime(1999, 1, 1))
    assert render("{{ strftime_now('%Y') }}") != "1999"
    assert chat_template_sandbox._clock.get() is None
    assert chat_template_sandbox._passes.get(None) is None


MARKED = [  # source, what is rendered with a user's x = "u", and which characters are literal
    ("lit{{ x }}eral", "literal", "1110" + "1111"),
    ("{{ 'a' + x + 'b' }}", "aub", "101"),
    ("{{ 'a' ~ x ~ 1 ~ 'b' }}", "au1b", "1001"),
    ("{{ x + 'a' }}", "ua", "01"),
    ("{% set t = 'a' ~ x %}{{ t }}", "au", "10"),
    ("{% set t %}a{{ x }}{% endset %}{{ t }}", "au", "10"),
    ("{% filter trim %} a{{ x }} {% endfilter %}", "au", "10"),
    ("{% macro m(y) %}a{{ y }}{% endmacro %}{{ m(x) }}{{ m('b') }}", "auab", "1011"),
    (
        "{% macro m() %}a{{ caller() }}{% endmacro %}{% call m() %}{{ x }}b{% endcall %}",
        "aub",
        "101",
    ),
    ("{% generation %}a{{ x }}{% endgeneration %}", "au", "10"),
    ("{% set ns = namespace(t='a') %}{% set ns.t = ns.t + x %}{{ ns.t }}", "au", "10"),
    ("{{ ['a', x, 'b'] | join }}", "aub", "101"),
    ("{{ ['a', x] | join('|') }}", "a|u", "110"),
    ("{{ {'k': 'a'}['k'] }}{{ ('a', x)[1] }}", "au", "10"),
    ("{{ {'a': 1}.keys() | first }}", "a", "1"),
    ("{{ 'a' if x else 'b' }}{{ x or 'b' }}", "au", "10"),
    ("{{ '%s|' % x }}{{ '{}|'.format(x) }}{{ '%s|' | format(x) }}", "u|u|u|", "010101"),
    ("{{ '{t}|'.format_map({'t': x}) }}", "u|", "01"),
    ("{{ x | default('b') }}{{ nothing | default('b') }}", "ub", "01"),
    ("{{ 'a' | upper }}{{ x | upper }}{{ ' a ' | trim }}", "AUa", "101"),
    ("{{ x | replace('u', 'a') }}", "a", "0"),
    ("{{ 'u' | replace('u', x) }}{{ 'au' | replace('u', 'b') }}", "uab", "011"),
    ("{{ x | tojson }}{{ ['a', x] | tojson }}", '"u"["a", "u"]', "0" * 13),
    ("{% for y in ['a', x] %}{{ y }}{{ loop.index }}{% endfor %}", "a1u2", "1000"),
    ("{{ 'ab' * 2 }}{{ 'abc'[1:] }}{{ 'a b'.split()[1] }}", "ababbcb", "1111111"),
    ("{{ 'a' 'b' }}{{ 1 }}{{ none }}{{ true }}", "ab1NoneTrue", "11" + "1" * 9),
    ("{% with y = 'a' %}{{ y }}{{ x }}{% endwith %}", "au", "10"),
    ("{% raw %}{{ a }}{% endraw %}", "{{ a }}", "1111111"),
]


@pytest.mark.parametrize(("source", "text", "marks"), MARKED)
def test_literals_are_marked_wherever_they_go(source, text, marks):
    text = text.replace("literal", "litueral")
    result = render(source, x="u")
    assert result == text
    assert written(result) == bytes(int(mark) for mark in marks)


def test_the_literals_of_a_template_are_its_text_and_its_strings():
    found = literals("a{{ 'b' + x['c'] }}{# d #}{% if x == 'e' %}f{% endif %}")
    assert sorted(found) == ["a", "b", "c", "e", "f"]
    with pytest.raises(InputError, match="no valid Jinja"):
        literals("{{")


def test_a_text_has_no_parts_by_name():
    """As templates ask that take a content of text or of parts."""
    for source in (
        "{{ m.content.text is defined }}{{ m['content']['text'] is defined }}",
        "{{ ('x'.y is defined) ~ ('x'|trim)['z'] is defined }}{{ m.content[9] is defined }}",
    ):
        assert "True" not in render(source.replace("~", "or"), m={"content": literal("ab")})
    assert render("<{{ m.content.text }}>", m={"content": literal("ab")}) == "<>"
