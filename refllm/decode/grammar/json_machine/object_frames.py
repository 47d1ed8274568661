"""Objects as frames: which key may follow, its value, and what comes after it.

    { "key" : value , "key" : value }
    └─ key ──┘└ value ┘└─ key ──┘

One terminal reads everything up to a value (bracket or comma, whitespace, key, colon; see
``json_text.py``); which keys it may read is decided by ``ObjectTable``. A key of a class of keys
is read with its text, compared with the keys seen, and followed by a colon of its own.

Where an array with ``uniqueItems`` lies below, the frame also keeps the pairs read (``pairs``)
and the objects that it must not become (``forbidden``, those that agree with the pairs so far;
``distinct.py``).

Frames are values: two orders of the same keys lead to equal frames.

Left out: nothing of the shape; how long the whole text may become.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

from refllm.decode.grammar.automata.dfa import DFA
from refllm.decode.grammar.automata.dfa_operations import labelled_union, relabel
from refllm.decode.grammar.automata.utf8 import json_string
from refllm.decode.grammar.automaton import Entry, Stack, Terminal
from refllm.decode.grammar.json_machine.json_text import CLOSE, colon_dfa, key_bytes, key_dfa
from refllm.decode.grammar.json_machine.object_table import ObjectState, ObjectTable, Value
from refllm.decode.grammar.json_machine.value_frames import closed
from refllm.decode.grammar.json_scalars.json_values import Frozen, FrozenObject, Pair, read_value
from refllm.decode.grammar.json_schema.shapes import ObjectShape

if TYPE_CHECKING:
    from refllm.decode.grammar.json_machine.json_frames import JsonFrames

NO_PAIRS: FrozenObject = frozenset()


class Phase(Enum):
    """What the terminal above the frame reads."""

    KEY = "key"
    COLON = "colon"
    VALUE = "value"


class ObjectText:
    """The terminals of one shape, made when they are first needed."""

    def __init__(self, shape: ObjectShape, frames: JsonFrames) -> None:
        self.frames = frames
        self.table = ObjectTable(shape, frames.shapes, frames.order)
        self._terminals: dict[tuple[bool, frozenset[str], int], Terminal] = {}
        self.colon = Terminal(colon_dfa(frames.whitespace))

    def terminal(self, opening: bool, allowed: int, excluded: frozenset[str]) -> Terminal:
        """What is read before a value, with these labels allowed, and without some keys."""
        cached = (opening, excluded, allowed)
        terminal = self._terminals.get(cached)
        if terminal is None:
            dfa = self._dfa(opening, excluded)
            capture = bool(allowed & self.table.class_labels)
            terminal = self._terminals[cached] = Terminal(dfa, allowed, capture=capture)
        return terminal

    def seen_bounded(self, extras: frozenset[tuple[int, str]]) -> frozenset[str]:
        """The keys seen that must be taken out of the DFA: no endlessly many keys begin like them,
        so that a key equal to one seen could become the only one left.
        """
        if not extras:
            return frozenset()
        return frozenset(key for index, key in extras if self._is_bounded(index, key))

    def _is_bounded(self, index: int, key: str) -> bool:
        keys = self.table.classes[index].keys
        return keys.bounded(keys.run(map(ord, key)))

    def _dfa(self, opening: bool, excluded: frozenset[str]) -> DFA:
        """The key DFA, which all shapes with the same keys and classes share."""
        keys = tuple(key.quoted for key in self.table.keys)
        classes = tuple(found.keys for found in self.table.classes)
        cached = (opening, excluded, keys, classes)
        dfa = self.frames.key_dfas.get(cached)
        if dfa is None:
            no_class = excluded | self.table.names
            words = {quoted: 0 for key in no_class if (quoted := key_bytes(key)) is not None}
            for index, quoted in enumerate(keys):
                words[quoted] = self.table.key_label(index)
            dfa = key_dfa(opening, words, self._other_keys(), self.frames.whitespace)
            self.frames.key_dfas[cached] = dfa
        return dfa

    def _other_keys(self) -> DFA | None:
        """The quoted keys of all classes, with the label of each class."""
        classes = self.table.classes
        if len(classes) == 1:
            # the JSON text of a language is kept with it, and mostly it is that of all strings
            return relabel(json_string(classes[0].keys), self.table.class_labels)
        parts = [(found.keys, self.table.class_label(at)) for at, found in enumerate(classes)]
        return json_string(labelled_union(parts)) if parts else None


@dataclass(frozen=True)
class ObjectFrame:
    """An object that is being read; ``state`` counts the key whose value comes next."""

    text: ObjectText
    phase: Phase
    state: ObjectState
    key: str | None = None  # before a value: the key, where it is needed
    label: int = 0  # before a colon: the label of the key's class
    pairs: FrozenObject | None = None  # read so far, where items are compared below
    forbidden: frozenset[FrozenObject] = frozenset()

    @property
    def captures(self) -> bool:
        """False: the frame reads texts from its terminals alone."""
        return False

    def resume(self, label_bits: int, text: bytes | None, below: Stack | None) -> Iterator[Entry]:
        """What follows the key, the colon or the value that was read (``Frame.resume``)."""
        if self.phase is Phase.VALUE:
            value = None if self.pairs is None or text is None else read_value(text)
            return self.after_value(value, below)
        if self.phase is Phase.COLON:
            return self._values(self.label, self.key, below)
        return self._after_key(label_bits, text, below)

    def after_value(self, value: Frozen, below: Stack | None) -> Iterator[Entry]:
        """What follows a value; ``value`` matters only where pairs are kept."""
        frame = replace(self, phase=Phase.KEY, key=None, label=0)
        if self.pairs is not None:
            assert self.key is not None
            pair = (self.key, value)
            if not self._can_become(self.state, pair):
                return
            frame = replace(
                frame,
                pairs=self.pairs | {pair},
                forbidden=frozenset(other for other in self.forbidden if pair in other),
            )
        terminal = frame.before_key(opening=False)
        if terminal is not None:
            yield terminal, Stack(frame, below)

    def before_key(self, opening: bool) -> Terminal | None:
        """The terminal for the next key or the closing bracket; None if neither is legal."""
        table = self.text.table
        moves = table.moves(self.state)
        allowed = moves.allowed
        excluded = self.text.seen_bounded(self.state.extras)
        if self.forbidden:
            if self.pairs in self.forbidden:
                allowed &= ~CLOSE
            for key, label in self._keys_of_forbidden():
                if moves.values.get(label) and not any(self._choices(label, key)):
                    allowed &= ~label | table.class_labels
                    if label & table.class_labels:
                        excluded = excluded | {key}
        if not allowed:
            return None
        return self.text.terminal(opening, allowed, excluded)

    def _after_key(self, labels: int, text: bytes | None, below: Stack | None) -> Iterator[Entry]:
        table = self.text.table
        if labels & CLOSE:
            yield from closed(self.pairs, below)
            return
        label = labels & -labels  # keys belong to one label each
        if not label & table.class_labels:
            key = table.keys[table.key_of(label)].text if self.pairs is not None else None
            yield from self._values(label, key, below)
            return
        assert text is not None
        key = json.loads(text[text.index(b'"') :])
        if (-1 - table.key_of(label), key) in self.state.extras:
            return
        if self.forbidden and not any(self._choices(label, key)):
            return
        frame = replace(self, phase=Phase.COLON, key=key, label=label)
        yield self.text.colon, Stack(frame, below)

    def _values(self, label: int, key: str | None, below: Stack | None) -> Iterator[Entry]:
        """The value of a key in each way that the key allows."""
        for value, after, forbidden in self._choices(label, key):
            frame = ObjectFrame(
                self.text,
                Phase.VALUE,
                after,
                None if self.pairs is None else key,
                0,
                self.pairs,
                self.forbidden,
            )
            yield from self.text.frames.threads(value.node, Stack(frame, below), forbidden)

    def _choices(
        self, label: int, key: str | None
    ) -> Iterator[tuple[Value, ObjectState, frozenset[Frozen] | None]]:
        """The values that may follow a key, the state after each, and the values forbidden there
        (None: values are not compared).
        """
        table = self.text.table
        for value in table.moves(self.state).values[label]:
            after = table.after(self.state, label, key, value.owed)
            if self.pairs is None:
                yield value, after, None
                continue
            assert key is not None
            candidates = {mine for other in self.forbidden for name, mine in other if name == key}
            forbidden = frozenset(
                mine for mine in candidates if not self._can_become(after, (key, mine))
            )
            if self.text.frames.distinct.has_other(value.node, forbidden):
                yield value, after, forbidden

    def _can_become(self, after: ObjectState, pair: Pair) -> bool:
        """Whether, with one more pair, an object that is not forbidden can be completed."""
        assert self.pairs is not None
        agreeing = frozenset(other for other in self.forbidden if pair in other)
        if not agreeing:
            return True
        pairs = self.pairs | {pair}
        rest = frozenset(other - pairs for other in agreeing)
        return self.text.frames.distinct.object_completes(self.text.table, after, rest)

    def _keys_of_forbidden(self) -> Iterator[tuple[str, int]]:
        """The keys of the forbidden objects that have not been read, with their labels."""
        for key in {key for other in self.forbidden for key, _ in other}:
            label = self.text.table.label_of(key)
            if label:
                yield key, label


def open_object(
    text: ObjectText, forbidden: frozenset[FrozenObject] | None
) -> tuple[Terminal, ObjectFrame] | None:
    """The terminal and the frame that begin an object; None if no object can be completed."""
    start = text.table.start
    if not text.table.feasible(start):
        return None
    pairs = None if forbidden is None else NO_PAIRS
    frame = ObjectFrame(text, Phase.KEY, start, pairs=pairs, forbidden=forbidden or frozenset())
    terminal = frame.before_key(opening=True)
    return None if terminal is None else (terminal, frame)
