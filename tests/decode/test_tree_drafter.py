"""Trees of a draft model: their shape, what their children were drawn from, and drafters
asked in turn.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drafting import SAMPLED, SMALL, next_logits, random_model, use_exact_draws
from enumeration import exact_distribution
from networks import EPS, NETWORKS
from refllm.api import load
from refllm.decode.sampling import process_logits
from refllm.decode.sampling_params import GREEDY, SamplingParams
from refllm.decode.speculative.acceptance import Acceptance
from refllm.decode.speculative.cascade import Cascade, check_drafter
from refllm.decode.speculative.interface import NO_DRAFTS, TreeProposal
from refllm.decode.speculative.loop import verify_tree_proposal
from refllm.decode.speculative.model_drafter import ModelDrafter
from refllm.decode.speculative.ngram_drafter import NGramDrafter
from refllm.decode.speculative.tree import Tree
from refllm.decode.speculative.tree_drafter import TreeDrafter
from refllm.serve.engine import Engine
from refllm.serve.request import Request
from strategies import seeds


def draw(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def below(tree, tokens, node):
    """The tokens of the path down to a node."""
    return [tokens[a] for a in tree.ancestors(node)] if node >= 0 else []


@pytest.mark.theorem(
    "A tree is a chain as long as the draft is confident, and below it a fan of all nodes that "
    "are left; no node is wasted",
    source=(
        "definition of TreeDrafter; Li et al. 2024 (EAGLE-2), section 3.1: the draft's "
        "probability tells acceptance"
    ),
)
@given(
    seed=seeds,
    gamma=st.integers(1, 5),
    confidence=st.floats(0, 0.99),
    temperature=st.sampled_from([0.0, 1.0, 0.6]),
)
def test_a_chain_where_it_is_confident_and_a_fan_where_it_is_not(
    seed, gamma, confidence, temperature
):
    sampling = SamplingParams(temperature)
    model = random_model(NETWORKS["llama"], seed % 5)
    text = [0, 1]
    proposal = TreeDrafter(model, gamma, confidence=confidence).propose(
        text, gamma, sampling, draw(seed)
    )
    tree = proposal.tree
    tokens = proposal.tokens
    assert len(tree) == len(tokens) == gamma
    assert (proposal.q is None) == (temperature == 0)
    node = -1
    for row, children in enumerate(tree.children):
        if not children:
            continue
        assert row == node + 1  # only a single child is continued
        z = next_logits(model, [*text, *below(tree, tokens, node)])
        q = process_logits(z, temperature or 1.0)
        left = gamma - children[0]
        if abs(float(q.max()) - confidence) > 1e-12:
            assert len(children) == (left if q.max() < confidence else 1)
        if temperature == 0:
            assert [tokens[c] for c in children] == np.argsort(-z, kind="stable")[
                : len(children)
            ].tolist()
        else:
            np.testing.assert_allclose(proposal.q[row], q, rtol=0, atol=1e-12)
            assert len({tokens[c] for c in children}) == len(children)
        node = children[0]


@pytest.mark.theorem(
    "Children are drawn from the row of q that is returned for them, one after another, without"
    " replacement",
    source="Chen et al. 2024, algorithm 2",
)
@pytest.mark.parametrize("confidence", [0.0, 0.99])
def test_the_returned_rows_are_what_the_children_were_drawn_from(confidence, monkeypatch):
    use_exact_draws(monkeypatch)
    drafter = TreeDrafter(random_model(SMALL, 1), 2, confidence=confidence)
    rows = {}

    def run(rng):
        proposal = drafter.propose([0, 1], 2, SAMPLED, rng)
        rows[tuple(proposal.tokens)] = proposal
        return tuple(proposal.tokens)

    for (first, second), chance in exact_distribution(run).items():
        proposal = rows[first, second]
        q = proposal.q
        if confidence:  # a fan: the second from what the first left
            expected = q[0, first] * q[0, second] / (1 - q[0, first])
            assert proposal.tree.parents == [-1, -1]
        else:
            expected = q[0, first] * q[1, second]
            assert proposal.tree.parents == [-1, 0]
        assert chance == pytest.approx(expected, abs=64 * EPS)
        np.testing.assert_allclose(
            q[0], process_logits(next_logits(drafter.model, [0, 1])), rtol=0, atol=1e-12
        )


def test_trees_end_with_the_positions_and_the_vocabulary():
    model = random_model(SMALL, 1)  # 32 positions, 3 tokens
    for sampling in (GREEDY, SAMPLED):
        assert (
            len(
                TreeDrafter(model, 4, confidence=0.0).propose([0] * 30, 4, sampling, draw(0)).tokens
            )
            == 2
        )
        assert TreeDrafter(model, 4).propose([0] * 32, 4, sampling, draw(0)).tokens == []
        assert TreeDrafter(model, 4).propose([0], 0, sampling, draw(0)) == NO_DRAFTS
        wide = TreeDrafter(model, 7, confidence=0.99).propose([0, 1], 7, sampling, draw(0))
        assert sorted(wide.tokens) == [0, 1, 2]  # as many children as there are tokens


def test_the_cache_of_a_tree_continues_with_the_sequence():
    drafter = TreeDrafter(random_model(SMALL, 1), 3, confidence=0.0)
    rng = draw(0)
    first = drafter.propose([0, 1], 3, GREEDY, rng).tokens
    assert drafter.computed == 2 + 2
    again = drafter.propose([0, 1, *first, 2], 3, GREEDY, rng)
    assert drafter.computed == 4 + 2 + 2
    anew = TreeDrafter(random_model(SMALL, 1), 3, confidence=0.0).propose(
        [0, 1, *first, 2], 3, GREEDY, rng
    )
    assert (again.tokens, again.tree.parents) == (anew.tokens, anew.tree.parents)


def test_a_cascade_takes_the_first_proposal_and_informs_its_drafter():
    observed = []

    class Recorder(NGramDrafter):
        def observe(self, best, accepted):
            observed.append((self.gamma, accepted))

    model = ModelDrafter(random_model(SMALL, 1), 3)
    cascade = Cascade(Recorder(2, shortest=2), Recorder(9, longest=1, shortest=1), model)
    assert cascade.gamma == 9
    for text, count, made, by in (
        ([0, 1, 2, 0, 1], 5, [2, 0], 2),
        ([0, 1, 2, 2], 5, [2] * 5, 9),
        ([1, 2, 0], 2, None, None),
    ):
        proposal = cascade.propose(text, count, GREEDY, draw(0))
        expected = model.propose(text, count, GREEDY, draw(0)).tokens if made is None else made
        assert proposal.tokens == expected
        cascade.observe([0], 1)
        assert observed[-1:] == ([(by, 1)] if by else observed[-1:])
    assert len(observed) == 2
    for wrong in ((), (NGramDrafter(), "ngram")):
        with pytest.raises(ValueError, match="needs drafters, such as"):
            Cascade(*wrong)


def test_a_model_within_a_cascade_must_share_the_vocabulary():
    target = random_model(NETWORKS["llama"], 1)
    check_drafter(target, Cascade(NGramDrafter(), TreeDrafter(target)))
    with pytest.raises(ValueError, match="vocabulary of 3 tokens"):
        check_drafter(target, Cascade(NGramDrafter(), ModelDrafter(random_model(SMALL, 1))))
    with pytest.raises(TypeError, match="a drafter is"):
        check_drafter(target, "ngram")


def test_a_request_whose_drafter_grows_trees_ends_with_the_sentence_that_says_so():
    model = load("stdlib")
    draft = load("stdlib-draft")
    engine = Engine(model, num_blocks=16, drafter=lambda: TreeDrafter(draft))
    engine.submit(Request(model.tokenizer.encode("import os"), 6, request_id="a"))
    output = engine.run()["a"]
    assert output.outputs[0].finish_reason == "error"
    assert "the engine verifies chains" in output.error
    engine.check()


def test_of_a_tree_the_verified_levels_are_counted():
    fan = Tree([-1, -1, -1, 0])
    rows = np.eye(6)
    nodes = [1, 2, 3, 4]
    for best, kept, judged in (
        ([5, 0, 0, 0, 0], [], 1),
        ([3, 0, 0, 0, 0], [3], 1),
        ([1, 5, 0, 0, 0], [1], 2),
        ([1, 4, 0, 0, 0], [1, 4], 2),
    ):
        step, path = verify_tree_proposal(
            rows[best], TreeProposal(nodes, None, fan), GREEDY, draw(0)
        )
        assert [nodes[node] for node in path] == kept == step.drafts[: step.accepted]
        assert sorted(step.drafts) == nodes
        assert step.token == best[path[-1] + 1 if path else 0]
        assert step.judged == judged
        stats = Acceptance()
        stats.add(len(step.drafts), step.accepted, step.judged)
        assert (stats.judged, stats.proposed, stats.length) == (judged, 4, 1 + len(kept))


def test_the_rest_of_q_may_be_too_small_to_draw_from():
    model = random_model(SMALL, 33)
    z = next_logits(model, [0, 2])
    # e^−750: the second token has almost no probability
    sampling = SamplingParams(float(np.sort(z)[-1] - np.sort(z)[-2]) / 750)
    proposal = TreeDrafter(model, 3, confidence=0.99).propose([0, 2], 3, sampling, draw(0))
    assert proposal.tokens[0] == int(z.argmax())
