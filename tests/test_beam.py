"""Beam search in the engine against a search that keeps whole texts and computes each from scratch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.decode.sampling import log_probabilities
from refllm.serve.engine import Engine
from refllm.serve.request import Request
from serving import TOLERANCE, last_logits, served_model

END = 5


def naive_search(request: Request, vocab: int) -> tuple[list[tuple[float, list[int]]], float]:
    """The n best hypotheses, best first, and the smallest difference of scores that decided anything."""
    n, prompt = request.n, tuple(request.prompt)
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    ended: list[tuple[float, list[int]]] = []
    nearest = np.inf
    for length in range(1, request.max_tokens + 1):
        found = []
        for score, text in beams:
            logs = log_probabilities(last_logits(prompt + tuple(text), vocab))
            found += [(score + float(logs[token]), [*text, token]) for token in range(vocab)]
        found.sort(key=lambda c: -c[0])
        scores = np.array([score for score, _ in found[: 2 * n + 1]])
        nearest = min(nearest, float(np.min(scores[:-1] - scores[1:], initial=np.inf)))
        ended += [(score / length**request.length_penalty, text) for score, text in found[:n] if text[-1] == END]
        beams = [(score, text) for score, text in found if text[-1] != END][:n]
    ended += [(score / request.max_tokens**request.length_penalty, text) for score, text in beams]
    return sorted(ended, key=lambda c: -c[0])[:n], nearest


@pytest.mark.theorem(
    "Beams that share blocks, stop early and are preempted find what a search over whole texts finds",
    source="Kwon et al. 2023, section 4.4",
)
@given(
    prompt=st.lists(st.integers(0, 8), min_size=1, max_size=6), longest=st.integers(1, 6), n=st.integers(1, 4),
    penalty=st.sampled_from([0.0, 1.0, 2.0]), size=st.integers(1, 4), seed=st.integers(0, 9),
)  # fmt: skip
def test_oracle_the_search_finds_what_a_naive_one_finds(prompt, longest, n, penalty, size, seed):
    request = Request(prompt, longest, n=n, beam=True, length_penalty=penalty)
    blocks = -(-request.longest // size) * n  # not one more than the search may need: others preempt it
    engine = Engine(served_model(9), num_blocks=blocks + seed, block_size=size, poison=True,
                    prefix_cache=("hash", "radix", None)[seed % 3], max_batch_tokens=max(n, 4))  # fmt: skip
    others = Request([1], min(request.longest, 3), ignore_eos=True)
    engine.submit(others)
    name = engine.submit(request)
    engine.submit(others)
    engine.step()
    result = engine.run()[name]
    engine.check()
    expected, nearest = naive_search(request, 9)
    if nearest < TOLERANCE:
        return  # a tie: either may win
    assert [o.tokens for o in result.outputs] == [t[:-1] if t[-1] == END else t for _, t in expected]
    np.testing.assert_allclose([o.score for o in result.outputs], [s for s, _ in expected], atol=TOLERANCE)
    assert [o.index for o in result.outputs] == list(range(len(expected)))


@pytest.mark.theorem("With as many beams as tokens, two tokens are searched exhaustively", source="definition")
def test_exact_all_beams_find_the_best_text():
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
    prompt, n, longest = [1, 2, 3, 4, 6, 7], 4, 5
    engine = Engine(served_model(), num_blocks=60, block_size=4, prefix_cache=None)
    engine.submit(Request(prompt, longest, n=n, beam=True, ignore_eos=True))
    copies: list[int] = []
    engine.on_plan = lambda plan: copies.append(len(plan.copies))
    engine.run()
    assert max(copies) <= n
    assert engine.copied_blocks > 0
    assert engine.peak_blocks <= 1 + 2 * n  # the first block once; apart they would need 3 each
    assert engine.used_blocks == 0
