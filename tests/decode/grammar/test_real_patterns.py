"""Patterns of the kinds that real schemas hold, against ``re`` on accepted and mutated texts."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.decode.grammar.patterns.regex import from_pattern

REAL = [
    r"^[A-Fa-f\d]{24}$", r"^[a-z_]+$", ".*", "^.+$", r"^x-", r"_suffix$", r"\d\d", "",
    r"^[a-f0-9]{8}-[a-f0-9]{4}-[1-5][a-f0-9]{3}-[89ab][a-f0-9]{3}-[a-f0-9]{12}$",
    r"^/(([a-zA-Z0-9._~!$&'()*+,;=:@-]|%[0-9a-fA-F]{2})+(/([a-z.~-]|%[0-9a-f]{2})*)*)?$",
    r"^(https?:\/\/)?([\da-z\.-]+)\.([a-z\.]{2,6})([\/\w \.-]*)*\/?$", r"^(/[^/ ]+)+/?$",
    r"^(one)|(two)://(.*)$", "^alpha|beta|rc$", r"^[0-9]+x[0-9]+$", "^....$", r"^[\w]*$",
    r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}(:\d{2})?(([+-]\d{2}(:\d{2})?)|Z)", r"^[^@^\s]+@[^@^\.^\s]+$",
    r"^(([0-9]|[1-9][0-9]|1[0-9]{2}|2[0-4][0-9]|25[0-5])\.){3}([0-9]|25[0-5])(/(\d|3[0-2]))?$",
    r"^(0|[1-9]\d*)\.(0|[1-9]\d*)(-(0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*))?(\+[0-9a-zA-Z-]+)?$",
    r"^[-+]?[0-9]*.?[0-9]+$", r"^([^,]|$)", "(^one_|^two_|_three_)",
    r"^[\w|-|.]+@[\w]+\.[A-Za-z]{2,4}$",
    r"^((?!mode)(?!Mode).)*$", r"^(\s*|((\s*[^,:&\s]+\s*:[^,:&]*)(,\s*[^,:&\s]+\s*:[^,:&]*)*))$",
    r"\w+[\\](\w+\.)*\w+\.dll", r"^(?:[A-Za-z\d+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$",
    r"^,?(((ALPHA|BETA|GAMMA_1),?)*)+$", r"^$|^\./((\.\./|[a-z_/\-\\])[^\.\.]*\.png)$", "[a|b]",
]  # fmt: skip


@pytest.mark.parametrize("pattern", REAL)
@given(st.data())
def test_real_patterns_accept_what_re_accepts_on_accepted_and_mutated_texts(
    pattern: str, data: st.DataObject
):
    dfa = from_pattern(pattern, search=True)
    compiled = re.compile(pattern, re.ASCII)
    words = ["".join(map(chr, word)) for word in dfa.words(12)]
    # A walk through the automaton reaches its later parts too.
    state = dfa.start
    walk = ""
    for _ in range(data.draw(st.integers(0, 30))):
        symbols = [s for s in dfa.alphabet.representatives if dfa.step(state, s)]
        if not symbols:
            break
        walk += chr(data.draw(st.sampled_from(symbols)))
        state = dfa.run([ord(walk[-1])], state)
    walk += "".join(map(chr, dfa.shortest(state) or ()))
    letters = st.sampled_from(sorted({*pattern, *walk, *"a0Z_- .:/"}))
    at = data.draw(st.integers(0, len(walk)))
    mutated = walk[:at] + data.draw(letters | st.just("")) + walk[at + 1 :]
    for text in (*words, walk, mutated):
        if re.search("[\x1c-\x1f\r\n\x85-\U0010ffff]", text):
            continue  # where ECMA 262 and re mean different things by ., \\s and $
        assert dfa.matches(text) == bool(compiled.search(text)), text
    assert dfa.matches(walk)
