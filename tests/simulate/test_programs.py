"""The programs share what they claim to share, and serve the same under every policy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.decode.sampling_params import SamplingParams
from refllm.simulate import programs
from refllm.simulate.programs import Passages, RandomIds, best_hit_rate, shuffled, zipf


def ids(seed=0):
    return RandomIds(np.random.default_rng(seed), 5000)


def played(program, order=lambda queue: 0):
    """All requests of a program, in an order of serving; the answer to each depends
    on its id alone.
    """
    queue = list(program.requests)
    served = []
    while queue:
        request = queue.pop(order(queue))
        served.append(request)
        queue += program.follow(
            request, [sum(request.request_id) + i for i in range(request.max_tokens)]
        )
    return served


PROGRAMS = {
    "few-shot": lambda: programs.few_shot(ids(), 6),
    "self-consistency": lambda: programs.self_consistency(ids(), 3, samples=4),
    "chat": lambda: programs.chat(ids(), 4, turns=3),
    "tree of thought": lambda: programs.tree_of_thought(ids(), 2, branches=2, depth=3),
    "RAG": lambda: programs.rag(ids(), 12, np.random.default_rng(1), documents=4),
    "unique": lambda: programs.unique(ids(), 6),
}


@pytest.mark.parametrize("name", PROGRAMS)
@given(data=st.data())
def test_a_program_makes_the_same_requests_in_any_order_of_serving(name, data):
    straight = played(PROGRAMS[name]())
    mixed = played(PROGRAMS[name](), lambda queue: data.draw(st.integers(0, len(queue) - 1)))
    assert {r.request_id: r for r in straight} == {r.request_id: r for r in mixed}
    assert PROGRAMS[name]().name == name
    assert len({r.request_id for r in straight}) == len(straight)


@pytest.mark.theorem(
    "Best hit rate = 1 − nodes of the trie of all prompts / tokens asked",
    source="Zheng et al. 2024, theorem 3.1",
)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=8))
def test_best_hit_rate_counts_distinct_prefixes(prompts):
    prefixes = {tuple(p[: i + 1]) for p in prompts for i in range(len(p))}
    assert best_hit_rate(prompts) == 1 - len(prefixes) / sum(map(len, prompts))
    # what an answer has computed need not be read: 3 and 4 here
    prompts = [*prompts, [*prompts[0], 3, 4, 5, 1]]
    prefixes |= {tuple(prompts[-1][: i + 1]) for i in range(len(prompts[-1]))}
    answers = [[3, 4, 5] for _ in prompts]
    assert best_hit_rate(prompts, answers) > best_hit_rate(prompts)
    answered = {
        tuple([*p, *a][:i])
        for p, a in zip(prompts, answers, strict=True)
        for i in range(len(p) + 1, len(p + a))
    }
    assert best_hit_rate(prompts, answers) == 1 - len(prefixes - answered) / sum(map(len, prompts))


def test_shared_prefixes_have_their_closed_form():
    def rate(name):
        return best_hit_rate([r.prompt for r in played(PROGRAMS[name]())])

    assert rate("few-shot") == pytest.approx(1 - (400 + 6 * 40) / (6 * 440), abs=0.002)
    assert rate("self-consistency") == pytest.approx(1 - 1 / 4)
    lengths = [160 + 40 * (t + 1) + 24 * t for t in range(3)]
    assert rate("chat") == pytest.approx(
        1 - (160 + 4 * (lengths[-1] - 160)) / (4 * sum(lengths)), abs=0.002
    )
    nodes = 2 * (200 + sum(2**level * (4 + (24 if level > 1 else 0)) for level in (1, 2, 3)))
    # a thought is shared by the two that follow it
    nodes = 2 * (200 + 2 * 4 + 4 * (24 / 2 + 4) + 8 * (24 / 2 + 4))
    asked = 2 * sum(2**level * (200 + 4 * level + 24 * (level - 1)) for level in (1, 2, 3))
    assert rate("tree of thought") == pytest.approx(1 - nodes / asked, abs=0.01)
    assert rate("unique") <= 0.005  # two may begin with the same token by chance


def test_a_tree_has_all_its_nodes_and_the_answers_stand_in_the_prompts():
    served = played(PROGRAMS["tree of thought"]())
    assert len(served) == 2 * (2 + 4 + 8)
    by_id = {r.request_id: r for r in served}
    for path, request in by_id.items():
        if len(path) > 2:
            above = by_id[path[:-1]]
            assert list(request.prompt[: len(above.prompt)]) == list(above.prompt)
            answered = [sum(above.request_id) + i for i in range(24)]
            assert list(request.prompt[len(above.prompt) :][:24]) == answered


def test_a_conversation_repeats_its_earlier_turns():
    by_id = {r.request_id: r for r in played(PROGRAMS["chat"]())}
    assert len(by_id) == 12
    first = by_id[0, 0]
    second = by_id[0, 1]
    assert list(second.prompt[:200]) == list(first.prompt)
    assert list(second.prompt[200:224]) == list(range(24))
    assert by_id[1, 0].prompt[:160] == first.prompt[:160] != by_id[1, 0].prompt[160:]
    # each turn ends with a message of its own: three turns of four conversations
    assert len({tuple(r.prompt[-40:]) for r in by_id.values()}) == 12


@given(st.integers(1, 40), st.floats(0, 3))
def test_zipf_is_a_distribution_that_falls(count, a):
    p = zipf(count, a)
    assert p.sum() == pytest.approx(1)
    assert np.all(np.diff(p) <= 0)
    np.testing.assert_allclose(p[0] / p, np.arange(1, count + 1) ** a, rtol=1e-12)


def test_popular_documents_are_asked_about_most():
    served = programs.rag(ids(), 400, np.random.default_rng(0), documents=5, a=1.0).requests
    counts = sorted(
        (sum(r.prompt[:400] == d for r in served) for d in {r.prompt[:400] for r in served}),
        reverse=True,
    )
    assert sum(counts) == 400
    p = zipf(5, 1.0)
    assert np.all(np.abs(np.array(counts) - 400 * p) <= 5 * np.sqrt(400 * p * (1 - p)))


@given(
    st.lists(st.integers(0, 99), min_size=1, max_size=20), st.lists(st.integers(0, 30), max_size=6)
)
def test_passages_repeat_the_text_from_its_beginning(text, counts):
    source = Passages(text)
    answered = [t for count in counts for t in source(count)]
    assert answered == (text * (len(answered) // len(text) + 1))[: len(answered)]


def test_random_ids_are_all_but_the_first_of_the_vocabulary():
    assert set(RandomIds(np.random.default_rng(0), 5)(200)) == {1, 2, 3, 4}


DEFAULTS = {  # requests, tokens of the first prompt and of its answer
    "few-shot": (programs.few_shot, 3, 5 * 80 + 40, 4),
    "self-consistency": (programs.self_consistency, 3 * 8, 320, 16),
    "chat": (programs.chat, 3 * 4, 160 + 40, 24),
    "tree of thought": (programs.tree_of_thought, 3 * (3 + 9 + 27), 200 + 4, 24),
    "unique": (programs.unique, 3, 400, 12),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_programs_have_these_sizes_unless_told_otherwise(name):
    make, count, prompt, answer = DEFAULTS[name]
    served = played(make(ids(), 3))
    assert len(served) == count
    assert (len(served[0].prompt), served[0].max_tokens) == (prompt, answer)
    assert {request.max_tokens for request in served} == {answer}
    assert all(request.ignore_eos for request in served)


def test_questions_are_about_twenty_documents_unless_told_otherwise():
    asked = programs.rag(ids(), 2000, np.random.default_rng(0)).requests
    assert {(len(request.prompt), request.max_tokens) for request in asked} == {(432, 12)}
    assert len({request.prompt[:400] for request in asked}) == 20


def test_the_samples_of_a_question_are_drawn_with_seeds_of_their_own():
    asked = programs.self_consistency(ids(), 3, samples=4).requests
    assert sorted(request.seed for request in asked) == list(range(12))
    assert {request.sampling for request in asked} == {SamplingParams(temperature=0.7)}


def test_a_shuffled_program_has_the_same_requests():
    program = PROGRAMS["RAG"]()
    other = shuffled(program, np.random.default_rng(0))
    assert other.requests != program.requests
    assert sorted(r.request_id for r in other.requests) == sorted(
        r.request_id for r in program.requests
    )


def test_a_request_of_another_program_is_rejected():
    with pytest.raises(ValueError, match="not a request of this program"):
        PROGRAMS["chat"]().follow(programs.Request([1], request_id="x"), [2])
    with pytest.raises(ValueError, match="need a text"):
        Passages([])
