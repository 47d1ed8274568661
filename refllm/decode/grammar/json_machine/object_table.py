"""Which keys may follow in an object: the bookkeeping of one ``ObjectShape``.

A state is what the rest of the object depends on: the named keys seen (a bit set), the other
keys seen, the place in the order of definition if that is kept, and the witnesses still owed (a
bit set over ``ObjectShape.witnesses``: pairs that must still come). A state is *feasible* if the
object can be completed from it:

    pairs so far + pairs needed <= maximum,  and  pairs so far + keys left >= minimum

where the pairs needed are the required keys not seen, and the fewest further pairs that serve
the witnesses owed. A key is legal if some feasible state follows it, so that no path through an
object ends without a legal close.

A pair serves a witness if its key is in the witness's language and its value fits the
witness's node as well; a thread chooses at the key which witnesses the pair serves.

| symbol | name | type |
|---|---|---|
| – | ``ObjectState.seen`` | bit set over ``ObjectTable.keys`` |
| – | ``ObjectState.owed`` | bit set over the witnesses |

Left out: the text (``json_text.py``), the stack (``object_frames.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from refllm.decode.grammar.json_machine.json_text import CLOSE, FREE_LABELS
from refllm.decode.grammar.json_machine.object_keys import Order, keys_of
from refllm.decode.grammar.json_schema.shapes import Node, NodeExpander, ObjectShape


class ObjectState(NamedTuple):
    """What the rest of an object depends on."""

    seen: int = 0  # bit set of named keys
    extras: frozenset[tuple[int, str]] = frozenset()  # other keys, each with the index of its class
    position: int = 0  # with order="schema": named keys of a lower rank may not follow
    owed: int = 0  # bit set of witnesses


class Value(NamedTuple):
    """What may stand after a key: a value of ``node``, and the witnesses that are then owed."""

    node: Node
    owed: int


@dataclass(frozen=True)
class Moves:
    """What may follow in a state: whether the object may close, and the values per label."""

    closes: bool
    values: dict[int, tuple[Value, ...]] = field(default_factory=dict)

    @property
    def allowed(self) -> int:
        """The bit set of the labels that may be accepted."""
        return sum(self.values) | (CLOSE if self.closes else 0)


class ObjectTable:
    """The keys of a shape, and which may follow in each state."""

    def __init__(self, shape: ObjectShape, shapes: NodeExpander, order: Order) -> None:
        self._shapes = shapes
        self._minimum = shape.minimum
        self._maximum = shape.maximum
        self._witnesses = shape.witnesses
        self.keys, self.classes = keys_of(shape, shapes, order)
        self._index = {key.text: index for index, key in enumerate(self.keys) if key.possible}
        self.names = frozenset(shape.named)  # they belong to no class, whether they occur or not
        self._required = sum(
            1 << index for index, key in enumerate(self.keys) if key.text in shape.required
        )
        self._possible = shape.required <= self._index.keys()
        if shape.maximum is not None and shape.minimum > shape.maximum:
            self._possible = False
        self._ranked = len(shape.order) if order == "schema" else 0
        self.start = ObjectState(owed=(1 << len(shape.witnesses)) - 1)
        # per position: the bit set of the keys that may come at it or after it
        self._from_position = [
            sum(
                1 << index
                for index, key in enumerate(self.keys)
                if key.possible and (key.rank is None or key.rank >= position)
            )
            for position in range(self._ranked + 1)
        ]
        self._moves: dict[tuple[int, tuple[int, ...], int, int], Moves] = {}
        self._needed: dict[tuple[int, tuple[int, ...], int, int], int | None] = {}

    def nodes(self) -> Iterator[Node]:
        """Every node that a value of the object may have to fit, whatever was read before."""
        kinds = [(key.node, key.serves) for key in self.keys]
        kinds += [(keys.node, keys.serves) for keys in self.classes]
        for node, serves in dict.fromkeys(kinds):
            for value in self._values(node, serves, serves):
                yield value.node

    def key_label(self, index: int) -> int:
        """The label of a named key."""
        return 1 << (FREE_LABELS + index)

    def class_label(self, index: int) -> int:
        """The label of a class of keys; above those of all named keys."""
        return 1 << (FREE_LABELS + len(self.keys) + index)

    @property
    def class_labels(self) -> int:
        """The bit set of the labels of all classes."""
        return ((1 << len(self.classes)) - 1) << (FREE_LABELS + len(self.keys))

    def key_of(self, label: int) -> int:
        """The index of the named key with this label; negative for a class, counted from -1."""
        index = label.bit_length() - 1 - FREE_LABELS
        return index if index < len(self.keys) else len(self.keys) - 1 - index

    def skips_required(self, state: ObjectState, label: int) -> bool:
        """Whether a required key with a lower label has not been seen."""
        lower = (label >> FREE_LABELS) - 1
        return bool(self._required & ~state.seen & lower)

    def label_of(self, text: str) -> int:
        """The label of a key; 0 if it cannot occur."""
        if text in self._index:
            return self.key_label(self._index[text])
        for index, keys in enumerate(self.classes):
            if text not in self.names and keys.keys.matches(text):
                return self.class_label(index)
        return 0

    def texts(self, label: int, limit: int) -> list[str] | None:
        """The keys of a label; None if they are more than ``limit``."""
        index = self.key_of(label)
        if index >= 0:
            return [self.keys[index].text]
        keys = self.classes[-1 - index]
        if keys.words is None or keys.words > limit:
            return None
        return ["".join(map(chr, word)) for word in keys.keys.words(keys.words)]

    def after(self, state: ObjectState, label: int, text: str | None, owed: int) -> ObjectState:
        """The state after the key with ``label`` (``text`` if it is of a class)."""
        index = self.key_of(label)
        if index < 0:
            assert text is not None
            extras = state.extras | {(-1 - index, text)}
            return ObjectState(state.seen, extras, self._ranked, owed)
        rank = self.keys[index].rank
        position = self._ranked if rank is None else rank + 1
        return ObjectState(state.seen | 1 << index, state.extras, position, owed)

    def moves(self, state: ObjectState) -> Moves:
        """What may follow in a feasible state."""
        summary = self._summary(state)
        found = self._moves.get(summary)
        if found is None:
            found = self._moves[summary] = self._compute_moves(*summary)
        return found

    def feasible(self, state: ObjectState) -> bool:
        """Whether an object can be completed from a state."""
        return self._possible and self._feasible(*self._summary(state))

    def _summary(self, state: ObjectState) -> tuple[int, tuple[int, ...], int, int]:
        """A state without the texts of the other keys: only how many each class has."""
        counts = [0] * len(self.classes)
        for index, _ in state.extras:
            counts[index] += 1
        return state.seen, tuple(counts), state.position, state.owed

    def _compute_moves(self, seen: int, counts: tuple[int, ...], position: int, owed: int) -> Moves:
        pairs = seen.bit_count() + sum(counts)
        closes = not self._required & ~seen and not owed and pairs >= self._minimum
        moves = Moves(closes)
        left = self._keys_left(seen, position)
        for index, key in enumerate(self.keys):
            if not left >> index & 1:
                continue
            following = self._ranked if key.rank is None else key.rank + 1
            values = tuple(
                value
                for value in self._values(key.node, key.serves & owed, owed)
                if self._feasible(seen | 1 << index, counts, following, value.owed)
            )
            if values:
                moves.values[self.key_label(index)] = values
        for index, keys in enumerate(self.classes):
            if keys.words is not None and counts[index] >= keys.words:
                continue
            more = (*counts[:index], counts[index] + 1, *counts[index + 1 :])
            values = tuple(
                value
                for value in self._values(keys.node, keys.serves & owed, owed)
                if self._feasible(seen, more, self._ranked, value.owed)
            )
            if values:
                moves.values[self.class_label(index)] = values
        return moves

    def _feasible(self, seen: int, counts: tuple[int, ...], position: int, owed: int) -> bool:
        pairs = seen.bit_count() + sum(counts)
        needed = self._pairs_needed(seen, counts, position, owed)
        if needed is None or (self._maximum is not None and pairs + needed > self._maximum):
            return False
        left = self._keys_left(seen, position).bit_count()
        for keys, count in zip(self.classes, counts, strict=True):
            if keys.words is None:
                return True
            left += keys.words - count
        return pairs + left >= self._minimum

    def _keys_left(self, seen: int, position: int) -> int:
        """The bit set of the named keys that may still come."""
        return self._from_position[position] & ~seen

    def _values(self, node: Node, served: int, owed: int) -> Iterator[Value]:
        """The ways to serve some of the witnesses ``served`` with a value of ``node``."""
        subset = served
        while True:  # every subset, in descending order
            together = node
            for index, witness in enumerate(self._witnesses):
                if subset >> index & 1:
                    together = together | witness.value
            if self._shapes.inhabited(together):
                yield Value(together, owed & ~subset)
            if not subset:
                return
            subset = (subset - 1) & served

    def _pairs_needed(
        self, seen: int, counts: tuple[int, ...], position: int, owed: int
    ) -> int | None:
        """The fewest pairs that hold all required keys and serve all witnesses owed."""
        missing = self._required & ~seen
        left = self._keys_left(seen, position)
        if missing & ~left:
            return None
        if not owed:
            return missing.bit_count()
        summary = seen, counts, position, owed
        if summary not in self._needed:
            self._needed[summary] = self._fewest(missing, left, counts, owed)
        return self._needed[summary]

    def _fewest(self, missing: int, left: int, counts: tuple[int, ...], owed: int) -> int | None:
        """Dynamic programme over the keys left: the fewest pairs per set of witnesses owed."""
        fewest = {owed: missing.bit_count()}
        for index, key in enumerate(self.keys):
            if not left >> index & 1:
                continue
            fewest = self._relax(fewest, key.node, key.serves, 0 if missing >> index & 1 else 1)
        for keys, count in zip(self.classes, counts, strict=True):
            copies = owed.bit_count()
            if keys.words is not None:
                copies = min(copies, keys.words - count)
            for _ in range(copies):
                fewest = self._relax(fewest, keys.node, keys.serves, 1)
        return fewest.get(0)

    def _relax(self, fewest: dict[int, int], node: Node, serves: int, cost: int) -> dict[int, int]:
        """The fewest pairs per set owed when one more pair may be used."""
        relaxed = dict(fewest)
        for owed, pairs in fewest.items():
            for value in self._values(node, serves & owed, owed):
                if pairs + cost < relaxed.get(value.owed, pairs + cost + 1):
                    relaxed[value.owed] = pairs + cost
        return relaxed
