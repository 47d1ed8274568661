"""Shapes written by hand, a naive reading of them, and all texts of a small automaton."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import permutations, product

import numpy as np

from refllm.decode.grammar.automata.alphabet import BYTES, CHARACTERS
from refllm.decode.grammar.automata.dfa import DFA
from refllm.decode.grammar.automata.dfa_builders import from_words
from refllm.decode.grammar.automaton import State, accepting, step
from refllm.decode.grammar.json_machine.json_frames import JsonFrames
from refllm.decode.grammar.json_scalars.json_values import Truth, freeze
from refllm.decode.grammar.json_schema.shapes import (
    ArrayShape,
    Node,
    NumberShape,
    ObjectShape,
    StringShape,
    ValueShapes,
)


def few(*values) -> Node:
    """A node with these scalars alone."""
    return frozenset({(tuple(map(freeze, values)), True)})


def not_few(*values) -> Node:
    """A node without these scalars; only to be joined with ``few``."""
    return frozenset({(tuple(map(freeze, values)), False)})


def named(name: str) -> Node:
    """A node whose shapes are written down under a name."""
    return frozenset({(name, True)})


def words(*texts: str) -> DFA:
    """The DFA of these strings."""
    return from_words(dict.fromkeys(texts, 1), size=CHARACTERS)


class HandMade:
    """An algebra of ``few`` scalars, and of shapes by name (which are not intersected)."""

    def __init__(self, **shapes: ValueShapes) -> None:
        self.shapes = shapes
        self._expanded: dict[Node, ValueShapes] = {}

    def scalars(self, node: Node) -> set:
        kept = None
        for location, positive in node:
            if positive:
                kept = set(location) if kept is None else kept & set(location)
        assert kept is not None
        for location, positive in node:
            if not positive:
                kept -= set(location)
        return kept

    def name(self, node: Node) -> str | None:
        names = [location for location, _ in node if isinstance(location, str)]
        assert not names or len(node) == 1, "named shapes are not intersected"
        return names[0] if names else None

    def expand(self, node: Node) -> ValueShapes:
        if node not in self._expanded:
            self._expanded[node] = self._expand(node)
        return self._expanded[node]

    def _expand(self, node: Node) -> ValueShapes:
        name = self.name(node)
        if name is not None:
            return self.shapes[name]
        values = self.scalars(node)
        literals = frozenset(
            "null" if value is None else value.value
            for value in values
            if value is None or isinstance(value, Truth)
        )
        texts = [value for value in values if isinstance(value, str)]
        strings = (StringShape(words(*texts)),) if texts else ()
        numbers = {
            text.encode(): 1
            for value in values
            if isinstance(value, int | float)
            for text in {repr(value), repr(float(value))}
        }
        shapes = (NumberShape(from_words(numbers, size=BYTES)),) if numbers else ()
        return ValueShapes(literals, strings, shapes)

    def inhabited(self, node: Node) -> bool:
        return self.name(node) is not None or bool(self.scalars(node))

    def accepts(self, node: Node, value) -> bool:
        """Whether a value fits a node: the definition, read off the shapes."""
        name = self.name(node)
        if name is None:
            if isinstance(value, list | dict):
                return False
            return freeze(value) in self.scalars(node)
        shapes = self.shapes[name]
        if isinstance(value, list):
            return any(self._array(shape, value) for shape in shapes.arrays)
        if isinstance(value, dict):
            return any(self._object(shape, value) for shape in shapes.objects)
        if isinstance(value, str):
            return any(
                shape.dfa.matches(value)
                and shape.minimum <= len(value)
                and (shape.maximum is None or len(value) <= shape.maximum)
                for shape in shapes.strings
            )
        if value is None or isinstance(value, bool):
            return json.dumps(value) in shapes.literals
        return any(shape.dfa.matches(json.dumps(value).encode()) for shape in shapes.numbers)

    def _array(self, shape: ArrayShape, value: list) -> bool:
        nodes = [*shape.prefix, *[shape.rest] * len(value)]
        if not all(map(self.accepts, nodes, value)):
            return False
        if not _within(len(value), shape.minimum, shape.maximum):
            return False
        for wanted in shape.counts:
            found = sum(self.accepts(wanted.value, item) for item in value[wanted.start :])
            if not _within(found, wanted.low, wanted.high):
                return False
        return not shape.unique or len(set(map(freeze, value))) == len(value)

    def _object(self, shape: ObjectShape, value: dict) -> bool:
        if not shape.required <= set(value):
            return False
        if not _within(len(value), shape.minimum, shape.maximum):
            return False
        for key, item in value.items():
            nodes = [node for keys, node in shape.classes if keys.matches(key)]
            nodes = [shape.named[key]] if key in shape.named else nodes
            if not nodes or not self.accepts(nodes[0], item):
                return False
        return all(
            any(
                (witness.keys is None or witness.keys.matches(key))
                and self.accepts(witness.value, item)
                for key, item in value.items()
            )
            for witness in shape.witnesses
        )


def _within(number: int, low: int, high: int | None) -> bool:
    return low <= number and (high is None or number <= high)


def compact(value) -> str:
    """The compact text of a value."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def orders(value: dict) -> Iterator[dict]:
    """An object with its keys in every order."""
    for pairs in permutations(value.items()):
        yield dict(pairs)


def objects(values: Iterable, keys: Iterable[str], most: int) -> Iterator[dict]:
    """All objects of at most ``most`` of the keys, in every order, with these values."""
    values = list(values)
    keys = list(keys)
    for count in range(most + 1):
        for chosen in permutations(keys, count):
            for filling in product(values, repeat=count):
                yield dict(zip(chosen, filling, strict=True))


def arrays(values: Iterable, most: int) -> Iterator[list]:
    """All arrays of at most ``most`` of these values."""
    values = list(values)
    for count in range(most + 1):
        for filling in product(values, repeat=count):
            yield list(filling)


def texts_of(frames: JsonFrames, node: Node, longest: int = 60) -> set[str]:
    """All texts of a node up to a length; asserts that every state on the way can be completed
    (if no text is longer).
    """
    start = frames.start(node)
    endings: dict[tuple[State, int], frozenset[bytes]] = {}
    return set() if start is None else {text.decode() for text in _endings(start, longest, endings)}


def _endings(state: State, room: int, known: dict) -> frozenset[bytes]:
    """The texts of at most ``room`` bytes that complete a state."""
    if (state, room) not in known:
        found = {b""} if accepting(state) else set()
        alive = bool(found)
        for byte in _bytes_of(state) if room else ():
            following = step(state, byte)
            if following is not None:
                alive = True
                symbol = bytes([byte])
                found.update(symbol + ending for ending in _endings(following, room - 1, known))
        assert alive or not room, f"a dead end: {state}"
        known[state, room] = frozenset(found)
    return known[state, room]


def _bytes_of(state: State) -> list[int]:
    """The bytes that some thread's DFA can read."""
    rows = [thread.terminal.dfa.byte_table[thread.state] for thread in state.threads]
    return np.flatnonzero(np.any(rows, axis=0)).tolist() if rows else []


def read(frames: JsonFrames, node: Node, text: str) -> State | None:
    """The state after a text; None if it is not the beginning of a legal one."""
    state = frames.start(node)
    for byte in text.encode():
        if state is None:
            return None
        state = step(state, byte)
    return state


def accepted(frames: JsonFrames, node: Node, text: str) -> bool:
    """Whether a whole text is legal."""
    state = read(frames, node, text)
    return state is not None and accepting(state)
