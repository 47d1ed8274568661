"""Drafters: the q that they return is what they sampled from; their caches match the
sequence; bad input is rejected.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import to_host
from drafting import SAMPLED, SMALL, next_logits, random_model, use_exact_draws
from enumeration import exact_distribution
from networks import EPS, NETWORKS, tolerance
from refllm.checkpoints.tokenizer import Tokenizer
from refllm.decode.sampling import process_logits
from refllm.decode.sampling_params import GREEDY, SamplingParams
from refllm.decode.speculative.control_drafters import AdversarialDrafter, PerfectDrafter
from refllm.decode.speculative.interface import DraftRequest, check_vocabulary, common_prefix_length
from refllm.decode.speculative.jacobi_drafter import JacobiDrafter
from refllm.decode.speculative.model_drafter import ModelDrafter
from refllm.decode.speculative.ngram_drafter import NGramDrafter
from refllm.kv.contiguous import ContiguousCache
from refllm.model.llama import forward
from strategies import seeds

token_lists = st.lists(st.integers(0, 3), min_size=1, max_size=24)


# --- n-grams ------------------------------------------------------------------------------


def looked_up(text, count, longest, shortest):
    """The rule by search: the longest n of which the last n tokens occur earlier, of equal
    ones the latest place.
    """
    for n in range(longest, shortest - 1, -1):
        for place in range(len(text) - 1, n - 1, -1):
            if n < len(text) and text[place - n : place] == text[len(text) - n :]:
                grown = list(text)
                for _ in range(count):
                    grown.append(grown[place + len(grown) - len(text)])
                return grown[len(text) :]
    return []


@pytest.mark.theorem(
    "Prompt lookup copies what followed the longest earlier match of the last tokens, of equal "
    "ones the latest, and goes on with its own drafts behind the end",
    source="definition; Saxena 2023 with another tie rule",
)
@given(
    text=token_lists,
    count=st.integers(0, 5),
    shortest=st.integers(1, 2),
    more=st.integers(0, 2),
    cuts=st.data(),
)
def test_ngrams_are_found_as_by_search(text, count, shortest, more, cuts):
    drafter = NGramDrafter(longest=shortest + more, shortest=shortest)
    rng = np.random.default_rng(0)
    # in any order: a shorter one is a new sequence
    for end in cuts.draw(st.lists(st.integers(1, len(text)), max_size=4)):
        drafter.propose(text[:end], 1, GREEDY, rng)
    found = drafter.propose(text, count, GREEDY, rng)
    assert found.q is None
    assert found.tokens == looked_up(text, count, shortest + more, shortest)


@given(period=st.lists(st.integers(0, 3), min_size=1, max_size=4), count=st.integers(1, 9))
def test_a_text_with_a_period_is_drafted_as_far_as_is_asked_for(period, count):
    text = period * 6
    drafts = NGramDrafter(9).propose(text, count, GREEDY, np.random.default_rng(0)).tokens
    assert drafts == (period * 9)[:count]


def test_the_latest_of_equal_matches_counts():
    assert NGramDrafter(shortest=1).propose(
        [1, 2, 7, 1, 3, 7, 1], 2, GREEDY, np.random.default_rng(0)
    ).tokens == [3, 7]


def test_a_drafter_that_is_used_for_another_sequence_forgets_the_first():
    """[5, 6] was followed by 9 in the first sequence; the second begins in the same way."""
    drafter = NGramDrafter()
    rng = np.random.default_rng(0)
    # the last two tokens, [6, 4], are new
    assert drafter.propose([5, 6, 9, 5, 6, 4], 3, GREEDY, rng).tokens == []
    assert drafter.propose([5, 6, 1, 2, 3, 0, 5, 6], 3, GREEDY, rng).tokens == [1, 2, 3]
    assert drafter.propose([5, 6, 9, 5, 6], 3, GREEDY, rng).tokens == [9, 5, 6]


# --- a model ------------------------------------------------------------------------------


@pytest.mark.theorem(
    "A drafter's q is the distribution that its tokens were drawn from, after its own "
    "temperature, top-k and top-p",
    source="Leviathan et al. 2023, section 2.3",
)
@pytest.mark.parametrize(
    "sampling", [SAMPLED, SamplingParams(0.5, top_k=2), SamplingParams(1.5, top_p=0.8)]
)
@pytest.mark.parametrize("own", [None, SamplingParams(0.7)])
def test_the_returned_distribution_is_the_sampled_one(sampling, own, monkeypatch):
    use_exact_draws(monkeypatch)
    drafter = ModelDrafter(random_model(SMALL, 1), sampling=own)
    rows = {}

    def run(rng):
        proposal = drafter.propose([0, 1], 2, sampling, rng)
        rows[tuple(proposal.tokens[:1])] = proposal.q
        return tuple(proposal.tokens)

    found = exact_distribution(run)
    used = own or sampling
    for (first, second), chance in found.items():
        q = rows[first,]
        assert chance == pytest.approx(q[0, first] * q[1, second], abs=16 * EPS)
        for i, text in enumerate(([0, 1], [0, 1, first])):
            expected = process_logits(
                next_logits(drafter.model, text), used.temperature, used.top_k, used.top_p
            )
            np.testing.assert_allclose(q[i], expected, rtol=0, atol=1e-12)
    assert sum(found.values()) == pytest.approx(1)


@pytest.mark.theorem(
    "Whatever was accepted, a drafter's cache is that of the sequence: it drafts like a new "
    "drafter",
    source="definition; the missing keys and values after full acceptance",
)
@pytest.mark.parametrize("name", ["llama", "mistral-window"])
@given(seed=seeds, rounds=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=5))
def test_a_continued_cache_drafts_like_a_new_one(xp, name, seed, rounds):
    model = random_model(NETWORKS[name], 2, xp)
    rng = np.random.default_rng(seed)
    drafter = ModelDrafter(model, 4)
    text = rng.integers(0, 300, 3).tolist()
    for count, accepted in rounds:
        mine = drafter.propose(text, count, GREEDY, rng).tokens
        assert mine == ModelDrafter(model, 4).propose(text, count, GREEDY, rng).tokens
        assert len(mine) == count
        if accepted > len(mine):
            text = text[::-1]  # another sequence, as after an end
        else:
            text = [*text, *mine[:accepted], int(rng.integers(300))]
    # the cache holds what the network writes for these tokens
    [fed] = drafter._cached
    assert drafter.cache.lengths == [len(fed)]
    if fed:
        fresh = ContiguousCache(model.config, 1, len(fed), like=model.weights["norm"])
        ids = xp.asarray(np.asarray(fed))
        forward(
            model.weights,
            model.config,
            ids,
            xp.asarray(np.arange(len(fed))),
            fresh.view([len(fed)]),
        )
        mine, theirs = (to_host(c.keys[..., : len(fed)]) for c in (drafter.cache, fresh))
        np.testing.assert_allclose(
            mine, theirs, rtol=0, atol=tolerance(model.config, len(fed), theirs)
        )


def test_after_full_acceptance_two_tokens_are_computed_and_after_rejection_one():
    drafter = ModelDrafter(random_model(SMALL, 1), 3)
    rng = np.random.default_rng(0)
    first = drafter.propose([0, 1], 3, GREEDY, rng).tokens
    assert drafter.computed == 2 + 2  # the prompt, and two of the drafts: the last one is never fed
    drafter.propose([0, 1, *first, 2], 1, GREEDY, rng)
    # the last draft, whose keys and values were missing, and the bonus
    assert drafter.computed == 4 + 2
    drafter.propose([0, 1, *first, (2 + 1) % 3], 1, GREEDY, rng)
    assert drafter.computed == 6 + 1


def test_drafts_end_where_the_model_is_not_confident_or_has_no_positions_left():
    model = random_model(SMALL, 1)
    rng = np.random.default_rng(0)
    z = next_logits(model, [0, 1])
    top = float(process_logits(z).max())
    for sampling in (GREEDY, SAMPLED):
        assert (
            ModelDrafter(model, confidence=top + 1e-9).propose([0, 1], 3, sampling, rng).tokens
            == []
        )
        assert (
            len(ModelDrafter(model, confidence=top - 1e-9).propose([0, 1], 3, sampling, rng).tokens)
            >= 1
        )
        assert len(ModelDrafter(model).propose([0] * 30, 4, sampling, rng).tokens) == 2
        assert ModelDrafter(model).propose([0] * 32, 4, sampling, rng).tokens == []
        assert ModelDrafter(model).propose([0] * 40, 4, sampling, rng).tokens == []


def test_the_controls():
    model = random_model(SMALL, 1)
    rng = np.random.default_rng(0)
    z = next_logits(model, [0, 1])
    assert PerfectDrafter(model).propose([0, 1], 1, GREEDY, rng).tokens == [int(z.argmax())]
    assert AdversarialDrafter(model).propose([0, 1], 1, SAMPLED, rng) == ([int(z.argmin())], None)


def test_jacobi_drafts_what_the_target_predicted():
    drafter = JacobiDrafter(3)
    rng = np.random.default_rng(0)
    assert drafter.propose([5], 3, GREEDY, rng) == ([5, 5, 5], None)
    # 7 was accepted, 8 is emitted, 9 and 10 were predicted after wrong drafts
    drafter.observe([7, 8, 9, 10], 1)
    assert drafter.propose([5, 7, 8], 3, GREEDY, rng).tokens == [9, 10, 8]
    assert drafter.propose([5, 7, 8], 1, GREEDY, rng).tokens == [9]


# --- bad input ----------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0, -1, 1.5, None])
@pytest.mark.parametrize(
    "kind", [NGramDrafter, JacobiDrafter, lambda gamma: ModelDrafter(random_model(SMALL, 1), gamma)]
)
def test_gamma_must_be_at_least_one(kind, gamma):
    with pytest.raises(ValueError, match="gamma, the number of drafts per step, must be 1 or more"):
        kind(gamma)


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="shortest must be at least 1"):
        NGramDrafter(longest=1, shortest=2)
    with pytest.raises(ValueError, match="confidence is a probability"):
        ModelDrafter(random_model(SMALL, 1), confidence=1.0)


def test_another_vocabulary_is_rejected():
    target = random_model(NETWORKS["llama"], 1)
    other = random_model(SMALL, 1)
    with pytest.raises(ValueError, match="vocabulary of 3 tokens and the target of 300"):
        check_vocabulary(target, other)
    other = random_model(NETWORKS["llama"], 2)
    check_vocabulary(target, other)
    other.tokenizer = Tokenizer.train(["class A:\n    pass\n" * 3], 280)
    with pytest.raises(ValueError, match="is not the target's: '.*' is token"):
        check_vocabulary(target, other)


@given(a=token_lists, b=token_lists)
def test_common_prefix_length(a, b):
    n = common_prefix_length(a, b)
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]
    assert common_prefix_length(a * 3 + b, a * 3 + [9]) == 3 * len(a)


# --- several sequences at once ------------------------------------------------------------


@pytest.mark.theorem(
    "What a model drafts for several sequences in one step is what it drafts for each alone, "
    "whatever their lengths, their cached tokens, and the sequences between them",
    source="the rows of a batch do not see each other",
)
@pytest.mark.parametrize("name", ["llama", "mistral-window"])
@given(data=st.data(), seed=seeds, sampled=st.booleans(), confidence=st.sampled_from([0.0, 0.01]))
def test_batched_drafts_are_those_made_alone(xp, name, data, seed, sampled, confidence):
    config = NETWORKS[name]
    rng = np.random.default_rng(seed)
    model = random_model(config, seed % 7, xp)
    sampling = SAMPLED if sampled else GREEDY
    together = ModelDrafter(model, 3, confidence=confidence, sequences=5)
    token_lists = [
        rng.integers(0, config.vocab_size, rng.integers(1, 9)).tolist() for _ in range(5)
    ]
    for turn in range(3):
        asked = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=5, unique=True))
        asks = [
            DraftRequest(
                token_lists[s],
                int(rng.integers(0, 4)),
                sampling,
                np.random.default_rng([turn, s]),
                s,
            )
            for s in asked
        ]
        made = together.propose_batch(asks)
        for ask, proposal in zip(asks, made, strict=True):
            alone = ModelDrafter(model, 3, confidence=confidence)
            expected = alone.propose(
                ask.tokens, ask.max_drafts, sampling, np.random.default_rng([turn, ask.sequence])
            )
            assert proposal.tokens == expected.tokens
            assert (proposal.q is None) == (expected.q is None)
            if expected.q is not None:
                np.testing.assert_allclose(
                    to_host(proposal.q), to_host(expected.q), rtol=0, atol=1e-11
                )
            # some of the drafts are accepted, and a token follows
            kept = expected.tokens[: rng.integers(0, 4)]
            token_lists[ask.sequence] = [
                *ask.tokens,
                *kept,
                *rng.integers(0, config.vocab_size, 1).tolist(),
            ]


def test_a_full_sequence_between_others_and_a_sequence_of_one_token():
    model = random_model(SMALL, 1)  # 32 positions
    rng = np.random.default_rng(0)
    drafter = ModelDrafter(model, 2, sequences=3)
    drafter.propose([0] * 31, 1, GREEDY, rng, 1)
    assert drafter.cache.lengths[1] == 31
    for middle, length in (([0] * 31, 31), ([0] * 32, 31)):
        asks = [
            DraftRequest([0, 1, 2], 2, GREEDY, rng, 0),
            DraftRequest(middle, 2, GREEDY, rng, 1),
            DraftRequest([2], 2, GREEDY, rng, 2),
        ]
        found = [p.tokens for p in drafter.propose_batch(asks)]
        expected = [
            ModelDrafter(model, 2).propose(ask.tokens, 2, GREEDY, rng).tokens for ask in asks
        ]
        assert found == expected
        assert drafter.cache.lengths[1] == length
    # two tokens of the first and the last at once, around a full one
    token_lists = [0, 1, 2], [0] * 32, [1, 1, 2]
    found = drafter.propose_batch(
        [DraftRequest(text, 2, GREEDY, rng, s) for s, text in enumerate(token_lists)]
    )
    assert [p.tokens for p in found] == [
        ModelDrafter(model, 2).propose(t, 2, GREEDY, rng).tokens for t in token_lists
    ]
    assert drafter.cache.lengths[1] == 31
    assert drafter.propose_batch([]) == []


def test_a_sequence_drafts_once_per_step():
    drafter = ModelDrafter(random_model(SMALL, 1), 2, sequences=3)
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="drafts once per step"):
        drafter.propose_batch(
            [DraftRequest([0, 1], 2, GREEDY, rng, 0), DraftRequest([1, 1], 2, GREEDY, rng, 0)]
        )


@pytest.mark.parametrize("at", [0, 1, 13, 14, 15, 29])
@pytest.mark.parametrize("more", [0, 5])
def test_the_common_prefix_of_long_sequences_ends_at_the_first_difference(at, more):
    """Sequences of 30 tokens that differ at one place: within the last 16, where the search is
    token by token, before it, and at its first token.
    """
    one = list(range(30))
    other = [*one, *[7] * more]
    other[at] = 99
    assert common_prefix_length(one, other) == common_prefix_length(other, one) == at
    assert common_prefix_length([], one) == common_prefix_length(one, []) == 0
