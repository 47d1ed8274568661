"""Masks of JSON Schemas equal reading each token byte by byte, where what was read decides."""

from __future__ import annotations

import numpy as np
import pytest

from refllm import load
from refllm.decode import grammar
from refllm.decode.grammar.masks import naive_mask

TOKENIZER = load("stdlib-draft").tokenizer
SCHEMAS = {
    "open keys": {"type": "object"},
    "keys of a pattern": {"patternProperties": {"^a": {"type": "integer"}}, "type": "object"},
    "distinct strings": {"type": "array", "uniqueItems": True, "items": {"maxLength": 3}},
    "a key seen by name": {"type": "object", "properties": {"ab": {}, "abc": {"const": 1}}},
    "distinct objects": {
        "type": "array",
        "uniqueItems": True,
        "items": {"type": "object", "properties": {"a": {"enum": [1, 2]}}},
    },
}
TEXTS = [
    '{"ab": 1, "ab',
    '{"ab": 1, "a',
    '{"ab": 1, "',
    '["ab", "ab',
    '["ab", "a',
    "[1, 1",
    "[1, 1.",
    '[{"a": 1}, {"a": 1',
    '[{"a": 1}, {"a": ',
    "[true, tru",
    '{"ab": {"ab": 1, "ab',
]


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("text", TEXTS)
def test_a_token_that_would_repeat_a_key_or_item_is_illegal(name, text):
    compiled = grammar.compile(json_schema=SCHEMAS[name], tokenizer=TOKENIZER)
    state = compiled.read(compiled.start, text.encode())
    if state is None:
        return  # the schema is of another type
    tokens = grammar.token_bytes(TOKENIZER)
    expected = naive_mask(state, tokens, compiled.end_tokens)
    assert np.array_equal(compiled.mask(state), expected)
    assert expected.any()
