"""The KIVI cache: keys and values quantised as ``kv.kivi`` defines it, packed; it replaces a
contiguous cache.

Source: Liu et al. 2024 (arXiv:2402.02750), algorithm 1; words as in their code, 32/b codes
each where b divides 32.

| array          | contents                                     | shape                      |
|----------------|----------------------------------------------|----------------------------|
| key_words      | codes of keys, for each channel a stream of  | [L, B, G, D, ⌊C/R⌋ R b/32] |
|                | tokens                                       |                            |
| key_scales     | s and min of g tokens of a channel           | [2, L, B, G, D, ⌊C/R⌋ R/g] |
| key_residual   | keys of the residual window, position p in   | [L, B, G, D, min(R, C)]    |
|                | column p mod R                               |                            |
| value_words    | codes of values, for each token a stream of  | [L, B, G, C − R, ⌈D b/32⌉] |
|                | channels                                     |                            |
| value_scales   | s and min of g channels of a token           | [2, L, B, G, C − R, D/g]   |
| value_residual | values of the residual window, position p in | [L, B, G, min(R, C), D]    |
|                | row p mod R                                  |                            |

C is the capacity. Ownership: positions [0, s) are committed. The tokens of a step are kept
in full precision until ``advance`` says how many of them stay, so a rejected draft leaves
no trace. A long prompt in one step is therefore held in full until then; cut into several
steps it would not be, and its later tokens would read quantised keys and values.

A step dequantises what it reads: on a CPU that is slower than reading full precision, and
more so the longer the sequence. It saves memory, not time.

Left out: blocks (``kv.paged``), dropping committed tokens (their codes would then not be a
function of the length).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from refllm.backend import Array, DType, namespace
from refllm.errors import InputError
from refllm.formats.packing import pack, unpack, words_per_row
from refllm.kv.interface import NO_TREES, TokenTree
from refllm.kv.kivi import Kivi, dequantize, quantize
from refllm.model.attention import Attend, flash_attention
from refllm.model.config import ModelConfig


class KiviCache:
    """Keys and values of up to ``max_sequences`` sequences of up to ``capacity`` tokens,
    most of them quantised.
    """

    # a prompt attends to its own unquantised keys, whatever else is in the batch: one pass
    chunked_prefill: ClassVar[bool | None] = False

    def __init__(
        self,
        config: ModelConfig,
        max_sequences: int,
        capacity: int,
        *,
        like: Array,
        kivi: Kivi | None = None,
        dtype: DType | None = None,
    ):
        """``like`` is any array of the library to live on; ``dtype`` (its own) is that of
        scales and of the residual window.

        ValueError if groups do not divide a head, or the capacity is below one token.
        """
        kivi = Kivi() if kivi is None else kivi
        self.kivi = kivi
        kivi.check(config.head_dim)
        if max_sequences < 1 or capacity < 1:
            raise InputError(
                "KiviCache: needs at least one sequence of one token, "
                f"got {max_sequences} × {capacity}"
            )
        xp = namespace(like)
        dtype = dtype or like.dtype
        heads = (config.num_hidden_layers, max_sequences, config.num_key_value_heads)
        dim = config.head_dim
        k = kivi.quantized_keys(capacity)
        v = kivi.quantized_values(capacity)
        g = kivi.group
        window = min(kivi.residual, capacity)
        key_words = (*heads, dim, k * kivi.key_bits // 32)
        value_words = (*heads, v, words_per_row(dim, kivi.value_bits))
        self.key_words: Array = xp.zeros(key_words, dtype=xp.uint32)
        self.key_scales: Array = xp.zeros((2, *heads, dim, k // g), dtype=dtype)
        self.key_residual: Array = xp.zeros((*heads, dim, window), dtype=dtype)
        self.value_words: Array = xp.zeros(value_words, dtype=xp.uint32)
        self.value_scales: Array = xp.zeros((2, *heads, v, dim // g), dtype=dtype)
        self.value_residual: Array = xp.zeros((*heads, window, dim), dtype=dtype)
        self.window = config.sliding_window
        self.capacity = capacity
        self.lengths = [0] * max_sequences  # committed tokens per sequence
        self._view: _View | None = None

    @property
    def nbytes(self) -> int:
        """Bytes allocated, used or not; ``Kivi.nbytes`` counts what a sequence of some
        length uses.
        """
        arrays = (
            self.key_words,
            self.key_scales,
            self.key_residual,
            self.value_words,
            self.value_scales,
            self.value_residual,
        )
        return int(sum(a.nbytes for a in arrays))

    def positions(self, counts: Sequence[int]) -> list[int]:
        """Positions of the next ``counts[b]`` tokens of every sequence, in the order of the
        ragged batch.
        """
        return [s + i for s, n in zip(self.lengths, counts, strict=False) for i in range(n)]

    def view(self, counts: Sequence[int]) -> Attend:
        """An ``attend`` for a step in which sequence b contributes ``counts[b]`` new tokens
        (0 is allowed).

        ValueError if a sequence would outgrow the capacity.
        """
        if len(counts) > len(self.lengths):
            raise InputError(
                f"the cache holds {len(self.lengths)} sequences, the batch has {len(counts)}"
            )
        for b, n in enumerate(counts):
            if n < 0 or self.lengths[b] + n > self.capacity:
                raise InputError(
                    f"sequence {b}: {self.lengths[b]} cached + {n} new tokens exceed "
                    f"{self.capacity}"
                )
        self._view = _View(self, counts)
        return self._view

    def advance(self, counts: Sequence[int]) -> None:
        """Commit the first ``counts[b]`` tokens of the last view, and quantise the tokens
        that leave the residual window.

        ValueError if the view has fewer, or has not gone through all layers.
        """
        view = self._view
        layers = self.key_residual.shape[0]
        if view is None or view.new is None or len(view.done) != layers:
            raise InputError(
                f"advance commits the tokens of a view of {layers} layers: run the step first"
            )
        if len(counts) > len(view.counts) or any(
            not 0 <= n <= m for n, m in zip(counts, view.counts, strict=False)
        ):
            raise InputError(f"the step has {view.counts} tokens, cannot commit {list(counts)}")
        k, v = view.new  # [L, T, G, D] each; all layers at once, with few large calls
        at = 0
        for b, n in enumerate(counts):
            if n:
                self._append_keys(b, k[:, at : at + n].transpose(0, 2, 3, 1))
                self._append_values(b, v[:, at : at + n].transpose(0, 2, 1, 3))
                self.lengths[b] += n
            at += view.counts[b]
        self._view = None

    def finish_prompt(self) -> None:
        """Nothing happens between prompt and decode."""

    def view_tree(self, sequence: int, tree: TokenTree) -> Attend:
        """ValueError: of a step, only a first part can be committed."""
        raise InputError(NO_TREES)

    def advance_path(self, sequence: int, path: Sequence[int]) -> None:
        """ValueError: of a step, only a first part can be committed."""
        raise InputError(NO_TREES)

    def read(self, layer: int, b: int, dtype: DType | None = None) -> tuple[Array, Array]:
        """What sequence b's next query reads of the cache: K̂[G, D, s] and V̂[G, s, D],
        dequantised in ``dtype``.
        """
        xp = namespace(self.key_residual)
        kivi = self.kivi
        s = self.lengths[b]
        k = kivi.quantized_keys(s)
        v = kivi.quantized_values(s)
        dim = self.key_residual.shape[-2]
        words = self.key_words[layer, b, :, :, : k * kivi.key_bits // 32]  # [G, D, words]
        scale, low = self.key_scales[:, layer, b, :, :, : k // kivi.group]
        keys = dequantize(unpack(words, kivi.key_bits, k), scale, low, dtype)  # [G, D, k]
        words = self.value_words[layer, b, :, :v]  # [G, v, words]
        scale, low = self.value_scales[:, layer, b, :, :v]
        values = dequantize(unpack(words, kivi.value_bits, dim), scale, low, dtype)  # [G, v, D]
        residual_keys = self.key_residual[layer, b, :, :, : s - k]
        residual_values = [self.value_residual[layer, b, :, rows] for rows in self._rows(v, s)]
        return (
            xp.concat([keys, residual_keys], axis=-1),
            xp.concat([values, *residual_values], axis=1),
        )

    def _append_keys(self, b: int, new: Array) -> None:
        """Append new[L, G, D, n] to the residual window, and quantise whole multiples of R
        tokens.
        """
        xp = namespace(new)
        kivi = self.kivi
        s = self.lengths[b]
        start = kivi.quantized_keys(s)
        stop = kivi.quantized_keys(s + int(new.shape[-1]))
        old = self.key_residual[:, b, :, :, : s - start]
        recent = xp.concat([old, xp.astype(new, old.dtype)], axis=-1)  # positions [start, s + n)
        if stop > start:  # the window has been filled, once or more often
            codes, *grid = quantize(recent[..., : stop - start], kivi.key_bits, kivi.group)
            words = slice(start * kivi.key_bits // 32, stop * kivi.key_bits // 32)
            self.key_words[:, b, :, :, words] = pack(codes, kivi.key_bits, check=False)
            for stored, value in zip(self.key_scales, grid, strict=True):  # s, then min
                stored[:, b, :, :, start // kivi.group : stop // kivi.group] = value
        residual = recent[..., stop - start :]
        self.key_residual[:, b, :, :, : residual.shape[-1]] = residual

    def _append_values(self, b: int, new: Array) -> None:
        """Append new[L, G, n, D] to the residual window, and quantise all but the last R tokens."""
        xp = namespace(new)
        kivi = self.kivi
        s = self.lengths[b]
        n = int(new.shape[2])
        new = xp.astype(new, self.value_residual.dtype)
        start = kivi.quantized_values(s)
        stop = kivi.quantized_values(s + n)
        if stop > start:
            leaving = [
                self.value_residual[:, b, :, rows] for rows in self._rows(start, min(s, stop))
            ]
            old = xp.concat([*leaving, new[:, :, : max(0, stop - s)]], axis=2)  # [start, stop)
            codes, *grid = quantize(old, kivi.value_bits, kivi.group)
            self.value_words[:, b, :, start:stop] = pack(codes, kivi.value_bits, check=False)
            for stored, value in zip(self.value_scales, grid, strict=True):  # s, then min
                stored[:, b, :, start:stop] = value
        at = max(0, n - kivi.residual)  # a longer step's earlier tokens skip the window
        for rows in self._rows(s + at, s + n):
            self.value_residual[:, b, :, rows] = new[:, :, at : at + rows.stop - rows.start]
            at += rows.stop - rows.start

    def _rows(self, start: int, stop: int) -> list[slice]:
        """Rows of the residual window that hold values [start, stop), at most R of them:
        position p in row p mod R, so one slice or two.
        """
        size = self.kivi.residual
        first = start % size
        count = stop - start
        slices = slice(first, min(first + count, size)), slice(0, max(0, first + count - size))
        return [rows for rows in slices if rows.stop > rows.start]


class _View:
    """Each sequence attends to its own cache, dequantised, and to the tokens of the step in
    full precision.
    """

    def __init__(self, cache: KiviCache, counts: Sequence[int]):
        self.cache = cache
        self.counts = list(counts)
        self.new: Array | None = None  # keys and values of the step, [2, L, T, G, D]
        self.done: set[int] = set()  # layers

    def __call__(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        xp = namespace(q)
        cache = self.cache
        at = 0
        if q.shape[0] != sum(self.counts):
            raise InputError(
                f"the view is for {sum(self.counts)} tokens, the step has {q.shape[0]}"
            )
        if self.new is None:
            layers = cache.key_residual.shape[0]
            self.new = xp.empty((2, layers, *k.shape), dtype=k.dtype)
        self.new[0, layer] = k
        self.new[1, layer] = v
        out = xp.empty_like(q)
        for b, n in enumerate(self.counts):
            if n == 0:
                continue
            rows = slice(at, at + n)
            keys, values = cache.read(layer, b, q.dtype)
            keys = xp.concat([keys, k[rows].transpose(1, 2, 0)], axis=-1)  # [G, D, s+n]
            values = xp.concat([values, v[rows].transpose(1, 0, 2)], axis=1)  # [G, s+n, D]
            out[rows] = flash_attention(
                q[rows],
                keys.transpose(2, 0, 1),
                values.transpose(1, 0, 2),
                start=cache.lengths[b],
                window=cache.window,
            )[0]
            at += n
        self.done.add(layer)
        return out
