"""The keys that may occur in an object: one by one, or by class.

``ObjectShape`` names some keys and puts all others into classes, which are regular languages.
Two things are done to the classes before ``object_table.py`` counts pairs: each is split by the
languages of the witnesses, so that all keys of a class serve the same witnesses, and a class of
few keys becomes named keys, so that each of them is offered once. Keys without a UTF-8 form are
left out. Keys whose values cannot exist are kept, so that shapes of the same keys have the same
labels.

| symbol | name | type |
|---|---|---|
| – | ``serves`` | bit set over ``ObjectShape.witnesses`` |

Left out: which of the keys may follow in an object (``object_table.py``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from refllm.decode.grammar.automata.alphabet import CHARACTERS
from refllm.decode.grammar.automata.dfa import DFA
from refllm.decode.grammar.automata.dfa_builders import from_words
from refllm.decode.grammar.automata.dfa_operations import difference, intersect
from refllm.decode.grammar.json_machine.json_text import key_bytes
from refllm.decode.grammar.json_schema.shapes import Node, NodeExpander, ObjectShape

Order: TypeAlias = Literal["any", "schema"]

FEW_KEYS = 64  # a class of at most so many keys is turned into named keys


@dataclass(frozen=True)
class NamedKey:
    """A key with a label of its own."""

    text: str
    quoted: bytes
    node: Node
    serves: int  # bit set of the witnesses whose language has the key
    rank: int | None  # its place in the order of definition; None: after all that have one
    possible: bool  # whether any value fits


@dataclass(frozen=True)
class ClassOfKeys:
    """Keys that share a label."""

    keys: DFA  # over code points; a named key in it does not count
    node: Node
    serves: int
    words: int | None  # how many keys; None: no limit


def keys_of(
    shape: ObjectShape, shapes: NodeExpander, order: Order
) -> tuple[tuple[NamedKey, ...], tuple[ClassOfKeys, ...]]:
    """The keys that may occur: named ones in the order of definition, and classes of many."""
    ranks = {}
    if order == "schema":
        ranks = {text: rank for rank, text in enumerate(shape.order)}
    named = dict(shape.named)
    classes = []
    for keys, node in shape.classes:
        if not shapes.inhabited(node):
            continue
        for piece, serves in _pieces(keys, shape):
            count = piece.cardinality
            if count is not None:
                piece = difference(
                    piece, from_words(dict.fromkeys(shape.named, 1), size=CHARACTERS)
                )
                count = piece.cardinality
            if count is not None and count <= FEW_KEYS:
                named.update(("".join(map(chr, word)), node) for word in piece.words(count))
            else:
                classes.append(ClassOfKeys(piece, node, serves, count))
    known = []
    for text, node in named.items():
        quoted = key_bytes(text)
        if quoted is None:
            continue
        serves = sum(
            1 << index
            for index, witness in enumerate(shape.witnesses)
            if witness.keys is None or witness.keys.matches(map(ord, text))
        )
        possible = shapes.inhabited(node)
        known.append(NamedKey(text, quoted, node, serves, ranks.get(text), possible))
    known.sort(key=lambda key: len(ranks) if key.rank is None else key.rank)
    return tuple(known), tuple(classes)


def _pieces(keys: DFA, shape: ObjectShape) -> list[tuple[DFA, int]]:
    """A class of keys split by the languages of the witnesses, with those that each serves."""
    pieces = [(keys, 0)]
    for index, witness in enumerate(shape.witnesses):
        bit = 1 << index
        if witness.keys is None:
            pieces = [(piece, serves | bit) for piece, serves in pieces]
            continue
        pieces = [
            split
            for piece, serves in pieces
            for split in (
                (intersect(piece, witness.keys), serves | bit),
                (difference(piece, witness.keys), serves),
            )
            if not split[0].empty
        ]
    return pieces
