"""JSON values as threads of the pushdown automaton: the shapes of a node become terminals and
frames.

A value that must fit a node (``shapes.py``) begins with one of

- a terminal per scalar shape: the literals, each string shape, each number shape (``scalars.py``);
- per array shape the bracket ``[``, on an ``ArrayFrame`` (``array_frames.py``);
- per object shape the bracket ``{`` and the first key, on an ``ObjectFrame``
  (``object_frames.py``).

Shapes of one node may overlap; then several threads read the same bytes. The values of keys and
items are nodes again, expanded when a thread gets there, so recursive schemas need no unrolling.
Everything is kept per node and per shape, and two ways to the same place give equal frames.

Left out: which shapes a schema has (``schema_algebra.py``); whitespace around the whole text.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from refllm.decode.grammar.automata.dfa import DFA
from refllm.decode.grammar.automaton import Entry, Stack, State, Terminal, enter
from refllm.decode.grammar.json_machine.array_frames import ArrayFrame, ArrayText, open_array
from refllm.decode.grammar.json_machine.distinct import DistinctValues
from refllm.decode.grammar.json_machine.json_text import Whitespace
from refllm.decode.grammar.json_machine.object_frames import ObjectFrame, ObjectText, open_object
from refllm.decode.grammar.json_machine.object_keys import Order
from refllm.decode.grammar.json_machine.scalars import Scalars
from refllm.decode.grammar.json_scalars.json_values import Frozen, FrozenArray, FrozenObject
from refllm.decode.grammar.json_schema.shapes import ArrayShape, Node, NodeExpander, ObjectShape

# opening or not, keys excluded, quoted named keys, classes of keys
KeyDFA: TypeAlias = tuple[bool, frozenset[str], tuple[bytes, ...], tuple[DFA, ...]]
Opening: TypeAlias = tuple[Terminal, ArrayFrame | ObjectFrame | None]


class JsonFrames:
    """The threads of nodes, and what they share.

    Parameters
    ----------
    shapes
        the algebra that expands nodes
    order
        ``"any"``: the keys of an object in any order; ``"schema"``: those that the schema defines
        in the order of definition (optional ones may be missing), then all others
    whitespace
        ``"default"`` or ``"compact"`` (``json_text.py``)
    """

    def __init__(
        self, shapes: NodeExpander, *, order: Order = "any", whitespace: Whitespace = "default"
    ) -> None:
        self.shapes = shapes
        self.order: Order = order
        self.whitespace: Whitespace = whitespace
        self.distinct = DistinctValues(self)
        self.key_dfas: dict[KeyDFA, DFA] = {}
        self._scalars = Scalars()
        self._objects: dict[ObjectShape, ObjectText] = {}
        self._arrays: dict[ArrayShape, ArrayText] = {}
        self._openings: dict[tuple[Node, bool], tuple[Opening, ...]] = {}

    def start(self, node: Node) -> State | None:
        """The state before a text whose value fits ``node``; None if no value fits it."""
        return enter(self.threads(node, None))

    def threads(
        self, node: Node, below: Stack | None, forbidden: frozenset[Frozen] | None = None
    ) -> Iterator[Entry]:
        """The ways to begin a value of ``node`` on a stack.

        ``forbidden``: the frame below asks for the value, which must be none of these. None: the
        frame does not ask.
        """
        if forbidden:
            openings = tuple(self._open(node, forbidden))
        else:
            known = node, forbidden is not None
            if known not in self._openings:
                self._openings[known] = tuple(self._open(node, forbidden))
            openings = self._openings[known]
        for terminal, frame in openings:
            yield terminal, below if frame is None else Stack(frame, below)

    def object_text(self, shape: ObjectShape) -> ObjectText:
        """What is kept of an object shape."""
        if shape not in self._objects:
            self._objects[shape] = ObjectText(shape, self)
        return self._objects[shape]

    def array_text(self, shape: ArrayShape) -> ArrayText:
        """What is kept of an array shape."""
        if shape not in self._arrays:
            self._arrays[shape] = ArrayText(shape, self)
        return self._arrays[shape]

    def _open(self, node: Node, forbidden: frozenset[Frozen] | None) -> Iterator[Opening]:
        shapes = self.shapes.expand(node)
        for terminal in self._scalars.terminals(shapes, forbidden):
            yield terminal, None
        arrays: frozenset[FrozenArray] | None = None
        objects: frozenset[FrozenObject] | None = None
        if forbidden is not None:
            arrays = frozenset(value for value in forbidden if isinstance(value, tuple))
            objects = frozenset(value for value in forbidden if isinstance(value, frozenset))
        for array in shapes.arrays:
            opened = open_array(self.array_text(array), arrays)
            if opened is not None:
                yield opened
        for shape in shapes.objects:
            entered = open_object(self.object_text(shape), objects)
            if entered is not None:
                yield entered
