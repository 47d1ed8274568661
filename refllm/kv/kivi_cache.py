"""The KIVI cache: what ``kv.kivi`` says of each token, packed; in the place of a contiguous
cache.

Source: Liu et al. 2024 (arXiv:2402.02750), algorithm 1; words as in their code, 32/b codes
each where b divides 32.

| array       | what it holds                                    | shape                       |
|-------------|--------------------------------------------------|-----------------------------|
| key_words   | codes of keys, a stream of tokens for a channel  | [L, B, G, D, ⌊C/R⌋ R b/32]  |
| key_steps   | s and min of g tokens of a channel               | [2, L, B, G, D, ⌊C/R⌋ R/g]  |
| key_rest    | keys that wait, position p in column p mod R     | [L, B, G, D, min(R, C)]     |
| value_words | codes of values, a stream of channels for a token| [L, B, G, C − R, ⌈D b/32⌉]  |
| value_steps | s and min of g channels of a token               | [2, L, B, G, C − R, D/g]    |
| value_rest  | values that wait, position p in row p mod R      | [L, B, G, min(R, C), D]     |

C is the capacity. Ownership: positions [0, s) are committed. What a step brings is kept as
it came until ``advance`` says how much of it stays, so a rejected draft leaves no trace;
that also means that a long prompt which comes as one step is held in full until then. In
passes it would not be, and would read itself as codes.

A step decodes what it reads: on a CPU that is slower than reading numbers, and the longer
the text, the slower. What few bits buy is room.

Left out: blocks (``kv.paged``), forgetting committed tokens (their codes are no function of
the length any more).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from refllm.backend import Array, namespace
from refllm.formats.packing import pack, unpack, words_per_row
from refllm.kv.kivi import Kivi, decode, encode
from refllm.model.attention import Attend, flash_attention
from refllm.model.config import ModelConfig


class KiviCache:
    """Keys and values of up to ``max_sequences`` sequences of up to ``capacity`` tokens,
    most of them as codes.
    """

    def __init__(
        self,
        config: ModelConfig,
        max_sequences: int,
        capacity: int,
        *,
        like: Array,
        kivi: Kivi | None = None,
        dtype: Any = None,
    ):
        """``like`` is any array of the library to live on; ``dtype`` (its own) is that of
        steps and of what waits.

        ValueError if groups do not divide a head, or there is no room for a token.
        """
        kivi = Kivi() if kivi is None else kivi
        self.kivi = kivi
        kivi.check(config.head_dim)
        if max_sequences < 1 or capacity < 1:
            raise ValueError(f"KiviCache: needs room for a token, got {max_sequences} × {capacity}")
        xp = namespace(like)
        dtype = dtype or like.dtype
        heads = (config.num_hidden_layers, max_sequences, config.num_key_value_heads)
        dim = config.head_dim
        k = kivi.quantised_keys(capacity)
        v = kivi.quantised_values(capacity)
        g = kivi.group
        self.key_words: Array = xp.zeros((*heads, dim, k * kivi.key_bits // 32), dtype=xp.uint32)
        self.key_steps: Array = xp.zeros((2, *heads, dim, k // g), dtype=dtype)
        waiting = min(kivi.residual, capacity)
        self.key_rest: Array = xp.zeros((*heads, dim, waiting), dtype=dtype)
        self.value_words: Array = xp.zeros(
            (*heads, v, words_per_row(dim, kivi.value_bits)), dtype=xp.uint32
        )
        self.value_steps: Array = xp.zeros((2, *heads, v, dim // g), dtype=dtype)
        self.value_rest: Array = xp.zeros((*heads, waiting, dim), dtype=dtype)
        self.window = config.sliding_window
        self.capacity = capacity
        self.lengths = [0] * max_sequences  # committed tokens a sequence
        self._view: _View | None = None

    @property
    def nbytes(self) -> int:
        """Bytes allocated, whatever is used; ``Kivi.nbytes`` counts what a sequence of some
        length uses.
        """
        arrays = (
            self.key_words,
            self.key_steps,
            self.key_rest,
            self.value_words,
            self.value_steps,
            self.value_rest,
        )
        return int(sum(a.nbytes for a in arrays))

    def positions(self, counts: Sequence[int]) -> list[int]:
        """Positions of the next ``counts[b]`` tokens of every sequence, in the order of the
        ragged batch.
        """
        return [s + i for s, n in zip(self.lengths, counts, strict=False) for i in range(n)]

    def view(self, counts: Sequence[int]) -> Attend:
        """An ``attend`` for a step in which sequence b brings ``counts[b]`` new tokens (0
        is allowed).

        ValueError if a sequence would outgrow the capacity.
        """
        if len(counts) > len(self.lengths):
            raise ValueError(
                f"the cache holds {len(self.lengths)} sequences, the batch has {len(counts)}"
            )
        for b, n in enumerate(counts):
            if n < 0 or self.lengths[b] + n > self.capacity:
                raise ValueError(
                    f"sequence {b}: {self.lengths[b]} cached + {n} new tokens exceed {self.capacity}"
                )
        self._view = _View(self, counts)
        return self._view

    def advance(self, counts: Sequence[int]) -> None:
        """Commit the first ``counts[b]`` tokens that the last view brought, and quantise
        what may wait no longer.

        ValueError if it brought fewer, or has not gone through all layers.
        """
        view = self._view
        layers = self.key_rest.shape[0]
        if view is None or len(view.done) != layers:
            raise ValueError(
                f"advance commits what a view brought to {layers} layers: run the step first"
            )
        if len(counts) > len(view.counts) or any(
            not 0 <= n <= m for n, m in zip(counts, view.counts, strict=False)
        ):
            raise ValueError(
                f"the step brought {view.counts} tokens, {list(counts)} cannot be committed"
            )
        k, v = view.brought
        at = 0
        for b, n in enumerate(counts):
            if n:
                self._keep_keys(b, k[:, at : at + n].transpose(0, 2, 3, 1))
                self._keep_values(b, v[:, at : at + n].transpose(0, 2, 1, 3))
                self.lengths[b] += n
            at += view.counts[b]
        self._view = None

    def read(self, layer: int, b: int, dtype: Any = None) -> tuple[Array, Array]:
        """What sequence b's next query reads of the cache: K̂[G, D, s] and V̂[G, s, D],
        decoded in ``dtype``.
        """
        xp = namespace(self.key_rest)
        kivi = self.kivi
        s = self.lengths[b]
        k = kivi.quantised_keys(s)
        v = kivi.quantised_values(s)
        dim = self.key_rest.shape[-2]
        codes = unpack(self.key_words[layer, b, :, :, : k * kivi.key_bits // 32], kivi.key_bits, k)
        step, low = self.key_steps[:, layer, b, :, :, : k // kivi.group]
        keys = decode(codes, step, low, dtype)
        codes = unpack(self.value_words[layer, b, :, :v], kivi.value_bits, dim)
        step, low = self.value_steps[:, layer, b, :, :v]
        values = decode(codes, step, low, dtype)
        waiting = [self.value_rest[layer, b, :, rows] for rows in self._rows(v, s)]
        return (
            xp.concat([keys, self.key_rest[layer, b, :, :, : s - k]], axis=-1),
            xp.concat([values, *waiting], axis=1),
        )

    def _keep_keys(self, b: int, new: Array) -> None:
        """new[L, G, D, n] follow what waits; of both, whole runs of R become codes."""
        xp = namespace(new)
        kivi = self.kivi
        s = self.lengths[b]
        start = kivi.quantised_keys(s)
        stop = kivi.quantised_keys(s + int(new.shape[-1]))
        recent = xp.concat(
            [self.key_rest[:, b, :, :, : s - start], xp.astype(new, self.key_rest.dtype)], axis=-1
        )
        if stop > start:
            codes, *steps = encode(recent[..., : stop - start], kivi.key_bits, kivi.group)
            words = slice(start * kivi.key_bits // 32, stop * kivi.key_bits // 32)
            self.key_words[:, b, :, :, words] = pack(codes, kivi.key_bits, check=False)
            for kept, step in zip(self.key_steps, steps, strict=True):
                kept[:, b, :, :, start // kivi.group : stop // kivi.group] = step
        waiting = recent[..., stop - start :]
        self.key_rest[:, b, :, :, : waiting.shape[-1]] = waiting

    def _keep_values(self, b: int, new: Array) -> None:
        """new[L, G, n, D] follow the last R; those that are then older become codes."""
        xp = namespace(new)
        kivi = self.kivi
        s = self.lengths[b]
        n = int(new.shape[2])
        new = xp.astype(new, self.value_rest.dtype)
        start = kivi.quantised_values(s)
        stop = kivi.quantised_values(s + n)
        if stop > start:
            waited = [self.value_rest[:, b, :, rows] for rows in self._rows(start, min(s, stop))]
            old = xp.concat([*waited, new[:, :, : max(0, stop - s)]], axis=2)
            codes, *steps = encode(old, kivi.value_bits, kivi.group)
            self.value_words[:, b, :, start:stop] = pack(codes, kivi.value_bits, check=False)
            for kept, step in zip(self.value_steps, steps, strict=True):
                kept[:, b, :, start:stop] = step
        at = max(0, n - kivi.residual)  # a longer step's earlier tokens never wait
        for rows in self._rows(s + at, s + n):
            self.value_rest[:, b, :, rows] = new[:, :, at : at + rows.stop - rows.start]
            at += rows.stop - rows.start

    def _rows(self, start: int, stop: int) -> list[slice]:
        """Where values [start, stop) wait, at most R of them: position p in row p mod R, so
        in one piece or two.
        """
        size = self.kivi.residual
        first = start % size
        count = stop - start
        pieces = slice(first, min(first + count, size)), slice(0, max(0, first + count - size))
        return [rows for rows in pieces if rows.stop > rows.start]


class _View:
    """Each sequence over its own past, decoded, and what the step brings, as it came."""

    def __init__(self, cache: KiviCache, counts: Sequence[int]):
        self.cache = cache
        self.counts = list(counts)
        self.brought: Array = None  # keys and values, [2, L, T, G, D]
        self.done: set[int] = set()  # layers

    def __call__(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        xp = namespace(q)
        cache = self.cache
        at = 0
        if q.shape[0] != sum(self.counts):
            raise ValueError(
                f"the view is for {sum(self.counts)} tokens, the step has {q.shape[0]}"
            )
        if self.brought is None:
            self.brought = xp.empty((2, cache.key_rest.shape[0], *k.shape), dtype=k.dtype)
        self.brought[0, layer] = k
        self.brought[1, layer] = v
        out = xp.empty_like(q)
        for b, n in enumerate(self.counts):
            if n == 0:
                continue
            rows = slice(at, at + n)
            keys, values = cache.read(layer, b, q.dtype)
            seen = xp.concat([keys, k[rows].transpose(1, 2, 0)], axis=-1)
            read = xp.concat([values, v[rows].transpose(1, 0, 2)], axis=1)
            out[rows] = flash_attention(
                q[rows],
                seen.transpose(2, 0, 1),
                read.transpose(1, 0, 2),
                start=cache.lengths[b],
                window=cache.window,
            )[0]
            at += n
        self.done.add(layer)
        return out
