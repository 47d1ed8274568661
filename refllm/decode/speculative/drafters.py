"""Drafters: guesses of the next tokens, each with the distribution that it was really
sampled from.

Sources: small models, Leviathan et al. 2023; prompt lookup, Saxena 2023; Jacobi decoding,
Santilli et al. 2023 (the N = 2 case of lookahead decoding, Fu et al. 2024).

| drafter           | guesses                                              | q       | cost of a guess             |
|-------------------|------------------------------------------------------|---------|-----------------------------|
| ``ModelDrafter``  | what a small model samples (temperature 0: argmax)   | its own | a step of that model        |
| ``NGramDrafter``  | what followed the last tokens when they stood before | one-hot | none                        |
| ``JacobiDrafter`` | what the target itself said after the last guesses   | one-hot | none                        |
| ``Cascade``       | those of the first drafter that has any              | its     | its                         |
| ``PerfectDrafter``| what the target will say: the control, all accepted  | its own | a step of the target        |
| ``Adversary``     | the least likely tokens: the other control           | one-hot | a step of the target        |

A drafter is asked with *all* tokens of the sequence and keeps what it can use again: it
compares them with what it has seen, so nothing has to be told to it about rejection,
preemption or a new prompt. Lossless is whoever tells the truth: the returned q has every
warp of the drafter in it; a draft that was not sampled has none (``None``: one-hot).

``confidence`` ends a draft where the model's largest probability is below it: a guess that
will be rejected costs as much as one that will not. The decision looks at q before the
token is drawn from it; looking at the token that was drawn, and taking it back, would
change what was sampled.

Trees are ``decode.speculative.tree_drafter``. Left out: EAGLE's heads, the 2-D window of
lookahead decoding, drafters that learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from refllm.backend import Array, asarray_like, namespace
from refllm.decode.fast import single_token
from refllm.decode.fast.captured_step import stepper
from refllm.decode.sampling import distribution
from refllm.decode.sampling_params import SamplingParams
from refllm.decode.speculative import verification
from refllm.decode.speculative.interface import (
    NOTHING,
    Ask,
    Drafter,
    Proposal,
    TreeProposal,
    check_vocabulary,
    checked_gamma,
    common_prefix,
)
from refllm.kv.contiguous import ContiguousCache
from refllm.model.llama import forward, logits

__all__ = [
    "NOTHING", "Adversary", "Ask", "Cascade", "Drafter", "JacobiDrafter", "ModelDrafter", "NGramDrafter",
    "PerfectDrafter", "Proposal", "TreeProposal", "check_drafter", "check_vocabulary", "common_prefix",
]  # fmt: skip


class NGramDrafter:
    """Prompt lookup: finds the last n tokens earlier in the text, the longest n first, and
    copies what followed.

    The tie rule: of several places with the same n the latest counts. (vLLM takes the
    earliest.) A table of the n-grams grows with the text, so a step costs the same however
    long it is.
    """

    def __init__(self, gamma: int = 8, *, longest: int = 4, shortest: int = 2):
        if not 1 <= shortest <= longest:
            raise ValueError(
                f"n-grams of {shortest} to {longest} tokens: the shortest must be at least 1, and no longer"
            )
        self.gamma = checked_gamma(gamma)
        self.sizes = range(longest, shortest - 1, -1)
        self._text: list[int] = []
        # an n-gram → the place after its latest occurrence
        self._after: dict[tuple[int, ...], int] = {}

    def propose(
        self, tokens: Sequence[int], count: int, sampling: SamplingParams, rng: np.random.Generator
    ) -> Proposal:
        self._read(tokens)
        end = len(tokens)
        for n in self.sizes:
            if n < end and (place := self._after.get(tuple(tokens[end - n :]))) is not None:
                return Proposal(list(tokens[place : place + count]), None)
        return NOTHING

    def observe(self, best: Sequence[int], accepted: int) -> None:
        pass

    def _read(self, tokens: Sequence[int]) -> None:
        """Note every n-gram that something follows: those that end before the last token."""
        known = len(self._text)
        if len(tokens) < known or list(tokens[:known]) != self._text:
            self._text = []
            self._after = {}
            known = 0
        for end in range(max(1, known), len(tokens)):
            for n in self.sizes:
                if n <= end:
                    self._after[tuple(tokens[end - n : end])] = end
        self._text += tokens[known:]


class JacobiDrafter:
    """Guesses γ tokens at once and lets the target mend them: y_i ← argmax p(· | y_<i), all
    i in one step.

    Each step makes at least the first of them right, so the fixed point is the greedy text.
    Guesses behind the first wrong one were judged after a wrong token, and are kept as
    better guesses than none.
    """

    def __init__(self, gamma: int = 4):
        self.gamma = checked_gamma(gamma)
        self._window: list[int] = []

    def propose(
        self, tokens: Sequence[int], count: int, sampling: SamplingParams, rng: np.random.Generator
    ) -> Proposal:
        guesses = self._window[:count]
        return Proposal(guesses + [int(tokens[-1])] * (count - len(guesses)), None)

    def observe(self, best: Sequence[int], accepted: int) -> None:
        # best[accepted] is the token that is emitted now
        self._window = [int(t) for t in best[accepted + 1 :]]


class ModelDrafter:
    """A small model with its own cache; it samples as the target does, or as ``how`` says.

    ``model`` is any record with ``config``, ``weights`` and ``tokenizer``, of the target's
    vocabulary. The last draft of a step is not computed: its keys and values are missing
    when all were accepted, and are computed with the next step's tokens, as is everything
    that the cache does not have.
    """

    def __init__(
        self,
        model: Any,
        gamma: int = 4,
        *,
        confidence: float = 0.0,
        sampling: SamplingParams | None = None,
        sequences: int = 1,
    ):
        """``sequences`` have caches side by side; each proposal says for which of them it
        is.
        """
        if not 0 <= confidence < 1:
            raise ValueError(f"confidence is a probability within [0, 1), got {confidence}")
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
        self._fed: list[list[int]] = [[] for _ in range(sequences)]
        self._step = stepper(model.weights, model.config)
        self._lean: single_token.LeanStep | None = None
        if single_token.fits(model.config, model.weights):
            self._lean = single_token.LeanStep(model.weights, model.config, self.cache)
        # tokens that the model computed, and in how many calls: what drafting costs
        self.computed = 0
        self.passes = 0

    def propose(
        self,
        tokens: Sequence[int],
        count: int,
        sampling: SamplingParams,
        rng: np.random.Generator,
        sequence: int = 0,
    ) -> Proposal:
        return self._draft([Ask(tokens, count, sampling, rng, sequence)], together=False)[0]

    def propose_together(self, asks: Sequence[Ask]) -> list[Proposal]:
        """``propose`` for different sequences, in as many steps of the model as the longest
        proposal has drafts.
        """
        if len({ask.sequence for ask in asks}) < len(asks):
            raise ValueError(
                f"each sequence drafts once in a step, got {[ask.sequence for ask in asks]}"
            )
        # two are as fast one after the other
        return self._draft(asks, together=self._lean is None or len(asks) > 2)

    def _draft(self, asks: Sequence[Ask], together: bool) -> list[Proposal]:
        """Guess token by token for all that ask, in one step of the model each time or one
        after the other.
        """
        counts = [min(ask.most, self.cache.capacity - len(ask.tokens)) for ask in asks]
        drafts: list[list[int]] = [[] for _ in asks]
        rows: list[list[Array]] = [[] for _ in asks]
        feeds: dict[int, list[int]] = {}
        for i, ask in enumerate(asks):
            if counts[i] > 0:
                feeds[i] = (
                    self._last_two(ask) if together else self._behind(ask.tokens, ask.sequence)
                )
        feed = self._feed_together if together else self._feed_apart
        while feeds:
            z = feed([(asks[i].sequence, tokens) for i, tokens in feeds.items()])
            asked = list(feeds)
            feeds = {}
            for b, i in enumerate(asked):
                token, row = self._choose(z[b], self.sampling or asks[i].sampling, asks[i].rng)
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

    def observe(self, best: Sequence[int], accepted: int) -> None:
        pass

    def _last_two(self, ask: Ask) -> list[int]:
        """The last two tokens of a sequence, after everything before them was computed.

        Where one of them is cached already it gets the same keys and values once more, and
        all sequences of a batch bring equally many.
        """
        behind = self._behind(ask.tokens, ask.sequence)
        if len(behind) > 2:
            self._feed(behind[:-2], ask.sequence)
        elif len(behind) == 1 < len(ask.tokens):
            self._behind(ask.tokens[:-1], ask.sequence)
        return list(ask.tokens[-2:])

    def _feed_apart(self, feeds: Sequence[tuple[int, list[int]]]) -> Array | list[Array]:
        """Compute tokens of each sequence, one after the other → logits[V] of each after
        its last.
        """
        if len(feeds) == 1:
            return [self._feed(feeds[0][1], feeds[0][0])]
        # a lean step's logits last until the next
        return [self._feed(tokens, s) * 1.0 for s, tokens in feeds]

    def _feed_together(self, feeds: Sequence[tuple[int, list[int]]]) -> Array | list[Array]:
        """Compute equally many tokens of each sequence → logits[B, V] after the last ones.

        The sequences between the first and the last compute token 0 for nobody: behind the
        length of a sequence its cache holds nothing that is read, and one batch without
        gaps is what a contiguous cache attends to at once.
        """
        fed = dict(feeds)
        n = max(len(tokens) for tokens in fed.values())
        places = range(min(fed), max(fed) + 1)
        apart = (
            any(len(tokens) != n for tokens in fed.values())  # a text of one token beside others
            or any(
                self.cache.lengths[s] + n > self.cache.capacity for s in places
            )  # somebody between is full
            or len(places) > 2 * len(fed)  # more for nobody than for somebody
        )
        if apart:
            return self._feed_apart(feeds)
        counts = [n if s in places else 0 for s in range(len(self._fed))]
        ids = [t for s in places for t in fed.get(s, [0] * n)]
        z = self._step(ids, self.cache.positions(counts), self.cache.view(counts))
        last = [(s - places[0]) * n + n - 1 for s, _ in feeds]
        for s, tokens in feeds:
            self.cache.lengths[s] += n
            self._fed[s] += tokens
        self.computed += n * len(fed)
        self.passes += 1
        if last == list(range(z.shape[0])):
            return z
        return z[asarray_like(last, z, "int64")]

    def _behind(self, tokens: Sequence[int], sequence: int) -> list[int]:
        """Roll the cache back to what it shares with ``tokens`` and return the rest, at
        least the last one.
        """
        fed = self._fed[sequence]
        same = min(common_prefix(fed, tokens), len(tokens) - 1)
        self.cache.truncate(sequence, same)
        del fed[same:]
        return list(tokens[same:])

    def _feed(self, tokens: list[int], sequence: int) -> Array:
        """Compute tokens after those of the cache → logits[V] after the last."""
        z = self._computed(tokens, sequence)
        self._fed[sequence] += tokens  # last: what failed half-way is computed again
        self.computed += len(tokens)
        self.passes += 1
        return z

    def _computed(self, tokens: list[int], sequence: int) -> Array:
        if self._lean is not None and len(tokens) <= 4:
            for token in tokens[:-1]:
                self._lean.step(token, sequence, head=False)
            return self._lean.step(tokens[-1], sequence)
        weights = self.model.weights
        counts = [0] * len(self._fed)
        counts[sequence] = len(tokens)
        positions = self.cache.positions(counts)
        view = self.cache.view(counts)
        if len(tokens) <= 2:  # nearly always
            z = self._step(tokens, positions, view)
        else:
            placed = asarray_like([tokens, positions], self.cache.keys, "int64")
            last = asarray_like([len(tokens) - 1], self.cache.keys, "int64")
            z = logits(weights, forward(weights, self.config, placed[0], placed[1], view, last))
        self.cache.advance(counts)
        return z[-1]

    def _choose(
        self, z: Array, sampling: SamplingParams, rng: np.random.Generator
    ) -> tuple[int | None, Array | None]:
        """The next draft of z[V] and what it was sampled from; (None, None) where the model
        is not sure enough.
        """
        xp = namespace(z)
        if sampling.temperature == 0:
            token = int(xp.argmax(z))
            if self.confidence and float(xp.sum(xp.exp(z - z[token]))) * self.confidence > 1:
                return None, None
            return token, None
        row = distribution(z, sampling)
        if self.confidence and float(xp.max(row)) < self.confidence:
            return None, None
        return verification.draw(row, rng.random()), row


class Cascade:
    """Asks drafters in turn, the cheapest first, and takes the first proposal that is one.

    ``Cascade(NGramDrafter(3), TreeDrafter(draft))``: where the text repeats itself the
    guess is free and mostly right; elsewhere the model guesses.
    """

    def __init__(self, *drafters: Drafter):
        if not drafters or not all(hasattr(drafter, "propose") for drafter in drafters):
            raise ValueError(f"a cascade needs drafters, such as NGramDrafter(), got {drafters!r}")
        self.drafters = drafters
        self.gamma = max(drafter.gamma for drafter in drafters)
        self.trees = any(getattr(drafter, "trees", False) for drafter in drafters)
        self._asked = drafters[0]  # whose proposal is judged

    def propose(
        self, tokens: Sequence[int], count: int, sampling: SamplingParams, rng: np.random.Generator
    ) -> Proposal | TreeProposal:
        for drafter in self.drafters:
            proposal = drafter.propose(tokens, min(count, drafter.gamma), sampling, rng)
            if proposal.tokens:
                self._asked = drafter
                return proposal
        return NOTHING

    def observe(self, best: Sequence[int], accepted: int) -> None:
        self._asked.observe(best, accepted)


class PerfectDrafter(ModelDrafter):
    """The target drafts for itself, so p = q: every draft is accepted, and nothing is
    gained.
    """


class Adversary(ModelDrafter):
    """Drafts what the model finds least likely: as wrong as a drafter can be, and the text
    must not change.
    """

    def _choose(
        self, z: Array, sampling: SamplingParams, rng: np.random.Generator
    ) -> tuple[int | None, Array | None]:
        return int(namespace(z).argmin(z)), None


def check_drafter(target: Any, drafter: Any) -> None:
    """TypeError for what is no drafter; ValueError if a model in it does not speak the
    target's vocabulary.
    """
    if not hasattr(drafter, "propose"):
        raise TypeError(
            f"a drafter is a Model, or one of refllm.decode.speculative.drafters such as NGramDrafter(), got {drafter!r}"
        )
    if isinstance(drafter, Cascade):
        for one in drafter.drafters:
            check_drafter(target, one)
    if isinstance(drafter, ModelDrafter):
        check_vocabulary(target, drafter.model)
