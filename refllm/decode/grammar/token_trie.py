"""The tokens of a vocabulary as a trie over bytes, stored as arrays in breadth-first order.

Tokens that begin alike share nodes, so that a byte is read once for all of them. Nodes are
numbered level by level, and within a level by parent and byte: the children of a range of nodes
are a range again, and a whole level is read by two gathers (``trie_walk``).

| symbol | name           | shape                                                             |
|--------|----------------|-------------------------------------------------------------------|
| K      | nodes          | the root is node 0                                                |
| V      | tokens         |                                                                   |
|        | ``parent``     | int32[K], the root is its own                                     |
|        | ``byte``       | uint8[K], the byte read last                                      |
|        | ``children``   | int32[K + 1], those of node i are ``children[i] … children[i+1]`` |
|        | ``has_children`` | bool[K]                                                         |
|        | ``levels``     | first node of each level; the last entry is K                     |
|        | ``node``       | int32[V], the node of each token; 0 for one that is never legal   |

Tokens of equal bytes share a node. Empty tokens, which would never end, and special tokens have
none: they stand at the root, which no token may use.

Source: the token trie of llguidance (``docs/toktrie.md``), there in depth-first order for one
byte at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from weakref import WeakKeyDictionary

import numpy as np

from refllm.checkpoints.tokenizer import Tokenizer
from refllm.decode.grammar.automata.alphabet import BYTES, Alphabet
from refllm.decode.grammar.vocabulary import token_bytes

ROOT = 0


class TokenTrie:
    """A trie of tokens; see the module's table.

    >>> trie = TokenTrie([b"a", b"ab", None, b"", b"b", b"ab"])
    >>> trie.node.tolist(), trie.levels
    ([1, 3, 0, 0, 2, 3], [0, 1, 3, 4])
    """

    def __init__(self, tokens: Sequence[bytes | None]) -> None:
        self.tokens = tuple(tokens)
        texts = [token or b"" for token in tokens]
        lengths = np.array([len(text) for text in texts], dtype=np.int64)
        flat = np.frombuffer(b"".join(texts), dtype=np.uint8)
        begins = np.cumsum(lengths) - lengths
        node = np.zeros(len(texts), dtype=np.int64)
        parents = [np.zeros(1, dtype=np.int64)]
        last = [np.zeros(1, dtype=np.int64)]
        self.levels = [0, 1]
        depth = 0
        while len(longer := np.flatnonzero(lengths > depth)):
            # a node is its parent and its last byte; equal pairs are one node
            keys = node[longer] * BYTES + flat[begins[longer] + depth]
            distinct, place = np.unique(keys, return_inverse=True)
            node[longer] = self.levels[-1] + place.reshape(-1)
            parents.append(distinct // BYTES)
            last.append(distinct % BYTES)
            self.levels.append(self.levels[-1] + len(distinct))
            depth += 1
        self.node = node.astype(np.int32)
        self.parent = np.concatenate(parents).astype(np.int32)
        self.byte = np.concatenate(last).astype(np.uint8)
        counts = np.bincount(self.parent[1:], minlength=len(self.parent))
        self.children = np.concatenate([[1], 1 + np.cumsum(counts)]).astype(np.int32)
        self.has_children = counts > 0
        # the tokens of node i are _by_node[_token_begins[i]:_token_begins[i + 1]]
        self._by_node = np.argsort(self.node, kind="stable").astype(np.int32)
        of_node = np.bincount(self.node, minlength=len(self.parent))
        self._token_begins = np.concatenate([[0], np.cumsum(of_node)]).astype(np.int32)
        self._firsts = np.array(self.levels)
        self._columns = lru_cache(maxsize=64)(self._classes_of)

    def __len__(self) -> int:
        return len(self.parent)

    @property
    def vocabulary(self) -> int:
        """V, the number of tokens."""
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        arrays = (self.node, self.parent, self.byte, self.children, self.has_children)
        return sum(array.nbytes for array in arrays)

    def columns(self, alphabet: Alphabet) -> np.ndarray:
        """The class of each node's byte, uint8[K]; the most recent alphabets are kept."""
        return self._columns(alphabet)

    def _classes_of(self, alphabet: Alphabet) -> np.ndarray:
        lengths = np.diff(np.array((*alphabet.starts, BYTES)))
        classes = np.repeat(np.array(alphabet.classes, dtype=np.uint8), lengths)  # of each byte
        return classes[self.byte]

    def level(self, nodes: np.ndarray) -> np.ndarray:
        """The level of each node, int64[L]: the number of bytes that lead to it."""
        return np.searchsorted(self._firsts, nodes, side="right") - 1

    def text(self, node: int) -> bytes:
        """The bytes that lead from the root to ``node``."""
        found = bytearray()
        while node != ROOT:
            found.append(self.byte[node])
            node = int(self.parent[node])
        return bytes(reversed(found))

    def pack(self, nodes: np.ndarray) -> np.ndarray:
        """The tokens of these nodes int[L], as packed bits uint8[ceil(V / 8)]; the root must not
        be among them.
        """
        if len(nodes) > len(self) // 16:
            live = np.zeros(len(self), dtype=bool)
            live[nodes] = True
            return np.packbits(live[self.node])
        mask = np.zeros(self.vocabulary, dtype=bool)
        begin = self._token_begins[nodes]
        counts = self._token_begins[nodes + 1] - begin
        if len(nodes) and int(counts.max()) > 1:  # equal tokens
            begin = np.repeat(begin, counts) + _places_in_groups(counts)
        else:
            begin = begin[counts > 0]
        mask[self._by_node[begin]] = True
        return np.packbits(mask)

    def unpack(self, bits: np.ndarray) -> np.ndarray:
        """bool[V] of packed bits."""
        return np.unpackbits(bits, count=self.vocabulary).view(bool)

    @cached_property
    def single(self) -> frozenset[int]:
        """The bytes that are a token by themselves."""
        return frozenset(token[0] for token in self.tokens if token is not None and len(token) == 1)

    def __reduce__(self) -> tuple[object, ...]:
        return TokenTrie, (self.tokens,)


def _places_in_groups(counts: np.ndarray) -> np.ndarray:
    """0 … n-1 for each n of ``counts``, one after another.

    >>> _places_in_groups(np.array([2, 0, 3])).tolist()
    [0, 1, 0, 1, 2]
    """
    ends = np.cumsum(counts)
    places = np.arange(int(ends[-1]) if len(ends) else 0)
    places -= np.repeat(ends - counts, counts)
    return places


# One trie for each tokenizer object, as long as it lives.
_TRIES: WeakKeyDictionary[Tokenizer, tuple[int | None, TokenTrie]] = WeakKeyDictionary()


def trie_of(tokenizer: Tokenizer) -> TokenTrie:
    """The trie of a tokenizer's tokens: built once, and again if its ``limit`` changed.

    Raises
    ------
    InputError
        if the tokens have no bytes of their own; see ``vocabulary.token_bytes``.
    """
    found = _TRIES.get(tokenizer)
    if found is None or found[0] != tokenizer.limit:
        found = tokenizer.limit, TokenTrie(token_bytes(tokenizer))
        _TRIES[tokenizer] = found
    return found[1]
