"""Which tokens may follow: ``mask(state)`` for a whole vocabulary.

A token is legal if the automaton can read all of its bytes. The definition is ``naive_mask``: read
each token, byte by byte. ``TokenMasks`` gives the same answer by walking the token trie with the
DFA of every thread of the state (``trie_walk``), which needs no stack: XGrammar's
context-independent tokens, nearly all of a vocabulary. Only at the exits of a walk, inside tokens
that leave their terminal (``",`` or ``}]``), the stack is asked what follows; these subtrees of
the trie are walked again, from all exits at once that continue alike.

Three things are kept, each up to a number of bytes: walks by DFA, state, allowed labels and roots;
what follows a stack after a terminal; masks by state, as packed bits. A mask seen before is an
unpacking.

| case                                   | rule                                                  |
|----------------------------------------|-------------------------------------------------------|
| a token that ends inside a character   | legal if the character can be completed               |
| tokens of equal bytes                  | legal together                                        |
| empty tokens, special tokens           | never legal                                           |
| end tokens                             | legal exactly where the state accepts                 |

Sources: XGrammar (arXiv 2411.15100, §3.1–3.2: context-independent tokens and the adaptive token
mask cache); the index of states by tokens, Outlines (arXiv 2307.09702).

Left out: storing the rejected tokens where they are fewer (a packed mask has V / 8 bytes); device
arrays: masks lie on the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from refllm.decode.grammar.automaton import Resumption, State, Thread, leave, settle, step
from refllm.decode.grammar.bounded_cache import BoundedCache
from refllm.decode.grammar.token_trie import ROOT, TokenTrie
from refllm.decode.grammar.trie_walk import CountedWalk, Exit, Reader, Roots, Walk, distinct, walk

MASK_BYTES = 64 << 20
WALK_BYTES = 128 << 20
FOLLOWING_STATES = 20_000


def naive_mask(
    state: State, tokens: Sequence[bytes | None], end_tokens: Iterable[int] = ()
) -> np.ndarray:
    """bool[V]: the definition, token by token.

    >>> from refllm.decode.grammar.automaton import Terminal, enter
    >>> from refllm.decode.grammar.automata.dfa_builders import literal
    >>> start = enter([(Terminal(literal(b"ab", size=256)), None)])
    >>> naive_mask(start, [b"a", b"ab", b"b", b"abc", b"", None], [5]).tolist()
    [True, True, False, False, False, False]
    """
    ends = frozenset(end_tokens)
    mask = np.zeros(len(tokens), dtype=bool)
    for i, token in enumerate(tokens):
        if i in ends:
            mask[i] = state.finished
        elif token:
            after: State | None = state
            for byte in token:
                after = None if after is None else step(after, byte)
            mask[i] = after is not None
    return mask


class Following(NamedTuple):
    """What follows a terminal that was left: threads, and whether the text may end; true if
    either.
    """

    threads: tuple[Thread, ...]
    finished: bool

    def __bool__(self) -> bool:
        return bool(self.threads) or self.finished


class TokenMasks:
    """The masks of one automaton over the tokens of ``trie``; equal to ``naive_mask``.

    ``masks``, ``walks`` and ``following`` are the caches; their counters say how often they hit.
    """

    def __init__(
        self,
        trie: TokenTrie,
        end_tokens: Iterable[int] = (),
        *,
        mask_bytes: int = MASK_BYTES,
        walk_bytes: int = WALK_BYTES,
    ) -> None:
        self.trie = trie
        self.end_tokens = np.array(sorted(end_tokens), dtype=np.int64)
        self.masks: BoundedCache[np.ndarray] = BoundedCache(mask_bytes, _nbytes)
        self.walks: BoundedCache[Walk | CountedWalk | Reader] = BoundedCache(walk_bytes, _nbytes)
        self.following: BoundedCache[Following] = BoundedCache(
            FOLLOWING_STATES, lambda _: 1, overhead=0
        )
        self._single: dict[int, Roots] = {}  # of one node each
        self._root = Roots(trie, np.array([ROOT], dtype=np.int32))

    def mask(self, state: State) -> np.ndarray:
        """The legal tokens after ``state``, bool[V], a new array."""
        bits = self.masks.get(state, lambda: self._packed(state))
        return self.trie.unpack(bits)

    def _packed(self, state: State) -> np.ndarray:
        """The legal tokens as packed bits."""
        legal = np.zeros((self.trie.vocabulary + 7) // 8, dtype=np.uint8)
        pending = [(thread, self._root) for thread in state.threads]
        while pending:  # each round walks below the exits of the last one
            exits: dict[Thread, list[np.ndarray]] = {}
            for thread, roots in pending:
                found = self._walk(thread, roots)
                legal |= found.bits
                for one in found.exits:
                    legal |= self._follow(thread, roots, one, exits)
            pending = [
                (thread, roots)
                for thread, parts in exits.items()
                for roots in self._roots_of(thread, parts)
            ]
        mask = self.trie.unpack(legal)
        mask[self.end_tokens] = state.finished
        return np.packbits(mask)

    def _follow(
        self,
        thread: Thread,
        roots: Roots,
        left: Exit,
        exits: dict[Thread, list[np.ndarray]],
    ) -> np.ndarray:
        """Add to ``exits`` what follows ``thread`` when it leaves its terminal at an exit; returns
        the tokens that may end there, as packed bits.
        """
        if not thread.texts:
            following = self._after(leave(thread, left.labels))
            if len(left.inner):
                for after in following.threads:
                    exits.setdefault(after, []).append(left.inner)
            return left.bits if following else np.zeros_like(left.bits)
        # The frames ask for the bytes read since the root, which differ from node to node.
        begin = roots.groups[0][0]
        legal = []
        for node in left.nodes:
            read = self.trie.text(int(node))[begin:]
            texts = tuple(text + read for text in thread.texts)
            following = self._after(leave(thread._replace(texts=texts), left.labels))
            if following:
                legal.append(node)
            if self.trie.has_children[node]:
                for after in following.threads:
                    exits.setdefault(after, []).append(node.reshape(1))
        return self.trie.pack(np.array(legal, dtype=np.int32))

    def _roots_of(self, thread: Thread, parts: list[np.ndarray]) -> list[Roots]:
        """The roots of the walks that follow: all together, or each alone where the bytes since
        the root matter.
        """
        nodes = parts[0] if len(parts) == 1 else distinct(np.concatenate(parts))
        if not thread.texts and len(nodes) > 1:
            return [Roots(self.trie, nodes)]
        for node in nodes.tolist():
            if node not in self._single:
                self._single[node] = Roots(self.trie, np.array([node], dtype=np.int32))
        return [self._single[node] for node in nodes.tolist()]

    def _after(self, resumption: Resumption) -> Following:
        """What follows where a terminal is left."""

        def compute() -> Following:
            state = settle([resumption])
            if state is None:
                return Following((), False)
            return Following(tuple(state.threads), state.finished)

        return self.following.get(resumption, compute)

    def _walk(self, thread: Thread, roots: Roots) -> Walk:
        """The walk of one thread's terminal below ``roots``, within its length limits."""
        terminal = thread.terminal
        name = (terminal.dfa, terminal.allowed, terminal.counted)
        key = (name, thread.state, roots)

        def make() -> Walk | CountedWalk:
            reader = self.walks.get(name, lambda: Reader(terminal))
            assert isinstance(reader, Reader)
            return walk(self.trie, reader, thread.state, roots)

        found = self.walks.get(key, make)
        if isinstance(found, CountedWalk):
            counted = found
            low, high = counted.clipped(*terminal.limits(thread.count))
            found = self.walks.get((key, low, high), lambda: counted.within(self.trie, low, high))
        assert isinstance(found, Walk)
        return found


def _nbytes(value: np.ndarray | Walk | CountedWalk | Reader) -> int:
    return value.nbytes
