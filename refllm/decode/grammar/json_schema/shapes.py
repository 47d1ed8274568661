"""Shapes: what a JSON Schema allows for one value, per JSON type.

A *node* is a set of (schema location, sign): every schema of it holds for one value, or, with
the sign False, does not hold. ``SchemaAlgebra.expand`` (``schema_algebra.py``) turns a node into
shapes: a value is allowed if it fits **any one** of the shapes of its type. Shapes may overlap.
Inside a shape the values of keys and items are nodes again, so recursion needs no unrolling.

| shape | fits |
|---|---|
| ``literals`` | ``null``, ``true``, ``false``, where listed |
| ``StringShape`` | strings of a DFA's language (over characters), with a range of lengths |
| ``NumberShape`` | numbers whose JSON text is in a DFA's language (over bytes) |
| ``ArrayShape`` | arrays, by item nodes, length, counts of matching items |
| ``ObjectShape`` | objects, by a node per key, required keys, counts, witnesses |

Left out: how a shape becomes text (``json_frames.py``), and whether it has any value at all
(``inhabitation.py``).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from refllm.decode.grammar.automata.dfa import DFA

Location = Hashable  # where a schema stands, or a schema that the algebra made up
Node = frozenset[tuple[Location, bool]]
ANYTHING: Node = frozenset()  # no schema at all: every JSON value
NOTHING: Node = frozenset({("false", True)})  # no value


class KeyClass(NamedTuple):
    """Keys of a regular language, and what their values must be."""

    keys: DFA  # over Unicode code points; a key of ``ObjectShape.named`` in it does not count
    value: Node


class Witness(NamedTuple):
    """At least one key of a language must occur whose value fits a node."""

    keys: DFA | None  # over Unicode code points; None: any key
    value: Node


class ItemCount(NamedTuple):
    """From ``low`` to ``high`` of the items from index ``start`` on must fit ``value``.

    ``negation`` is the node of the items that do not fit.
    """

    value: Node
    negation: Node
    low: int
    high: int | None  # None: no limit
    start: int = 0


@dataclass(frozen=True, eq=False)
class StringShape:
    """Strings of a language with ``minimum`` to ``maximum`` characters (code points)."""

    dfa: DFA  # over Unicode code points
    minimum: int = 0
    maximum: int | None = None


@dataclass(frozen=True, eq=False)
class NumberShape:
    """Numbers whose JSON text is in a language."""

    dfa: DFA  # over bytes


@dataclass(frozen=True, eq=False)
class ArrayShape:
    """Arrays: item i fits ``prefix[i]``, each later one fits ``rest``."""

    prefix: tuple[Node, ...] = ()
    rest: Node = ANYTHING
    minimum: int = 0
    maximum: int | None = None
    counts: tuple[ItemCount, ...] = ()
    unique: bool = False


@dataclass(frozen=True, eq=False)
class ObjectShape:
    """Objects: the value of each key fits the node of that key.

    ``named`` has the node of every key that some schema names. Any other key belongs to exactly
    one of ``classes``, whose languages are disjoint and cover all strings. A key whose node is
    not inhabited cannot occur.
    """

    named: Mapping[str, Node]
    classes: tuple[KeyClass, ...]
    required: frozenset[str] = frozenset()  # each of them is in ``named``
    minimum: int = 0  # of keys
    maximum: int | None = None
    witnesses: tuple[Witness, ...] = ()
    order: tuple[str, ...] = ()  # the keys of ``named`` in the order of definition


@dataclass(frozen=True, eq=False)
class ValueShapes:
    """The shapes of a node; a value is allowed if it fits any one of them."""

    literals: frozenset[str] = frozenset()  # of "null", "true" and "false"
    strings: tuple[StringShape, ...] = ()
    numbers: tuple[NumberShape, ...] = ()
    arrays: tuple[ArrayShape, ...] = ()
    objects: tuple[ObjectShape, ...] = ()


class NodeExpander(Protocol):
    """What the frames ask of the algebra; both answers are memoised per node."""

    def expand(self, node: Node) -> ValueShapes:
        """The shapes of ``node``, those that no value fits left out."""
        ...

    def inhabited(self, node: Node) -> bool:
        """Whether any JSON value fits ``node``."""
        ...
