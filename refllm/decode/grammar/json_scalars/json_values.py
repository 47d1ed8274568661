"""JSON values as hashable Python values, equal exactly if they are equal in JSON.

1 and 1.0 are one value, the order of keys does not matter, and ``true`` is not 1
(JSON Schema, "instance equality"). Numbers are compared as ``json.loads`` reads them.

| JSON | ``freeze`` |
|---|---|
| null, string, number | None, str, int or float |
| true, false | ``Truth.TRUE``, ``Truth.FALSE`` |
| array | tuple of items |
| object | frozenset of (key, value) |

Left out: numbers that differ only beyond a float's precision (they count as equal).
"""

from __future__ import annotations

import json
from enum import Enum
from typing import TypeAlias

from refllm.array_types import Loose


class Truth(Enum):
    """``true`` and ``false``, which Python would compare equal to 1 and 0."""

    FALSE = "false"
    TRUE = "true"


# Frozen values are tuples of frozen values and so on, which a type cannot say briefly.
Frozen: TypeAlias = str | int | float | Truth | tuple["Frozen", ...] | frozenset["Pair"] | None
Pair: TypeAlias = tuple[str, Frozen]
FrozenObject: TypeAlias = frozenset[Pair]
FrozenArray: TypeAlias = tuple[Frozen, ...]


def freeze(value: Loose) -> Frozen:
    """A value as ``json.loads`` returns it, made hashable.

    >>> freeze([1.0, True]) == freeze([1, True]), freeze(True) == freeze(1)
    (True, False)
    """
    if isinstance(value, bool):
        return Truth.TRUE if value else Truth.FALSE
    if isinstance(value, list):
        return tuple(freeze(item) for item in value)
    if isinstance(value, dict):
        return frozenset((key, freeze(item)) for key, item in value.items())
    assert value is None or isinstance(value, str | int | float)
    return value


def read_value(text: bytes) -> Frozen:
    """The value of a JSON text. Integers of more digits than Python reads are infinite."""
    return freeze(json.loads(text, parse_int=_integer))


def _integer(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:  # sys.get_int_max_str_digits()
        return float(text)
