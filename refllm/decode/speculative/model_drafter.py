"""A small model that drafts, with a cache of its own.

Source: Leviathan et al. 2023. The draft model samples as the target does, or with
``sampling`` of its own; q is the distribution that it really sampled from, after every
logits processor, and None (one-hot) at temperature 0.

``confidence`` ends a draft where the model's largest probability is below it: a draft that
will be rejected costs as much as one that will not. The decision looks at q before the
token is drawn from it; looking at the token that was drawn, and taking it back, would
change what was sampled.

The tokens of each call are compared with those whose keys and values are cached, so nothing
has to be reported about rejection, preemption or a new prompt.

Left out: EAGLE's heads, drafters that learn online.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from refllm.backend import Array, asarray_like, namespace
from refllm.decode.fast import single_token
from refllm.decode.fast.captured_step import make_decode_step
from refllm.decode.sampling import distribution, draw
from refllm.decode.sampling_params import SamplingParams
from refllm.decode.speculative.constrained import masked_logits
from refllm.decode.speculative.interface import (
    DraftConstraint,
    DraftRequest,
    ModelLike,
    Proposal,
    checked_gamma,
    common_prefix_length,
)
from refllm.errors import InputError
from refllm.kv.contiguous import ContiguousCache
from refllm.model.llama import forward, logits


class ModelDrafter:
    """A small model with its own cache; it samples as the target does, or with ``sampling``.

    ``model`` is any record with ``config``, ``weights`` and ``tokenizer``, of the target's
    vocabulary. The last draft of a step is not computed: its keys and values are missing
    when all were accepted, and are computed with the next step's tokens, as is everything
    that the cache does not have. With a constraint the drafts, and q, are those of the model's
    logits after the grammar's mask.
    """

    constrains = True

    def __init__(
        self,
        model: ModelLike,
        gamma: int = 4,
        *,
        confidence: float = 0.0,
        sampling: SamplingParams | None = None,
        sequences: int = 1,
    ):
        """``sequences`` is how many sequences have a cache; each request says which one it
        is for.
        """
        if not 0 <= confidence < 1:
            raise InputError(f"confidence is a probability within [0, 1), got {confidence}")
        self.model = model
        self.config = model.config
        self.gamma = checked_gamma(gamma)
        self.confidence = confidence
        self.sampling = sampling
        self.cache = ContiguousCache(
            model.config,
            sequences,
            model.config.max_position_embeddings,
            like=model.weights["norm"],
        )
        # the tokens whose keys and values are cached
        self._cached: list[list[int]] = [[] for _ in range(sequences)]
        self._decode_step = make_decode_step(model.weights, model.config)
        self._single_token: single_token.SingleTokenStep | None = None
        if single_token.is_supported(model.config, model.weights):
            self._single_token = single_token.SingleTokenStep(
                model.weights, model.config, self.cache
            )
        # the cost of drafting: tokens that the model computed, and in how many calls
        self.computed = 0
        self.passes = 0

    def propose(
        self,
        tokens: Sequence[int],
        count: int,
        sampling: SamplingParams,
        rng: np.random.Generator,
        sequence: int = 0,
        constraint: DraftConstraint | None = None,
    ) -> Proposal:
        """See ``Drafter.propose``; ``sequence`` says whose cache to use."""
        request = DraftRequest(tokens, count, sampling, rng, sequence, constraint)
        return self._draft([request], batched=False)[0]

    def propose_batch(self, requests: Sequence[DraftRequest]) -> list[Proposal]:
        """``propose`` for different sequences, in as many steps of the model as the longest
        proposal has drafts.
        """
        sequences = [request.sequence for request in requests]
        if len(set(sequences)) < len(requests):
            raise InputError(f"each sequence drafts once per step, got {sequences}")
        # two sequences are as fast one after the other
        return self._draft(requests, batched=self._single_token is None or len(requests) > 2)

    def observe(self, best: Sequence[int], accepted: int) -> None:
        """Nothing to learn: the next call brings all tokens."""

    def _draft(self, requests: Sequence[DraftRequest], batched: bool) -> list[Proposal]:
        """Draft token by token for all requests, in one batched step of the model each time
        or one sequence after the other.
        """
        # a sequence drafts only as far as the draft model has positions
        counts = [min(r.max_drafts, self.cache.capacity - len(r.tokens)) for r in requests]
        drafts: list[list[int]] = [[] for _ in requests]
        rows: list[list[Array]] = [[] for _ in requests]
        feeds: dict[int, list[int]] = {}  # request → tokens to compute in the next step
        for i, request in enumerate(requests):
            if counts[i] > 0 and batched:
                feeds[i] = self._last_two(request)
            elif counts[i] > 0:
                feeds[i] = self._roll_back(request.tokens, request.sequence)
        feed = self._feed_batched if batched else self._feed_one_by_one
        while feeds:
            z = feed([(requests[i].sequence, tokens) for i, tokens in feeds.items()])  # [B, V]
            fed = list(feeds)
            feeds = {}
            for b, i in enumerate(fed):
                sampling = self.sampling or requests[i].sampling
                row_z = self._constrained(z[b], requests[i], drafts[i])
                if row_z is None:
                    continue
                token, row = self._choose(row_z, sampling, requests[i].rng)
                if token is None:
                    continue
                drafts[i].append(token)
                if row is not None:
                    rows[i].append(row)
                if len(drafts[i]) < counts[i]:
                    feeds[i] = [token]
        return [
            Proposal(d, namespace(q[0]).stack(q) if q else None)
            for d, q in zip(drafts, rows, strict=True)
        ]

    def _constrained(self, z: Array, request: DraftRequest, drafts: Sequence[int]) -> Array | None:
        """z[V] after the drafts and the grammar's mask; None where no token may follow them."""
        if request.constraint is None:
            return z
        mask = request.constraint.mask([*request.tokens, *drafts])
        return None if mask is None else masked_logits(z, mask)

    def _last_two(self, request: DraftRequest) -> list[int]:
        """The last two tokens of a sequence, after everything before them was computed.

        Where one of them is cached already it gets the same keys and values again, and all
        sequences of a batch contribute equally many tokens.
        """
        missing = self._roll_back(request.tokens, request.sequence)
        if len(missing) > 2:
            self._feed(missing[:-2], request.sequence)
        elif len(missing) == 1 < len(request.tokens):
            self._roll_back(request.tokens[:-1], request.sequence)
        return list(request.tokens[-2:])

    def _feed_one_by_one(self, feeds: Sequence[tuple[int, list[int]]]) -> Array | list[Array]:
        """Compute tokens of each sequence, one after the other → logits[V] of each after
        its last.
        """
        if len(feeds) == 1:
            return [self._feed(feeds[0][1], feeds[0][0])]
        # copies: the logits of a single-token step are valid until the next
        return [self._feed(tokens, s) * 1.0 for s, tokens in feeds]

    def _feed_batched(self, feeds: Sequence[tuple[int, list[int]]]) -> Array | list[Array]:
        """Compute equally many tokens of each sequence → logits[B, V] after the last ones.

        The sequences between the first and the last compute token 0 as padding: behind the
        length of a sequence its cache holds nothing that is read, and a contiguous cache
        attends at once to a batch without gaps.
        """
        fed = dict(feeds)
        n = max(len(tokens) for tokens in fed.values())
        span = range(min(fed), max(fed) + 1)
        ragged = any(len(tokens) != n for tokens in fed.values())  # a sequence of one token
        full = any(self.cache.lengths[s] + n > self.cache.capacity for s in span)
        mostly_padding = len(span) > 2 * len(fed)
        if ragged or full or mostly_padding:
            return self._feed_one_by_one(feeds)
        counts = [n if s in span else 0 for s in range(len(self._cached))]
        ids = [t for s in span for t in fed.get(s, [0] * n)]
        positions = self.cache.positions(counts)
        z = self._decode_step(ids, positions, self.cache.view(counts))  # [len(span)·n, V]
        last = [(s - span[0]) * n + n - 1 for s, _ in feeds]
        for s, tokens in feeds:
            self.cache.lengths[s] += n
            self._cached[s] += tokens
        self.computed += n * len(fed)
        self.passes += 1
        if last == list(range(z.shape[0])):
            return z
        return z[asarray_like(last, z, "int64")]  # [B, V]

    def _roll_back(self, tokens: Sequence[int], sequence: int) -> list[int]:
        """Cut the cache to the prefix that it shares with ``tokens`` and return the rest,
        at least the last token.
        """
        cached = self._cached[sequence]
        # at least one token is computed, for its logits
        same = min(common_prefix_length(cached, tokens), len(tokens) - 1)
        self.cache.truncate(sequence, same)
        del cached[same:]
        return list(tokens[same:])

    def _feed(self, tokens: list[int], sequence: int) -> Array:
        """Compute tokens after those of the cache → logits[V] after the last."""
        z = self._compute(tokens, sequence)
        self._cached[sequence] += tokens  # last: after a failure they are computed again
        self.computed += len(tokens)
        self.passes += 1
        return z

    def _compute(self, tokens: list[int], sequence: int) -> Array:
        """The forward pass of ``_feed``, in the fastest form for so many tokens."""
        # more than four tokens are faster in one batch than one by one
        if self._single_token is not None and len(tokens) <= 4:
            for token in tokens[:-1]:
                self._single_token.append(token, sequence)
            return self._single_token.step(tokens[-1], sequence)
        weights = self.model.weights
        counts = [0] * len(self._cached)
        counts[sequence] = len(tokens)
        positions = self.cache.positions(counts)
        view = self.cache.view(counts)
        if len(tokens) <= 2:  # nearly always
            z = self._decode_step(tokens, positions, view)
        else:
            moved = asarray_like([tokens, positions], self.cache.keys, "int64")
            last = asarray_like([len(tokens) - 1], self.cache.keys, "int64")
            z = logits(weights, forward(weights, self.config, moved[0], moved[1], view, last))
        self.cache.advance(counts)
        return z[-1]

    def _choose(
        self, z: Array, sampling: SamplingParams, rng: np.random.Generator
    ) -> tuple[int | None, Array | None]:
        """The next draft of z[V] and the row that it was sampled from; (None, None) where
        the model is not confident enough.
        """
        xp = namespace(z)
        if sampling.temperature == 0:
            token = int(xp.argmax(z))
            # 1 / Σ exp(z − max z) is the largest probability
            if self.confidence and float(xp.sum(xp.exp(z - z[token]))) * self.confidence > 1:
                return None, None
            return token, None
        row = distribution(z, sampling)
        if self.confidence and float(xp.max(row)) < self.confidence:
            return None, None
        return draw(row, rng.random()), row
