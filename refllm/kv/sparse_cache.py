"""A cache that drops tokens: each key head keeps those that ``kv.sparse`` chooses, at the
positions they came from.

| symbol | name                                                      | shape         |
|--------|-----------------------------------------------------------|---------------|
| K, V   | what a key head keeps, in the order of positions          | [G, S, D]     |
| place  | their positions, which differ from head to head           | [G, S]        |
| merit  | their scores so far, in float32 at least                  | [G, S]        |
| a      | attention of the step's queries, mean of a key head's     | [G, n, S + n] |

A prompt is read in full, in as many steps as it takes; ``settle`` says that it has been
read, and the policy drops down to its budget. From then on, a policy that drops at every
step does so in ``advance``. What a step brings counts only as far as ``advance`` keeps it,
so a rejected draft has neither read nor been read.

Memory is what is kept: arrays are cut at every drop. Attention is the naive form, since its
weights are the scores; a fused kernel never has them, which is why H2O costs speed where
SnapKV does not.

Left out: blocks and shared prefixes (what one sequence drops another may need), dropping
within a prompt, a second prompt (it stays whole under a policy that drops once). What is
drawn by lot depends on the batch and on its steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refllm.backend import Array, asarray_like, namespace
from refllm.kv.sparse import Sparse, choose, pooled
from refllm.model.attention import Attend, masked_score
from refllm.model.config import ModelConfig


@dataclass
class Kept:
    """What one sequence keeps in one layer; ``asked`` are the last queries [H, w, D], if
    they will vote.
    """

    keys: Array
    values: Array
    place: Array
    merit: Array
    asked: Array | None


class SparseCache:
    """Keys and values of ``max_sequences`` sequences: once settled, ``policy.budget``
    tokens a head at most.

    Under a policy that drops once, also those that came later.
    """

    def __init__(
        self,
        config: ModelConfig,
        max_sequences: int,
        *,
        like: Array,
        policy: Sparse,
        rng: np.random.Generator | None = None,
    ):
        """``like`` is any array of the library and type to live in; ``rng`` draws the
        scores of ``at_random``.
        """
        if max_sequences < 1:
            raise ValueError(f"SparseCache: needs room for a sequence, got {max_sequences}")
        if policy.score == "random" and rng is None:
            raise ValueError("SparseCache: a policy that drops at random needs rng=")
        self.policy = policy
        self.rng = rng
        self.budgets = policy.budgets(config.num_hidden_layers)
        self.window = config.sliding_window
        xp = namespace(like)
        shape = (config.num_key_value_heads, 0, config.head_dim)
        queries = (config.num_attention_heads, 0, config.head_dim)

        def empty() -> Kept:
            none = xp.zeros(shape, dtype=like.dtype)
            at = xp.zeros(shape[:2], dtype=xp.int64)
            if policy.score == "votes":
                asked = xp.zeros(queries, dtype=like.dtype)
            else:
                asked = None
            # a float16 sum of shares stands still at 2,048
            merit = xp.zeros(shape[:2], dtype="float32" if like.dtype == "float16" else like.dtype)
            return Kept(none, none, at, merit, asked)

        self.layers = [
            [empty() for _ in range(max_sequences)] for _ in range(config.num_hidden_layers)
        ]
        self.lengths = [0] * max_sequences  # tokens read, kept or not
        self.settled = [False] * max_sequences
        self.dropped = 0  # tokens of a layer, mean of its heads
        self._view: _View | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that are kept, and of their positions and scores."""
        held = [
            a
            for layer in self.layers
            for kept in layer
            for a in (kept.keys, kept.values, kept.place, kept.merit)
        ]
        return int(sum(a.nbytes for a in held))

    def positions(self, counts: Sequence[int]) -> list[int]:
        """Positions of the next ``counts[b]`` tokens of every sequence, in the order of the
        ragged batch.
        """
        return [s + i for s, n in zip(self.lengths, counts, strict=False) for i in range(n)]

    def view(self, counts: Sequence[int]) -> Attend:
        """An ``attend`` for a step in which sequence b brings ``counts[b]`` new tokens (0
        is allowed).
        """
        if len(counts) > len(self.lengths):
            raise ValueError(
                f"the cache holds {len(self.lengths)} sequences, the batch has {len(counts)}"
            )
        if min(counts) < 0:
            raise ValueError(f"a sequence brings 0 tokens or more, got {list(counts)}")
        self._view = _View(self, counts)
        return self._view

    def advance(self, counts: Sequence[int]) -> None:
        """Commit the first ``counts[b]`` tokens that the last view brought; drop what the
        policy drops at every step.

        ValueError if it brought fewer, or has not gone through all layers.
        """
        view = self._view
        if view is None or any(
            len(view.brought.get(i, ())) < len(view.counts) for i in range(len(self.layers))
        ):
            raise ValueError(
                f"advance commits what a view brought to {len(self.layers)} layers: run the step first"
            )
        if len(counts) > len(view.counts) or any(
            not 0 <= n <= m for n, m in zip(counts, view.counts, strict=False)
        ):
            raise ValueError(
                f"the step brought {view.counts} tokens, {list(counts)} cannot be committed"
            )
        self._view = None
        for b, n in enumerate(counts):
            if n:
                for layer, sequences in enumerate(self.layers):
                    self._append(sequences[b], n, *view.brought[layer][b])
                    if self.settled[b] and self.policy.always:
                        self._drop(layer, b, sequences[b].merit)
                self.lengths[b] += n

    def settle(self) -> None:
        """The prompts have been read: each sequence that has not settled drops down to its
        budget.
        """
        for b, done in enumerate(self.settled):
            if not done and self.lengths[b]:
                for layer, sequences in enumerate(self.layers):
                    kept = sequences[b]
                    self._drop(
                        layer,
                        b,
                        kept.merit if kept.asked is None else self._votes(kept, self.lengths[b]),
                    )
                    kept.asked = None
                self.settled[b] = True

    def _append(
        self, kept: Kept, n: int, q: Array, keys: Array, values: Array, place: Array, a: Any
    ) -> None:
        """The first n of a step's tokens join what is kept: q[H, ·, D] of the step, K, V[G,
        S + ·, D] of both.
        """
        xp = namespace(keys)
        size = kept.keys.shape[1]
        kept.keys = keys[:, : size + n]
        kept.values = values[:, : size + n]
        kept.place = place[:, : size + n]
        dtype = kept.merit.dtype
        new = xp.zeros((keys.shape[0], n), dtype=dtype)
        if self.policy.score == "random":
            assert self.rng is not None
            new = asarray_like(self.rng.random((keys.shape[0], n)), keys, dtype)
        kept.merit = xp.concat([kept.merit, new], axis=1)
        if self.policy.score == "mass":
            kept.merit += xp.sum(a[:, :n, : size + n], axis=1, dtype=dtype)
        elif self.policy.score == "last":
            # a copy: a view would hold all of a
            kept.merit = xp.astype(a[:, n - 1, : size + n], dtype)
        if kept.asked is not None:
            kept.asked = xp.copy(
                xp.concat([kept.asked, q[:, :n]], axis=1)[:, -self.policy.window :]
            )

    def _drop(self, layer: int, b: int, score: Array) -> None:
        kept = self.layers[layer][b]
        policy = self.policy
        budget = self.budgets[layer]
        size = int(kept.keys.shape[1])
        if size <= budget:
            return
        xp = namespace(score)
        if policy.alike:
            score = xp.broadcast_to(xp.mean(score, axis=0), score.shape)
        # the next query, at the newest's position + 1, sees the last ``window``
        if self.window is not None:
            passed = kept.place <= kept.place[:, -1:] + 1 - self.window
            score = xp.where(passed, xp.asarray(-math.inf, dtype=score.dtype), score)
        stay = choose(score, budget, policy.first, policy.newest)
        kept.place = xp.take_along_axis(kept.place, stay, axis=1)
        kept.merit = xp.take_along_axis(kept.merit, stay, axis=1)
        kept.keys = xp.take_along_axis(kept.keys, stay[:, :, None], axis=1)
        kept.values = xp.take_along_axis(kept.values, stay[:, :, None], axis=1)
        self.dropped += size - budget

    def _votes(self, kept: Kept, length: int) -> Array:
        """SnapKV's C: what the last w queries read of the tokens before them, summed and
        pooled; [G, S].
        """
        xp = namespace(kept.keys)
        policy = self.policy
        assert kept.asked is not None
        w = int(kept.asked.shape[1])
        a = _weights(kept.asked, kept.keys, kept.place, length - w, self.window)
        # the mean over heads, the sum over queries
        before = xp.sum(xp.mean(a, axis=1), axis=1)[:, : length - w]
        votes = pooled(before, policy.kernel, policy.pool)
        return xp.concat([votes, xp.zeros((votes.shape[0], w), dtype=votes.dtype)], axis=1)


class _View:
    """Each sequence over what its key heads keep, and what the step brings."""

    def __init__(self, cache: SparseCache, counts: Sequence[int]):
        self.cache = cache
        self.counts = list(counts)
        # by layer, of each sequence: q, K, V, place, a, or None
        self.brought: dict[int, list[Any]] = {}

    def __call__(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        xp = namespace(q)
        cache = self.cache
        at = 0
        if q.shape[0] != sum(self.counts):
            raise ValueError(
                f"the view is for {sum(self.counts)} tokens, the step has {q.shape[0]}"
            )
        out = xp.empty_like(q)
        brought = self.brought.setdefault(layer, [])
        brought.clear()
        for b, n in enumerate(self.counts):
            if n == 0:
                brought.append(None)
                continue
            rows = slice(at, at + n)
            kept = cache.layers[layer][b]
            start = cache.lengths[b]
            # theirs to overwrite
            asks, new_k, new_v = (xp.copy(x[rows].transpose(1, 0, 2)) for x in (q, k, v))
            keys = xp.concat([kept.keys, new_k], axis=1)
            values = xp.concat([kept.values, new_v], axis=1)
            new = xp.broadcast_to(xp.arange(start, start + n), (keys.shape[0], n))
            place = xp.concat([kept.place, new], axis=1)
            a = _weights(asks, keys, place, start, cache.window)  # [G, R, n, S+n]
            o = xp.matmul(a, values[:, None])  # [G, R, n, D]
            out[rows] = o.reshape(-1, n, o.shape[-1]).transpose(1, 0, 2)
            scored = cache.policy.score in ("mass", "last")
            brought.append((asks, keys, values, place, xp.mean(a, axis=1) if scored else None))
            at += n
        return out


def _weights(q: Array, keys: Array, place: Array, start: int, window: int | None) -> Array:
    """softmax(q K / √D) of q[H, n, D] at positions ``start`` + i over keys[G, S, D] at
    ``place``: [G, R, n, S].
    """
    xp = namespace(q, keys)
    groups = keys.shape[0]
    dim = keys.shape[2]
    rows = q.reshape(groups, -1, *q.shape[1:]) * (1.0 / math.sqrt(dim))
    scores = xp.matmul(rows, keys.transpose(0, 2, 1)[:, None])
    t = xp.arange(start, start + q.shape[1])[:, None]
    hidden = place[:, None, None, :] > t
    if window is not None:
        hidden = hidden | (place[:, None, None, :] <= t - window)
    scores = xp.where(hidden, xp.asarray(masked_score(xp, q.dtype), dtype=q.dtype), scores)
    p = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
    p /= xp.sum(p, axis=-1, keepdims=True)
    return p
