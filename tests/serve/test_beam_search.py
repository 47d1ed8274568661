"""Beam search against naive searches that keep whole outputs: over random languages, and in
the engine over a network.

A language is a table of logits by text, drawn from a seed: a search over it takes a
millisecond, and its probabilities can be sharp, flat, or fond of ending, as those of one
small network are not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction
from itertools import count
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from refllm.decode.output_params import StopTokens
from refllm.decode.sampling import log_probabilities
from refllm.serve.beam_search import BeamSearch, Hypothesis, log_loss, normalised_score
from refllm.serve.engine import Engine
from refllm.serve.plan import Plan
from refllm.serve.request import Request, Sequence
from serving import TOLERANCE, last_logits, served_model
from strategies import seeds

END = 5
Language = Callable[[tuple[int, ...]], np.ndarray]  # the output so far → logits of its next token


def language(
    seed: int, vocab: int, sharpness: float, ends: frozenset[int], fondness: float
) -> Language:
    """Normal logits times ``sharpness``, those of end tokens raised by ``fondness``."""

    def logits(output: tuple[int, ...]) -> np.ndarray:
        z = sharpness * np.random.default_rng([seed, *output]).normal(size=vocab)
        z[list(ends)] += fondness
        return z

    return logits


def naive_search(
    request: Request, ends: frozenset[int], logits: Language, early: bool = False
) -> tuple[list[Hypothesis], int, float]:
    """(the n best hypotheses, knobs long the search took, the smallest difference of scores
    that decided anything).

    ``early``: it is over as soon as n hypotheses are at least as good as whatever the beams
    may come to: tried are all lengths, with a probability of 1 for every token that is to
    come.
    """
    n = request.n
    penalty = request.length_penalty
    longest = request.max_tokens
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    ended: list[Hypothesis] = []
    nearest = np.inf
    for length in range(1, longest + 1):
        found = []
        for score, text in beams:
            logs = log_probabilities(logits(tuple(text)))
            found += [(score + float(log), [*text, token]) for token, log in enumerate(logs)]
        found.sort(key=lambda c: -c[0])
        scores = np.array([score for score, _ in found])
        nearest = min(nearest, float(np.min(scores[:-1] - scores[1:], initial=np.inf)))
        ended += [
            Hypothesis(score / length**penalty, text, "stop")
            for score, text in found[:n]
            if text[-1] in ends
        ]
        beams = [(score, text) for score, text in found if text[-1] not in ends][:n]
        if early and length < longest and len(ended) >= n:
            possible = [
                score / later**penalty
                for score, _ in beams
                for later in range(length + 1, longest + 1)
            ]
            if sorted(h.score for h in ended)[-n] >= max(possible):
                return sorted(ended, key=lambda h: -h.score)[:n], length, nearest
    ended += [Hypothesis(score / longest**penalty, text, "length") for score, text in beams]
    return sorted(ended, key=lambda h: -h.score)[:n], longest, nearest


def drive(
    request: Request, ends: frozenset[int], logits: Language, xp: Any = np
) -> tuple[list[Hypothesis], int]:
    """(the n best of the search, its steps), its beams kept as the scheduler keeps them:
    forks run last.
    """
    search = BeamSearch(request, StopTokens(frozenset(ends)))
    beams = [Sequence(request, 0, 0)]
    indices = count(1)
    steps = 0
    while beams:
        assert len(beams) <= request.n
        assert steps < request.max_tokens
        outcomes = search.advance(
            beams, xp.asarray(np.stack([logits(tuple(beam.output)) for beam in beams]))
        )
        told = []
        kept = []
        forks = []
        for beam, outcome in zip(beams, outcomes, strict=True):
            text = list(beam.tokens)
            for i, continuation in enumerate(outcome):
                sequence = beam if i == 0 else Sequence(request, next(indices), 0)
                sequence.tokens = [*text, *continuation.tokens]
                told.append(sequence)
                (forks if i else kept).append(sequence)
        if told:
            search.follow(told)
        beams = kept + forks
        steps = steps + 1
    return search.best, steps


# --- over random languages ----------------------------------------------------------------


@st.composite
def searches(draw: st.DrawFn) -> tuple[Request, frozenset[int], Language]:
    n = draw(st.integers(1, 4))
    ends = draw(st.sampled_from([(), (0,), (2,), (1, 3)]))
    vocab = draw(st.integers(max(n, 2), 5)) + len(ends)
    request = Request(
        [1],
        draw(st.integers(1, 6)),
        n=n,
        beam=True,
        length_penalty=draw(st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0])),
    )
    settings_ = (
        draw(st.sampled_from([0.3, 1.0, 3.0])),
        frozenset(ends),
        draw(st.sampled_from([-2.0, 0.0, 2.0])),
    )
    return request, frozenset(ends), language(draw(seeds), vocab, *settings_)


@pytest.mark.theorem(
    "The search finds what a search over all candidates finds that never ends early; an end "
    "token counts only among the n best candidates",
    source="Kwon et al. 2023, section 4.4; the rule of Hugging Face's generation",
)
@settings(max_examples=150)
@given(case=searches())
def test_oracle_a_search_over_whole_outputs(xp, case):
    expected, _, nearest = naive_search(*case)
    assume(nearest > TOLERANCE)  # otherwise either may win
    found, _ = drive(*case, xp)
    assert [(h.tokens, h.finish_reason) for h in found] == [
        (h.tokens, h.finish_reason) for h in expected
    ]
    np.testing.assert_allclose(
        [h.score for h in found], [h.score for h in expected], atol=TOLERANCE
    )


@pytest.mark.theorem(
    "The search is over in the first step after which no probabilities of later tokens can "
    "change what it finds",
    source="log p ≤ 0; refllm.serve.beam_search",
)
@settings(max_examples=150)
@given(case=searches())
def test_bound_the_search_ends_as_early_as_it_may_and_no_earlier(case):
    expected, length, nearest = naive_search(*case, early=True)
    assume(nearest > TOLERANCE)
    found, steps = drive(*case)
    assert steps == length
    assert [h.tokens for h in found] == [h.tokens for h in expected]


def certain(*tokens: int) -> np.ndarray:
    """Logits of four tokens whose probability is shared by ``tokens``; log p of one alone
    is 0, exactly.
    """
    return np.where(np.isin(np.arange(4), tokens), 0.0, -1e4)


def test_an_end_that_is_not_among_the_n_best_is_no_hypothesis():
    z = np.log([0.5, 0.3, 0.15, 0.05])
    later = np.log([0.4, 0.4, 0.1, 0.1])
    for n, end, expected in ((2, 2, [[0, 0], [0, 1]]), (3, 2, [[0, 0], [0, 1], [2]])):
        request = Request([1], 2, n=n, beam=True, length_penalty=0.0)
        found, _ = drive(request, frozenset([end]), lambda text: later if text else z)
        # p = 0.2, 0.2, and the end's 0.15 that beats 0.3 · 0.4
        assert [h.tokens for h in found] == expected
    # two ends, the first and the third best: the third is not among two, though its 0.15 beats
    # 0.3 · 0.25, what the best beam comes to
    request = Request([1], 2, n=2, beam=True, length_penalty=0.0)
    flat = np.log([0.25] * 4)
    found, _ = drive(request, frozenset([0, 2]), lambda text: flat if text else z)
    assert [h.tokens for h in found] == [[0], [1, 0]]


def test_a_hypothesis_as_good_as_the_bound_ends_the_search():
    request = Request([1], 9, n=1, beam=True, length_penalty=0.0)
    found, steps = drive(request, frozenset([0]), lambda text: certain(0, 1))
    # its score is log ½, and so is the beam's
    assert ([h.tokens for h in found], steps) == ([[0]], 1)


def test_a_long_output_may_still_win_where_length_is_rewarded():
    for penalty, longest, expected in ((0.0, 9, [0]), (1.0, 9, [1] * 9), (1.0, 2, [1, 1])):
        request = Request([1], longest, n=1, beam=True, length_penalty=penalty)
        first = np.log([0.5, 0.4, 0.08, 0.02])
        found, steps = drive(
            request, frozenset([0]), lambda text, z=first: certain(1) if text else z
        )
        assert [h.tokens for h in found] == [expected]
        assert steps == len(expected)


def test_where_length_is_penalised_a_beam_may_win_as_long_as_the_next_length_may():
    table = {(): [0.06, 0.9, 0.03, 0.01], (1,): [0.5, 0.48, 0.01, 0.01]}
    request = Request([1], 9, n=2, beam=True, length_penalty=-1.0)
    found, steps = drive(
        request, frozenset([0]), lambda text: np.log(table[text]) if text in table else certain(1)
    )
    # the second best is log 0.06 = -2.8: better than 4 log(0.9 · 0.48) = -3.4, but not than
    # three times as much
    assert ([h.tokens for h in found], steps) == ([[1, 0], [0]], 3)


def test_equal_candidates_are_ranked_by_beam_then_by_token():
    request = Request([1], 2, n=3, beam=True, ignore_eos=True)
    found, _ = drive(request, frozenset(), lambda text: np.zeros(4))
    assert [h.tokens for h in found] == [[0, 0], [0, 1], [0, 2]]


@pytest.mark.parametrize("ends", [(0,), (0, 1), (0, 1, 2)])
def test_ends_never_crowd_out_the_beams(ends):
    """The likeliest tokens of every beam end: n (1 + e) candidates hold n that go on, and
    no fewer do.
    """
    z = np.array([9.0 if token in ends else -float(token) for token in range(6)])
    request = Request([1], 4, n=3, beam=True, length_penalty=9.0)
    sizes = []

    def logits(output: tuple[int, ...]) -> np.ndarray:
        sizes.append(len(output))
        return z

    drive(request, frozenset(ends), logits)
    assert sizes == [0, *[1] * 3, *[2] * 3, *[3] * 3]


@pytest.mark.theorem(
    "However large the length penalty, hypotheses are ranked by score / length ** penalty: exact "
    "arithmetic where floats overflow and underflow",
    source="serve/beam_search.py",
)
@given(
    hypotheses=st.lists(
        st.tuples(st.floats(-1e3, 0.0), st.integers(1, 60)), min_size=1, max_size=6
    ),
    penalty=st.integers(-400, 400),
)
def test_oracle_extreme_length_penalties_rank_as_exact_fractions_do(hypotheses, penalty):
    exact = [Fraction(score) / Fraction(length) ** penalty for score, length in hypotheses]
    ranks = [log_loss(score, length, float(penalty)) for score, length in hypotheses]
    for a, b in itertools.combinations(range(len(exact)), 2):
        ratio = exact[a] / exact[b] if exact[b] else Fraction(0)
        if exact[a] and abs(ratio - 1) < Fraction(1, 10**9):
            continue  # as near as the rounding of a logarithm of this size
        assert (ranks[a] < ranks[b]) == (exact[a] > exact[b]), (a, b)
    for (score, length), value in zip(hypotheses, exact, strict=True):
        found = normalised_score(score, length, float(penalty))
        if abs(value) < Fraction(1, 10**300):
            assert abs(found) < 1e-299
        elif abs(value) > Fraction(10) ** 300:
            assert found < -1e299
        else:
            assert found == pytest.approx(float(value), rel=1e-12)


@pytest.mark.parametrize("penalty", [300.0, -300.0, 1e308, -1e308])
def test_a_search_with_any_finite_length_penalty_ends_and_so_do_its_neighbours(penalty):
    engine = Engine(served_model(9), num_blocks=60, block_size=2)
    other = engine.submit(Request([1, 2], 12, ignore_eos=True))
    name = engine.submit(Request([1], 16, n=2, beam=True, length_penalty=penalty))
    results = engine.run()
    assert len(results[name].outputs) == 2
    assert results[name].error is None
    assert len(results[other].tokens) == 12


# --- in the engine ------------------------------------------------------------------------


def network(request: Request) -> Language:
    return lambda text: last_logits((*request.prompt, *text), 9)


@pytest.mark.theorem(
    "Beams that share blocks, stop early and are preempted find what a search over whole "
    "outputs finds",
    source="Kwon et al. 2023, section 4.4",
)
@given(
    prompt=st.lists(st.integers(0, 8), min_size=1, max_size=6),
    longest=st.integers(1, 6),
    n=st.integers(1, 4),
    penalty=st.sampled_from([0.0, 1.0, 2.0]),
    size=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_oracle_the_search_in_the_engine_finds_what_a_naive_one_finds(
    prompt, longest, n, penalty, size, seed
):
    request = Request(prompt, longest, n=n, beam=True, length_penalty=penalty)
    # not one more than the search may need: others preempt it
    blocks = -(-request.max_cached_tokens // size) * n
    engine = Engine(
        served_model(9),
        num_blocks=blocks + seed,
        block_size=size,
        poison=True,
        prefix_cache=("hash", "radix", None)[seed % 3],
        max_batch_tokens=max(n, 4),
    )
    others = Request([1], min(request.max_cached_tokens, 3), ignore_eos=True)
    engine.submit(others)
    name = engine.submit(request)
    engine.submit(others)
    engine.step()
    result = engine.run()[name]
    engine.check()
    expected, _, nearest = naive_search(request, frozenset([END]), network(request))
    if nearest < TOLERANCE:
        return  # a tie: either may win
    assert [o.tokens for o in result.outputs] == [
        h.tokens[:-1] if h.finish_reason == "stop" else h.tokens for h in expected
    ]
    assert [o.finish_reason for o in result.outputs] == [h.finish_reason for h in expected]
    np.testing.assert_allclose(
        [o.score for o in result.outputs], [h.score for h in expected], atol=TOLERANCE
    )
    assert [o.index for o in result.outputs] == list(range(len(expected)))


@pytest.mark.theorem(
    "With as many beams as tokens, two tokens are searched exhaustively", source="definition"
)
def test_exact_all_beams_find_the_best_output():
    request = Request([1, 2], 2, n=8, beam=True, ignore_eos=True, length_penalty=0.0)
    engine = Engine(served_model(9), num_blocks=40, block_size=2)
    name = engine.submit(request)
    best = engine.run()[name].outputs[0]
    scores = {}
    for a in range(9):
        first = float(log_probabilities(last_logits((1, 2), 9))[a])
        for b in range(9):
            scores[a, b] = first + float(log_probabilities(last_logits((1, 2, a), 9))[b])
    assert tuple(best.tokens) == max(scores, key=lambda pair: scores[pair])
    assert best.score == pytest.approx(max(scores.values()), abs=TOLERANCE)


def test_beams_share_the_blocks_of_their_prompt_and_copy_a_partial_one_at_most():
    prompt = [1, 2, 3, 4, 6, 7]
    n = 4
    longest = 5
    engine = Engine(served_model(), num_blocks=60, block_size=4, prefix_cache=None)
    engine.submit(Request(prompt, longest, n=n, beam=True, ignore_eos=True))
    copies: list[int] = []
    engine.on_plan = lambda plan: copies.append(len(plan.copies))
    engine.run()
    assert max(copies) <= n
    assert engine.copied_blocks > 0
    assert engine.peak_blocks <= 1 + 2 * n  # the first block once; apart they would need 3 each
    assert engine.used_blocks == 0


@pytest.mark.theorem(
    "Beams own one block for every distinct full block of tokens, and each the one that it writes",
    source="Kwon et al. 2023, section 4.4",
)
@given(
    prompt=st.lists(st.integers(0, 8), min_size=1, max_size=5),
    n=st.integers(1, 4),
    size=st.integers(1, 3),
    longest=st.integers(2, 6),
)
def test_conservation_a_block_for_each_prefix_and_none_for_dropped_beams(prompt, n, size, longest):
    engine = Engine(
        served_model(9), num_blocks=n * (len(prompt) + longest), block_size=size, prefix_cache=None
    )

    def look(plan: Plan) -> None:
        texts = {sequence.key: tuple(sequence.tokens) for sequence in engine.scheduler.running}
        assert texts.keys() == {item.key for item in plan.items}
        full = {
            texts[item.key][:end]
            for item in plan.items
            for end in range(size, item.start + 1, size)
        }
        written = sum(
            -(-(item.start + item.count) // size) - item.start // size for item in plan.items
        )
        assert engine.used_blocks == len(full) + written

    engine.on_plan = look
    engine.submit(Request(prompt, longest, n=n, beam=True))
    engine.run()
    assert engine.used_blocks == 0


def test_a_search_that_is_settled_frees_its_blocks_while_others_run():
    engine = Engine(served_model(9), num_blocks=60, block_size=2, prefix_cache=None)
    prompts = [[a, b] for a in range(9) for b in range(9)]
    request = next(
        r
        for r in (
            Request(p, 40, n=2, beam=True, length_penalty=0.0, request_id="search") for p in prompts
        )
        if naive_search(r, frozenset([END]), network(r), early=True)[1] < 20
    )
    _, length, _ = naive_search(request, frozenset([END]), network(request), early=True)
    engine.submit(request)
    engine.submit(Request([1], 40, ignore_eos=True))
    for _ in range(length):
        assert "search" not in engine.results
        engine.step()
    assert "search" in engine.results
    assert engine.used_blocks == -(-length // 2)  # the other one's, as far as it is computed
