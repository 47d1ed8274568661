"""Drafts of constrained sequences: the output distribution by enumeration, and what is proposed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import enumeration
from conftest import to_host
from drafting import PROMPT, SAMPLED, SMALL, random_model, use_exact_draws
from enumeration import exact_distribution, largest_difference
from grammars import (
    GRAMMARS,
    TableGrammar,
    constrained_distribution,
    is_complete,
    random_grammar,
)
from refllm.api import Model
from refllm.decode.constraint import ConstraintStates
from refllm.decode.logits_processors import LogitsProcessors
from refllm.decode.sampling import process_logits
from refllm.decode.sampling_params import SamplingParams
from refllm.decode.speculative import loop as module
from refllm.decode.speculative.cascade import Cascade
from refllm.decode.speculative.constrained import legal_part, masked_logits, propose_legal
from refllm.decode.speculative.control_drafters import AdversarialDrafter, PerfectDrafter
from refllm.decode.speculative.interface import (
    DraftConstraint,
    DraftRequest,
    Proposal,
    TreeProposal,
)
from refllm.decode.speculative.jacobi_drafter import JacobiDrafter
from refllm.decode.speculative.loop import speculate
from refllm.decode.speculative.model_drafter import ModelDrafter
from refllm.decode.speculative.ngram_drafter import NGramDrafter
from refllm.decode.speculative.tree import Tree
from refllm.decode.speculative.tree_drafter import TreeDrafter
from refllm.decode.speculative.verification import verify, verify_block
from strategies import seeds


class Unaware:
    """A drafter of the user that knows nothing of grammars, and draws from a q of its own."""

    def __init__(self, inner: Any):
        self.inner = inner
        self.gamma = inner.gamma
        self.trees = getattr(inner, "trees", False)

    def propose(self, tokens: Any, count: int, sampling: Any, rng: Any) -> Any:
        return self.inner.propose(tokens, count, sampling, rng)

    def observe(self, best: Any, accepted: int) -> None:
        self.inner.observe(best, accepted)


def draft_model() -> Any:
    return random_model(SMALL, 9)


DRAFTERS = {
    "model": lambda target: ModelDrafter(draft_model(), 2),
    "a model with its own sampling": lambda target: ModelDrafter(
        draft_model(), 2, sampling=SamplingParams(0.5, top_k=2)
    ),
    "a model that stops": lambda target: ModelDrafter(draft_model(), 2, confidence=0.5),
    "a model that knows no grammar": lambda target: Unaware(ModelDrafter(draft_model(), 2)),
    "n-gram": lambda target: NGramDrafter(2, shortest=1),
    "a tree that is a chain": lambda target: TreeDrafter(draft_model(), 2, confidence=0.0),
    "a tree that fans out": lambda target: TreeDrafter(draft_model(), 2, confidence=0.99),
    "a tree that knows no grammar": lambda target: Unaware(
        TreeDrafter(draft_model(), 3, confidence=0.6)
    ),
    "n-gram, else a tree": lambda target: Cascade(
        NGramDrafter(2), TreeDrafter(draft_model(), 2, confidence=0.99)
    ),
    "Jacobi": lambda target: JacobiDrafter(2),
    "perfect": lambda target: PerfectDrafter(target, 2),
    "adversary": lambda target: AdversarialDrafter(target, 2),
}


def speculated(
    target: Any,
    grammar: TableGrammar,
    sampling: SamplingParams,
    length: int,
    drafter: Any,
    **more: Any,
) -> Any:
    """A program of ``rng``: the output of speculative generation, up to where it is complete."""

    def run(rng: Any) -> tuple[int, ...]:
        states = ConstraintStates(grammar, 3, grammar.end_tokens)
        steps = speculate(
            target.weights,
            SMALL,
            PROMPT,
            length,
            sampling,
            rng,
            drafter(target),
            processors=LogitsProcessors(sampling, constraint=states),
            **more,
        )
        output: list[int] = []
        for token in (token for step in steps for token in step.tokens):
            output.append(token)
            if is_complete(grammar, output):
                break
        return tuple(output)

    return run


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """All draws follow the intervals of ``enumeration``."""
    use_exact_draws(monkeypatch)

    def first(z: Any, sampling: SamplingParams, rng: Any) -> list[int]:
        p = process_logits(z, sampling.temperature, sampling.top_k)[0]
        return [enumeration.draw(p, rng.random())]

    monkeypatch.setattr(module, "choose_tokens", first)


@pytest.mark.theorem(
    "With a grammar, speculative generation has the distribution of sampling token by token from "
    "the target's masked and renormalised logits, whatever drafts, and whether or not the drafter "
    "knows the grammar; chains and trees",
    source="Leviathan et al. 2023, appendix A.1, for the masked p; by enumeration of every uniform",
)
@pytest.mark.parametrize("grammar", GRAMMARS)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_the_output_distribution_is_that_of_stepwise_masking(grammar, drafter, exact):
    target = random_model(SMALL, 4)
    found = exact_distribution(speculated(target, GRAMMARS[grammar], SAMPLED, 4, DRAFTERS[drafter]))
    expected = constrained_distribution(target, GRAMMARS[grammar], SAMPLED, 4)
    assert set(found) <= set(expected)
    assert largest_difference(found, expected) <= 1e-11


@pytest.mark.parametrize("rule", [verify, verify_block])
@pytest.mark.parametrize("aware", [True, False])
@pytest.mark.parametrize("grammar", GRAMMARS)
def test_both_acceptance_rules_are_lossless_where_drafts_are_cut(grammar, aware, rule, exact):
    """The cut looks at what was drawn; it is lossless since q is restricted with it."""
    target = random_model(SMALL, 7)
    sampling = SamplingParams(temperature=1.3, top_k=2)
    kind = "model" if aware else "a model that knows no grammar"
    run = speculated(target, GRAMMARS[grammar], sampling, 4, DRAFTERS[kind], rule=rule)
    expected = constrained_distribution(target, GRAMMARS[grammar], sampling, 4)
    assert largest_difference(exact_distribution(run), expected) <= 1e-11


@pytest.mark.theorem(
    "At temperature 0 a constrained output does not depend on the drafter",
    source="greedy verification under the same masks",
)
@given(
    seed=seeds, name=st.sampled_from(sorted(DRAFTERS)), ends=st.booleans(), length=st.integers(1, 9)
)
def test_greedy_output_does_not_depend_on_the_drafter(seed, name, ends, length):
    grammar = random_grammar(seed, 3, end_tokens=(1,) if ends else ())
    record = random_model(SMALL, seed % 50)
    config = replace(SMALL, eos_token_ids=(1,)) if ends else SMALL
    model = Model(config, record.weights, record.tokenizer)
    plain = model.generate(PROMPT, length, grammar=grammar, details=True)
    drafted = model.generate(
        PROMPT, length, grammar=grammar, details=True, drafter=DRAFTERS[name](record)
    )
    assert plain == drafted


# --- what is proposed -----------------------------------------------------------------------


def ask_for(grammar: TableGrammar, output: list[int], count: int, sampling: Any = SAMPLED) -> Any:
    """What a drafter is asked for after ``output``."""
    constraint = DraftConstraint(ConstraintStates(grammar, 3, grammar.end_tokens), len(PROMPT))
    rng = np.random.default_rng(len(output))
    return DraftRequest([*PROMPT, *output], count, sampling, rng, 0, constraint)


@pytest.mark.parametrize("name", [n for n in DRAFTERS if n not in ("perfect", "adversary")])
@given(seed=seeds, length=st.integers(0, 4), temperature=st.sampled_from([0.0, 1.0]))
def test_only_legal_drafts_are_proposed_and_q_is_restricted_to_them(
    name, seed, length, temperature
):
    grammar = random_grammar(seed, 3, end_tokens=(1,))
    rng = np.random.default_rng(seed)
    output: list[int] = []
    for _ in range(length):
        legal = np.flatnonzero(grammar.mask(grammar.reads(output)))
        if len(legal):
            output.append(int(rng.choice(legal)))
    proposal = propose_legal(
        DRAFTERS[name](random_model(SMALL, 4)),
        ask_for(grammar, output, 2, SamplingParams(temperature)),
    )
    tree = proposal.tree if isinstance(proposal, TreeProposal) else Tree.chain(len(proposal.tokens))
    for node, token in enumerate(proposal.tokens):
        above = [proposal.tokens[i] for i in tree.ancestors(tree.parents[node])]
        assert grammar.reads([*output, *above, token]) is not False
        if proposal.q is not None:
            row = tree.parents[node] + 1 if isinstance(proposal, TreeProposal) else node
            q = to_host(proposal.q)[row]
            assert (q[~grammar.mask(grammar.reads([*output, *above]))] == 0).all()
            assert abs(q.sum() - 1) < 1e-12


def test_a_chain_is_cut_at_the_first_illegal_draft():
    grammar = TableGrammar([{0: 1}, {1: 2}, {2: 0}], [0], 3)
    request = ask_for(grammar, [], 5)
    assert legal_part(Proposal([0, 1, 0, 0], None), request) == Proposal([0, 1], None)
    assert legal_part(Proposal([2, 1], None), request) == Proposal([], None)
    whole = Proposal([0, 1, 2], None)
    assert legal_part(whole, request) is whole
    q = np.full((2, 3), 1 / 3)
    found = legal_part(Proposal([0, 2], q), request)
    assert found.tokens == [0]
    assert found.q.tolist() == [[1.0, 0.0, 0.0]]
    assert legal_part(whole, request._replace(constraint=None)) is whole


def test_a_tree_loses_its_illegal_nodes_and_what_hangs_below_them():
    grammar = TableGrammar([{0: 1, 1: 1}, {1: 0}], [0], 3)
    request = ask_for(grammar, [], 5)
    tree = Tree([-1, -1, 0, 1, 1, 3])
    tokens = [2, 0, 1, 0, 1, 1]  # 2 is illegal, and so is 0 after 0; 1 after 0 is not
    found = legal_part(TreeProposal(tokens, None, tree), request)
    assert (found.tokens, found.tree.parents) == ([0, 1], [-1, 0])
    q = np.full((7, 3), 1 / 3)
    found = legal_part(TreeProposal(tokens, q, tree), request)
    assert found.q[:2].tolist() == [[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]]
    assert found.q.shape == (3, 3)
    assert not legal_part(TreeProposal([2], None, Tree([-1])), request).tokens
    kept = TreeProposal([0, 1], None, Tree([-1, -1]))
    assert legal_part(kept, request) is kept


def test_a_draft_model_stops_where_no_token_may_follow():
    grammar = TableGrammar([{0: 1}, {2: 2}, {}], [2], 3)
    for temperature in (0.0, 1.0):
        request = ask_for(grammar, [], 2, SamplingParams(temperature))._replace(max_drafts=5)
        for drafter in (ModelDrafter(draft_model(), 5), TreeDrafter(draft_model(), 5)):
            proposal = propose_legal(drafter, request)
            assert proposal.tokens == [0, 2]
            if temperature:  # exactly one token is legal: it has probability 1
                rows = to_host(proposal.q)[:2]
                assert rows.tolist() == [[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]


def test_masked_logits(xp):
    z = masked_logits(xp.asarray([1.0, 2.0, 3.0], dtype=xp.float32), np.array([True, False, True]))
    assert to_host(z).tolist() == [1.0, -np.inf, 3.0]
    assert z.dtype == xp.float32


def test_drafts_of_a_grammar_are_accepted():
    """Where the grammar leaves one token, a draft is that token, and saves a step."""
    grammar = TableGrammar([{0: 1}, {1: 2}, {2: 3}, {0: 4}, {}], [4], 3)
    record = random_model(SMALL, 4)
    steps: list[Any] = []
    model = Model(SMALL, record.weights, record.tokenizer)
    found = "".join(
        model.stream(
            PROMPT,
            9,
            grammar=grammar,
            drafter=ModelDrafter(draft_model(), 4),
            on_step=steps.append,
            temperature=1.0,
            rng=0,
        )
    )
    assert [token for step in steps for token in step.tokens][:4] == [0, 1, 2, 0]
    # nothing follows the last draft, so it counts as the token after the other two
    assert [step.accepted for step in steps] == [0, 2]
    assert found == model.generate(PROMPT, 9, grammar=grammar, details=True).text
