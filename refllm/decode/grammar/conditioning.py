"""Masking is not conditioning: an exact example of what constrained sampling samples from.

Sources: Park et al. 2024 (Grammar-Aligned Decoding), section 3 (the bias); Lew et al. 2023
(Sequential Monte Carlo steering), section 2 (importance weights).

A language model p and a grammar with the set L of texts. Wanted is p given that the text is in L:

    p(x | L) = p(x) / Σ_{y ∈ L} p(y)        for x in L

Masking and renormalising step by step samples from another distribution:

    m(x) = Π_i p(x_i | x_<i) / Z_i,    Z_i = Σ_{t may follow x_<i} p(t | x_<i)

Z_i is the *legal mass*: the probability that the model gives to the tokens that may follow. It is
known when token i is drawn, and m does not know it of the steps to come: a token that leads where
the model wants to leave the grammar is drawn as often as one that leads where it wants to stay.
Each text comes too often in proportion to 1 / Π Z_i. Two ways give p(x | L) back:

| form      | how                                              | exact           | costs         |
|-----------|--------------------------------------------------|-----------------|---------------|
| masked    | draw from m                                      | no              | one run       |
| rejection | draw from p until the text is in L               | yes             | 1 / p(L) runs |
| weighted  | draw from m, weight each text by w = Π Z_i, and  | for means, as   | one run per   |
|           | normalise the weights over the runs              | the runs grow   | weighted text |

since m(x) w(x) = p(x): E_m[w f] / E_m[w] = E[f | L], and E_m[w] = p(L).

The functions enumerate all texts up to a horizon, so they are for vocabularies of a few tokens.
``model(prefix)`` gives p(· | prefix), [V]; a text ends where the grammar is complete, or with an
end token. What is longer than the horizon belongs to no text.

Left out: sequential Monte Carlo, which resamples in the middle of texts; ASAp, which learns the
legal mass to come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from refllm.decode.constraint import ILLEGAL, ConstraintStates
from refllm.decode.sampling import draw
from refllm.errors import InputError

Text = tuple[int, ...]
Distribution = dict[Text, float]  # text → probability
LanguageModel = Callable[[Sequence[int]], "np.ndarray"]  # prefix → p(· | prefix), [V]


class LegalText(NamedTuple):
    """A text of the grammar: its probability p, and w = Π Z_i."""

    tokens: Text
    p: float
    weight: float


def legal_texts(
    model: LanguageModel, states: ConstraintStates, horizon: int
) -> Iterator[LegalText]:
    """All texts of the grammar of at most ``horizon`` tokens, end tokens included."""

    def follow(prefix: Text, p: float, weight: float) -> Iterator[LegalText]:
        ended = bool(prefix) and prefix[-1] in states.end_tokens
        if ended or states.is_complete(prefix):
            yield LegalText(prefix, p, weight)
        elif len(prefix) < horizon:
            row = model(prefix)
            mask = states.mask(prefix)
            assert mask is not None, "only legal prefixes are followed"
            legal_mass = float(row[mask].sum())  # Z_i
            for token in np.flatnonzero(mask & (row > 0)):
                chance = float(row[token])
                yield from follow((*prefix, int(token)), p * chance, weight * legal_mass)

    return follow((), 1.0, 1.0)


def conditioned(model: LanguageModel, states: ConstraintStates, horizon: int) -> Distribution:
    """p(x | L): what one wants. InputError if no text of the grammar has a probability above 0."""
    texts = list(legal_texts(model, states, horizon))
    return _normalised({text.tokens: text.p for text in texts})


def masked(model: LanguageModel, states: ConstraintStates, horizon: int) -> Distribution:
    """m(x): what masking and renormalising step by step samples from, given that the text is no
    longer than the horizon.
    """
    texts = list(legal_texts(model, states, horizon))
    return _normalised({text.tokens: text.p / text.weight for text in texts})


def weighted(model: LanguageModel, states: ConstraintStates, horizon: int) -> Distribution:
    """m(x) w(x), normalised: equal to ``conditioned``."""
    texts = {text.tokens: text for text in legal_texts(model, states, horizon)}
    found = masked(model, states, horizon)
    return _normalised({tokens: chance * texts[tokens].weight for tokens, chance in found.items()})


def sample_by_rejection(
    model: LanguageModel, states: ConstraintStates, horizon: int, rng: np.random.Generator
) -> Text:
    """One text from p(x | L): draw from p, and begin again as soon as a token is illegal.

    A grammar to which the model gives little probability takes many runs, 1 / p(L) on average;
    one to which it gives none never ends.
    """
    text: Text = ()
    while True:
        if states.is_complete(text) or (text and text[-1] in states.end_tokens):
            return text
        if len(text) < horizon:
            text = (*text, draw(model(text), rng.random()))
            if states.state(text) is not ILLEGAL:
                continue
        text = ()  # illegal, or too long: rejected


def sample_weighted(
    model: LanguageModel, states: ConstraintStates, horizon: int, rng: np.random.Generator
) -> tuple[Text, float]:
    """One text from m, and its weight w = Π Z_i; weight 0 for one that is longer than the
    horizon.
    """
    text: Text = ()
    weight = 1.0
    while not (states.is_complete(text) or (text and text[-1] in states.end_tokens)):
        if len(text) == horizon:
            return text, 0.0
        mask = states.mask(text)
        assert mask is not None, "only legal tokens are drawn"
        legal = np.where(mask, model(text), 0.0)
        weight *= float(legal.sum())
        text = (*text, draw(legal, rng.random()))
    return text, weight


def _normalised(weights: Distribution) -> Distribution:
    """The weights divided by their sum."""
    total = sum(weights.values())
    if not total > 0:
        raise InputError("the model gives no text of the grammar a probability above 0")
    return {text: weight / total for text, weight in weights.items()}
