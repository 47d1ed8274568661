"""From automata over characters to automata over bytes: UTF-8, and the text of a JSON string.

A character becomes one to four bytes (RFC 3629), so an interval of characters becomes a few
*sequences of byte ranges*: U+0800 … U+FFFF without surrogates is ``[E0][A0-BF][80-BF]``,
``[E1-EC][80-BF][80-BF]``, ``[ED][80-9F][80-BF]`` and ``[EE-EF][80-BF][80-BF]``. They are put
into one tree for all classes of the alphabet, and the tree is laid between each state of the
automaton and its successors; equal subtrees are shared.

``json_string`` writes a string as ``json.dumps(text, ensure_ascii=False)`` does and no other
way: in quotes, with ``\\" \\\\ \\n \\r \\t \\b \\f`` for these seven characters, ``\\u00xx`` (lower
case) for the other characters below U+0020, and everything else as it is.

Labels stay on the words, so they are accepted with the last byte (of a JSON string: the closing
quote).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from weakref import WeakKeyDictionary

import numpy as np

from refllm.array_types import Array
from refllm.decode.grammar.automata.alphabet import (
    BYTES,
    CHARACTERS,
    SURROGATES,
    Alphabet,
    Interval,
    alphabet_of,
)
from refllm.decode.grammar.automata.dfa import DEAD, DFA
from refllm.decode.grammar.automata.dfa_builders import MAX_ENTRIES, MAX_STATES, never, too_large

ByteRanges = tuple[Interval, ...]  # one range of bytes after the other

_LAST_OF_LENGTH = (0x7F, 0x7FF, 0xFFFF, 0x10FFFF)  # the last character of 1, 2, 3, 4 bytes
_QUOTE = 0x22
_BACKSLASH = 0x5C
_SHORT_ESCAPES = {
    0x22: '"', 0x5C: "\\", 0x08: "b", 0x09: "t", 0x0A: "n", 0x0C: "f", 0x0D: "r",
}  # fmt: skip


def utf8_ranges(low: int, high: int) -> Iterator[ByteRanges]:
    """The sequences of byte ranges that are the UTF-8 forms of the characters low … high.

    Surrogates are left out. Of two sequences the first ranges are equal or disjoint.
    """
    for first, last in ((low, min(high, SURROGATES[0] - 1)), (max(low, SURROGATES[1] + 1), high)):
        start = first
        for length, limit in enumerate(_LAST_OF_LENGTH, start=1):
            end = min(last, limit)
            if start <= end:
                yield from _ranges_of_length(start, end, length)
                start = end + 1


def _ranges_of_length(low: int, high: int, length: int) -> Iterator[ByteRanges]:
    """The same for characters of one encoded length, split where a trailing byte is not full."""
    for trailing in range(1, length):
        block = (1 << 6 * trailing) - 1  # the characters of one prefix: `trailing` free bytes
        if low & ~block == high & ~block:
            continue
        if low & block:
            yield from _ranges_of_length(low, low | block, length)
            yield from _ranges_of_length((low | block) + 1, high, length)
            return
        if high & block != block:
            yield from _ranges_of_length(low, (high & ~block) - 1, length)
            yield from _ranges_of_length(high & ~block, high, length)
            return
    yield tuple(zip(chr(low).encode(), chr(high).encode(), strict=True))


def _json_ranges(low: int, high: int) -> Iterator[ByteRanges]:
    """The same for characters within a JSON string as ``json.dumps`` writes it."""
    next_ = low
    for code in (*range(0x20), _QUOTE, _BACKSLASH):
        if low <= code <= high:
            if next_ < code:
                yield from utf8_ranges(next_, code - 1)
            next_ = code + 1
            short = _SHORT_ESCAPES.get(code)
            text = f"\\{short}" if short else f"\\u{code:04x}"
            yield tuple((byte, byte) for byte in text.encode())
    if next_ <= high:
        yield from utf8_ranges(next_, high)


@dataclass
class _Node:
    """What may follow some bytes of a character: per byte range another node, or a class."""

    edges: dict[Interval, _Node | int] = field(default_factory=dict)
    classes: tuple[int, ...] = ()  # the classes that it leads to


@lru_cache(maxsize=256)
def _encoding_tree(alphabet: Alphabet, *, json: bool) -> _Node:
    """All characters of an alphabet, encoded, as one tree; its leaves are classes."""
    encode: Callable[[int, int], Iterator[ByteRanges]] = _json_ranges if json else utf8_ranges
    root = _Node()
    for low, high, cls in alphabet.intervals():
        for sequence in encode(low, high):
            node = root
            for byte_range in sequence[:-1]:
                child = node.edges.setdefault(byte_range, _Node())
                assert isinstance(child, _Node)
                node = child
            node.edges[sequence[-1]] = cls
    _note_classes(root)
    return root


def _note_classes(node: _Node) -> None:
    found: set[int] = set()
    for child in node.edges.values():
        if isinstance(child, _Node):
            _note_classes(child)
            found.update(child.classes)
        else:
            found.add(child)
    node.classes = tuple(sorted(found))


class _Builder:
    """States over bytes. State s of the automaton over characters keeps its number."""

    def __init__(self, dfa: DFA, *, json: bool) -> None:
        self._dfa = dfa
        self._tree = _encoding_tree(dfa.alphabet, json=json)
        self.edges: list[dict[Interval, int]] = [{} for _ in dfa.labels]
        self._shared: dict[tuple[tuple[Interval, int], ...], int] = {}
        self._memo: dict[tuple[int, tuple[int, ...]], int] = {}

    def build(self) -> None:
        for state in range(1, self._dfa.states):
            self.edges[state] = self._edges_of(self._tree, self._dfa.table[state])

    def _edges_of(self, node: _Node, row: Sequence[int]) -> dict[Interval, int]:
        edges = {}
        for byte_range, child in node.edges.items():
            target = self._state_of(child, row) if isinstance(child, _Node) else row[child]
            if target != DEAD:
                edges[byte_range] = target
        return edges

    def _state_of(self, node: _Node, row: Sequence[int]) -> int:
        """The state within a character: shared by all that go on in the same way."""
        targets = tuple([row[cls] for cls in node.classes])
        if not any(targets):
            return DEAD
        known = self._memo.get((id(node), targets))
        if known is not None:
            return known
        edges = _joined(self._edges_of(node, row))
        key = tuple(edges.items())
        state = self._shared.get(key)
        if state is None:
            state = self.add(edges)
            self._shared[key] = state
        self._memo[id(node), targets] = state
        return state

    def add(self, edges: dict[Interval, int]) -> int:
        if len(self.edges) >= MAX_STATES:
            raise too_large("the text of a string")
        self.edges.append(edges)
        return len(self.edges) - 1

    def finish(self, start: int, labels: dict[int, int]) -> DFA:
        """The automaton; every state is live already, since every node leads to a class."""
        ranges = {byte_range for out in self.edges for byte_range in out}
        numbers = {byte_range: number for number, byte_range in enumerate(sorted(ranges))}
        alphabet, parts = alphabet_of(BYTES, [(byte_range,) for byte_range in numbers])
        if len(self.edges) * alphabet.count > MAX_ENTRIES:
            raise too_large("the text of a string")
        table = []
        for out in self.edges:
            row = [DEAD] * alphabet.count
            for byte_range, target in out.items():
                for cls in parts[numbers[byte_range]]:
                    row[cls] = target
            table.append(row)
        bits = tuple(labels.get(state, 0) for state in range(len(self.edges)))
        return DFA(alphabet, table, start, bits)


def _joined(edges: dict[Interval, int]) -> dict[Interval, int]:
    """The same edges in ascending order, neighbours of one target as one range."""
    result: dict[Interval, int] = {}
    start = end = last = -1
    for (low, high), target in sorted(edges.items()):
        if target == last and low == end + 1:
            del result[start, end]
        else:
            start = low
        end = high
        last = target
        result[start, end] = target
    return result


def _check_characters(dfa: DFA) -> None:
    if dfa.size != CHARACTERS:
        raise TypeError("an automaton over characters is needed")


def to_bytes(dfa: DFA) -> DFA:
    """The automaton over bytes of the UTF-8 texts whose characters ``dfa`` accepts."""
    _check_characters(dfa)
    if dfa.empty:
        return never(BYTES)
    builder = _Builder(dfa, json=False)
    builder.build()
    return builder.finish(dfa.start, dict(enumerate(dfa.labels)))


def json_string(dfa: DFA) -> DFA:
    """The automaton over bytes of the JSON strings, in quotes, whose value ``dfa`` accepts."""
    return json_string_counted(dfa)[0]


# Kept as long as the automaton over characters is: an automaton over bytes may be large.
_written: WeakKeyDictionary[DFA, tuple[DFA, Array]] = WeakKeyDictionary()


def json_string_counted(dfa: DFA) -> tuple[DFA, Array]:
    """``json_string``, and which bytes complete a character: int8[S, 256], 0 or 1.

    With these, the length of the string is counted beside the automaton (``counts.py``). The
    same automaton gives the same result, so that states over it can be compared.
    """
    found = _written.get(dfa)
    if found is None:
        found = _json_string_counted(dfa)
        _written[dfa] = found
    return found


def _json_string_counted(dfa: DFA) -> tuple[DFA, Array]:
    _check_characters(dfa)
    if dfa.empty:
        return never(BYTES), np.zeros((1, BYTES), dtype=np.int8)
    builder = _Builder(dfa, json=True)
    builder.build()
    labels = {}
    closed: dict[int, int] = {}  # label → the state after the closing quote
    for state, label in enumerate(dfa.labels):
        if label:
            if label not in closed:
                closed[label] = builder.add({})
                labels[closed[label]] = label
            builder.edges[state][_QUOTE, _QUOTE] = closed[label]
    start = builder.add({(_QUOTE, _QUOTE): dfa.start})
    text = builder.finish(start, labels)
    completes = (text.byte_table > DEAD) & (text.byte_table < dfa.states)
    completes[start] = False  # the opening quote is no character of the string
    return text, completes.astype(np.int8)
