"""A schema with few values, and all of them: where "some value fits" can be counted."""

from __future__ import annotations

import itertools

ITEMS = [1, "a", True]
MEMBERS = [1, "a"]
UNIVERSE = {
    "anyOf": [
        {"enum": [None, True, 1, "a"]},
        {"type": "array", "items": {"enum": ITEMS}, "maxItems": 3},
        {
            "type": "object",
            "properties": {"a": {"enum": MEMBERS}, "b": {"enum": MEMBERS}},
            "patternProperties": {"^a[bc]$": {"enum": MEMBERS}},
            "additionalProperties": False,
        },
    ]
}
ARRAYS = [list(items) for n in range(4) for items in itertools.product(ITEMS, repeat=n)]
ABSENT = object()
OBJECTS = [
    {
        key: value
        for key, value in zip(["a", "b", "ab", "ac"], values, strict=True)
        if value is not ABSENT
    }
    for values in itertools.product([ABSENT, *MEMBERS], repeat=4)
]
VALUES = [None, True, 1, "a", *ARRAYS, *OBJECTS]
