"""A cache that evicts tokens: each key head keeps those that ``kv.sparse`` selects, at their
original positions.

| symbol    | name                                                      | shape         |
|-----------|-----------------------------------------------------------|---------------|
| K, V      | what a key head keeps, in the order of positions          | [G, S, D]     |
| positions | of the kept tokens, which differ from head to head        | [G, S]        |
| scores    | their scores so far, in float32 at least                  | [G, S]        |
| a         | attention of the step's queries, mean of the heads that   | [G, n, S + n] |
|           | share a key head                                          |               |

A prompt is read in full, in any number of steps; ``finish_prompt`` says that it has been
read, and the policy evicts tokens down to its budget. From then on, a policy that evicts at
every step does so in ``advance``. Tokens of a step count only as far as ``advance`` keeps
them, so a rejected draft has no effect on scores, neither as query nor as key.

The memory is that of the kept tokens: arrays are cut at every eviction. Attention is the
naive form, since its weights are the scores; a fused kernel never stores them, which is why
H2O costs speed where SnapKV does not.

Left out: blocks and shared prefixes (another sequence may need what one evicts), eviction
within a prompt, a second prompt (it stays whole under a policy that evicts once). Random
scores depend on the batch and on its steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from refllm.backend import Array, asarray_like, namespace
from refllm.errors import InputError
from refllm.kv.interface import NO_TREES, TokenTree
from refllm.kv.sparse import SparsePolicy, pool_votes, select_tokens
from refllm.model.attention import Attend, masked_score
from refllm.model.config import ModelConfig


@dataclass
class KeptTokens:
    """What one sequence keeps in one layer; ``last_queries`` are the last queries
    [H, w, D], if they will vote.
    """

    keys: Array
    values: Array
    positions: Array
    scores: Array
    last_queries: Array | None

    @property
    def nbytes(self) -> int:
        """Bytes of everything but the queries."""
        arrays = (self.keys, self.values, self.positions, self.scores)
        return int(sum(a.nbytes for a in arrays))


class NewTokens(NamedTuple):
    """The tokens of one sequence in one step and layer: their queries, and the arrays of
    what is kept with the new tokens appended.
    """

    q: Array  # [H, n, D]
    keys: Array  # [G, S + n, D]
    values: Array  # [G, S + n, D]
    positions: Array  # [G, S + n]
    attention: Array | None  # a[G, n, S + n], if the policy scores by it


class SparseCache:
    """Keys and values of ``max_sequences`` sequences: after the prompt, at most
    ``policy.budget`` tokens per head.

    Under a policy that evicts once, also all tokens after the prompt.
    """

    # the scores that a policy needs are quadratic in the tokens of a step
    chunked_prefill: ClassVar[bool | None] = True

    def __init__(
        self,
        config: ModelConfig,
        max_sequences: int,
        *,
        like: Array,
        policy: SparsePolicy,
        rng: np.random.Generator | None = None,
    ):
        """``like`` is any array of the library and type to live in; ``rng`` draws the
        scores of ``at_random``.
        """
        if max_sequences < 1:
            raise InputError(f"SparseCache: needs at least one sequence, got {max_sequences}")
        if policy.score == "random" and rng is None:
            raise InputError("SparseCache: a policy that evicts at random needs rng=")
        self.policy = policy
        self.rng = rng
        self.window = config.sliding_window
        self.layers = [
            [_no_tokens(config, like, policy) for _ in range(max_sequences)]
            for _ in range(config.num_hidden_layers)
        ]
        self.lengths = [0] * max_sequences  # tokens read, kept or not
        self.prompt_done = [False] * max_sequences
        self.dropped = 0  # evicted tokens of a layer, mean of its heads
        self._view: _View | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the kept keys and values, and of their positions and scores."""
        return sum(kept.nbytes for layer in self.layers for kept in layer)

    def positions(self, counts: Sequence[int]) -> list[int]:
        """Positions of the next ``counts[b]`` tokens of every sequence, in the order of the
        ragged batch.
        """
        return [s + i for s, n in zip(self.lengths, counts, strict=False) for i in range(n)]

    def view(self, counts: Sequence[int]) -> Attend:
        """An ``attend`` for a step in which sequence b contributes ``counts[b]`` new tokens
        (0 is allowed).
        """
        if len(counts) > len(self.lengths):
            raise InputError(
                f"the cache holds {len(self.lengths)} sequences, the batch has {len(counts)}"
            )
        if min(counts) < 0:
            raise InputError(f"a sequence contributes 0 tokens or more, got {list(counts)}")
        self._view = _View(self, counts)
        return self._view

    def advance(self, counts: Sequence[int]) -> None:
        """Commit the first ``counts[b]`` tokens of the last view; a policy that evicts at
        every step then does so.

        ValueError if the view has fewer, or has not gone through all layers.
        """
        view = self._view
        if view is None or any(
            len(view.new.get(i, ())) < len(view.counts) for i in range(len(self.layers))
        ):
            raise InputError(
                f"advance commits the tokens of a view of {len(self.layers)} layers: "
                "run the step first"
            )
        if len(counts) > len(view.counts) or any(
            not 0 <= n <= m for n, m in zip(counts, view.counts, strict=False)
        ):
            raise InputError(f"the step has {view.counts} tokens, cannot commit {list(counts)}")
        self._view = None
        for b, n in enumerate(counts):
            if n == 0:
                continue
            budgets = self.policy.budgets(len(self.layers), self.lengths[b] + n)
            for layer, sequences in enumerate(self.layers):
                new = view.new[layer][b]
                assert new is not None  # the view has n tokens or more of this sequence
                self._append(sequences[b], n, new)
                if self.prompt_done[b] and self.policy.every_step:
                    self._evict(layer, b, sequences[b].scores, budgets[layer])
            self.lengths[b] += n

    def finish_prompt(self) -> None:
        """Evict tokens of each sequence whose prompt has now been read, down to the budget."""
        for b, done in enumerate(self.prompt_done):
            if done or self.lengths[b] == 0:
                continue
            budgets = self.policy.budgets(len(self.layers), self.lengths[b])
            for layer, sequences in enumerate(self.layers):
                kept = sequences[b]
                score = kept.scores
                if kept.last_queries is not None and int(kept.keys.shape[1]) > budgets[layer]:
                    score = self._votes(kept, self.lengths[b])
                self._evict(layer, b, score, budgets[layer])
                kept.last_queries = None
            self.prompt_done[b] = True

    def view_tree(self, sequence: int, tree: TokenTree) -> Attend:
        """ValueError: of a step, only a first part can be committed."""
        raise InputError(NO_TREES)

    def advance_path(self, sequence: int, path: Sequence[int]) -> None:
        """ValueError: of a step, only a first part can be committed."""
        raise InputError(NO_TREES)

    def _append(self, kept: KeptTokens, n: int, new: NewTokens) -> None:
        """Append the first n tokens of a step to what is kept, and update the scores."""
        xp = namespace(new.keys)
        end = kept.keys.shape[1] + n
        kept.keys = new.keys[:, :end]
        kept.values = new.values[:, :end]
        kept.positions = new.positions[:, :end]
        dtype = kept.scores.dtype
        shape = (new.keys.shape[0], n)
        scores = xp.zeros(shape, dtype=dtype)
        if self.policy.score == "random":
            assert self.rng is not None
            scores = asarray_like(self.rng.random(shape), new.keys, dtype)
        kept.scores = xp.concat([kept.scores, scores], axis=1)  # [G, S + n]
        a = new.attention
        if a is not None and self.policy.score == "mass":
            kept.scores += xp.sum(a[:, :n, :end], axis=1, dtype=dtype)
        elif a is not None:  # "last"; a copy, since a view would keep all of a in memory
            kept.scores = xp.astype(a[:, n - 1, :end], dtype)
        if kept.last_queries is not None:
            queries = xp.concat([kept.last_queries, new.q[:, :n]], axis=1)
            # a copy: a view would keep the queries of the whole prompt in memory
            kept.last_queries = xp.copy(queries[:, -self.policy.window :])

    def _evict(self, layer: int, b: int, score: Array, budget: int) -> None:
        """Keep the ``budget`` tokens of one layer and sequence that the policy selects by
        score[G, S].
        """
        kept = self.layers[layer][b]
        policy = self.policy
        size = int(kept.keys.shape[1])
        if size <= budget:
            return
        xp = namespace(score)
        if policy.shared:  # one set of tokens: every head gets the mean of all
            score = xp.broadcast_to(xp.mean(score, axis=0), score.shape)
        # the next query, at the newest's position + 1, sees the last ``window`` positions
        if self.window is not None:
            passed = kept.positions <= kept.positions[:, -1:] + 1 - self.window
            score = xp.where(passed, xp.asarray(-math.inf, dtype=score.dtype), score)
        index = select_tokens(score, budget, policy.first, policy.newest)  # [G, budget]
        kept.positions = xp.take_along_axis(kept.positions, index, axis=1)
        kept.scores = xp.take_along_axis(kept.scores, index, axis=1)
        kept.keys = xp.take_along_axis(kept.keys, index[:, :, None], axis=1)
        kept.values = xp.take_along_axis(kept.values, index[:, :, None], axis=1)
        self.dropped += size - budget

    def _votes(self, kept: KeptTokens, length: int) -> Array:
        """SnapKV's C: the attention of the last w queries to the tokens before them, summed
        and pooled; [G, S].
        """
        xp = namespace(kept.keys)
        policy = self.policy
        assert kept.last_queries is not None
        w = int(kept.last_queries.shape[1])
        start = length - w
        a = _weights(kept.last_queries, kept.keys, kept.positions, start, self.window)
        # the mean over heads, the sum over queries
        before = xp.sum(xp.mean(a, axis=1), axis=1)[:, :start]  # [G, S − w]
        votes = pool_votes(before, policy.kernel, policy.pool)
        return xp.concat([votes, xp.zeros((votes.shape[0], w), dtype=votes.dtype)], axis=1)


def _no_tokens(config: ModelConfig, like: Array, policy: SparsePolicy) -> KeptTokens:
    """Empty arrays for one sequence in one layer."""
    xp = namespace(like)
    shape = (config.num_key_value_heads, 0)
    empty = xp.zeros((*shape, config.head_dim), dtype=like.dtype)
    last_queries = None
    if policy.score == "votes":
        queries = (config.num_attention_heads, 0, config.head_dim)
        last_queries = xp.zeros(queries, dtype=like.dtype)
    # A float16 sum of attention weights stops growing at 2,048.
    score_dtype = "float32" if like.dtype == "float16" else like.dtype
    scores = xp.zeros(shape, dtype=score_dtype)
    return KeptTokens(empty, empty, xp.zeros(shape, dtype=xp.int64), scores, last_queries)


class _View:
    """Each sequence attends to what its key heads keep, and to the tokens of the step."""

    def __init__(self, cache: SparseCache, counts: Sequence[int]):
        self.cache = cache
        self.counts = list(counts)
        # by layer, for each sequence its new tokens, or None
        self.new: dict[int, list[NewTokens | None]] = {}

    def __call__(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        xp = namespace(q)
        cache = self.cache
        at = 0
        if q.shape[0] != sum(self.counts):
            raise InputError(
                f"the view is for {sum(self.counts)} tokens, the step has {q.shape[0]}"
            )
        out = xp.empty_like(q)
        found = self.new.setdefault(layer, [])
        found.clear()
        for b, n in enumerate(self.counts):
            if n == 0:
                found.append(None)
                continue
            rows = slice(at, at + n)
            kept = cache.layers[layer][b]
            start = cache.lengths[b]
            # copies, since q, k and v may be overwritten after the call
            queries, new_k, new_v = (xp.copy(x[rows].transpose(1, 0, 2)) for x in (q, k, v))
            keys = xp.concat([kept.keys, new_k], axis=1)  # [G, S+n, D]
            values = xp.concat([kept.values, new_v], axis=1)
            new_positions = xp.broadcast_to(xp.arange(start, start + n), (keys.shape[0], n))
            positions = xp.concat([kept.positions, new_positions], axis=1)  # [G, S+n]
            a = _weights(queries, keys, positions, start, cache.window)  # [G, R, n, S+n]
            o = xp.matmul(a, values[:, None])  # [G, R, n, D]
            out[rows] = o.reshape(-1, n, o.shape[-1]).transpose(1, 0, 2)
            scored = cache.policy.score in ("mass", "last")
            attention = xp.mean(a, axis=1) if scored else None
            found.append(NewTokens(queries, keys, values, positions, attention))
            at += n
        return out


def _weights(q: Array, keys: Array, positions: Array, start: int, window: int | None) -> Array:
    """softmax(q K / √D) of q[H, n, D] at positions ``start`` + i over keys[G, S, D] at
    ``positions``: [G, R, n, S].
    """
    xp = namespace(q, keys)
    groups = keys.shape[0]
    dim = keys.shape[2]
    rows = q.reshape(groups, -1, *q.shape[1:]) * (1.0 / math.sqrt(dim))  # [G, R, n, D]
    scores = xp.matmul(rows, keys.transpose(0, 2, 1)[:, None])  # [G, R, n, S]
    t = xp.arange(start, start + q.shape[1])[:, None]
    j = positions[:, None, None, :]
    hidden = j > t  # [G, 1, n, S]
    if window is not None:
        hidden = hidden | (j <= t - window)
    scores = xp.where(hidden, xp.asarray(masked_score(xp, q.dtype), dtype=q.dtype), scores)
    p = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
    p /= xp.sum(p, axis=-1, keepdims=True)
    return p
