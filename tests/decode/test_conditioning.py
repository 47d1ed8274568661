"""Masking step by step is not conditioning; rejection and importance weights are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import enumeration
from enumeration import Table, exact_distribution, largest_difference
from grammars import TableGrammar, random_grammar
from refllm.decode.constraint import ConstraintStates
from refllm.decode.grammar import conditioning
from refllm.decode.grammar.conditioning import (
    conditioned,
    legal_texts,
    masked,
    sample_by_rejection,
    sample_weighted,
    weighted,
)
from refllm.errors import InputError
from strategies import seeds

# "a b", "a c" or "b c": after a first token the model wants to leave the grammar, or to stay in it
GRAMMAR = TableGrammar([{0: 1, 1: 2}, {1: 3, 2: 3}, {2: 3}, {}], [3], 3)


def stays_after_b(prefix: Any) -> np.ndarray:
    """After a the grammar has 1/10 of the probability, after b all of it."""
    if not prefix:
        return np.array([0.5, 0.5, 0.0])
    return np.array([0.9, 0.05, 0.05]) if prefix[0] == 0 else np.array([0.0, 0.0, 1.0])


def states_of(grammar: TableGrammar) -> ConstraintStates:
    return ConstraintStates(grammar, grammar.vocabulary, grammar.end_tokens)


def test_the_bias_in_numbers():
    """Both first tokens have probability 1/2; that ten times more texts of a are rejected is not
    seen when it is drawn.
    """
    states = states_of(GRAMMAR)
    assert masked(stays_after_b, states, 2) == pytest.approx(
        {(0, 1): 0.25, (0, 2): 0.25, (1, 2): 0.5}
    )
    assert conditioned(stays_after_b, states, 2) == pytest.approx(
        {(0, 1): 0.025 / 0.55, (0, 2): 0.025 / 0.55, (1, 2): 0.5 / 0.55}
    )
    assert weighted(stays_after_b, states, 2) == pytest.approx(
        conditioned(stays_after_b, states, 2)
    )


@pytest.mark.theorem(
    "m(x) Π Z_i = p(x): texts that are sampled by masking, weighted by their legal masses, have "
    "the distribution of the model given that the text is legal; without the weights each text "
    "comes too often in proportion to 1 / Π Z_i",
    source="Park et al. 2024, section 3; Lew et al. 2023, section 2; by enumeration",
)
@given(
    seed=seeds,
    kind=st.sampled_from(["dense", "sparse", "peaked"]),
    ends=st.booleans(),
    horizon=st.integers(1, 5),
)
def test_weights_of_legal_mass_make_masking_conditioning(seed, kind, ends, horizon):
    grammar = random_grammar(seed, 3, states=3, end_tokens=(1,) if ends else ())
    states = states_of(grammar)
    model = Table(3, seed, kind)
    texts = list(legal_texts(model, states, horizon))
    if not any(text.p for text in texts):
        for wrong in (conditioned, masked, weighted):
            with pytest.raises(InputError, match="no text of the grammar"):
                wrong(model, states, horizon)
        return
    wanted = conditioned(model, states, horizon)
    found = masked(model, states, horizon)
    assert largest_difference(weighted(model, states, horizon), wanted) < 1e-12
    # by definition: products of rows
    whole = {
        text.tokens: math.prod(model(text.tokens[:i])[t] for i, t in enumerate(text.tokens))
        for text in texts
    }
    total = sum(whole.values())
    assert wanted == pytest.approx({text: p / total for text, p in whole.items()})
    # what masking draws too often: each text in proportion to 1 / Π Z_i
    shift = [found[text.tokens] * text.weight / wanted[text.tokens] for text in texts]
    assert shift == pytest.approx([shift[0]] * len(shift))


@pytest.mark.parametrize("grammar", [GRAMMAR, random_grammar(3, 3, states=3, end_tokens=(1,))])
@pytest.mark.parametrize("seed", [0, 5])
def test_samples_have_these_distributions(grammar, seed, monkeypatch):
    """Every uniform is enumerated. A rejection begins again, so it is enumerated to the first
    one: of what is accepted then the share of each text is p(x | L).
    """
    monkeypatch.setattr(conditioning, "draw", enumeration.draw)
    model = Table(3, seed)
    states = states_of(grammar)
    horizon = 3

    def once(rng: Any) -> Any:
        """Up to the first rejection."""
        first = True

        def prefix(text: Any) -> np.ndarray:
            nonlocal first
            if not text and not first:
                raise StopIteration
            first = False
            return model(text)

        try:
            return sample_by_rejection(prefix, states, horizon, rng)
        except StopIteration:
            return "rejected"

    runs = exact_distribution(once)
    rejected = runs.pop("rejected", 0.0)
    accepted = {text: chance / (1 - rejected) for text, chance in runs.items()}
    assert largest_difference(accepted, conditioned(model, states, horizon)) < 1e-12
    texts = list(legal_texts(model, states, horizon))
    assert 1 - rejected == pytest.approx(sum(text.p for text in texts))  # p(L)

    pairs = exact_distribution(lambda rng: sample_weighted(model, states, horizon, rng))
    means = {text: chance * w for (text, w), chance in pairs.items() if w}
    total = sum(means.values())
    assert total == pytest.approx(1 - rejected)  # E[w] = p(L)
    estimate = {text: mean / total for text, mean in means.items()}
    assert largest_difference(estimate, conditioned(model, states, horizon)) < 1e-12
    drawn = {text: chance for (text, w), chance in pairs.items() if w}
    kept = sum(drawn.values())
    assert (
        largest_difference(
            {text: chance / kept for text, chance in drawn.items()}, masked(model, states, horizon)
        )
        < 1e-12
    )
