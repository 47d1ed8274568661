"""Speculative generation: the output distribution by enumeration, greedy output itself, the
caches.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import enumeration
from drafting import PROMPT, SMALL, output_distribution, random_model, use_exact_draws
from enumeration import exact_distribution, largest_difference
from networks import EPS
from refllm.api import Model, load
from refllm.corpus import held_out_documents
from refllm.decode.generate import generate_tokens
from refllm.decode.logits_processors import LogitsProcessors
from refllm.decode.penalties import apply_repetition_penalty
from refllm.decode.sampling import process_logits
from refllm.decode.sampling_params import GREEDY, SamplingParams
from refllm.decode.speculative import loop as module
from refllm.decode.speculative import verification
from refllm.decode.speculative.cascade import Cascade
from refllm.decode.speculative.control_drafters import AdversarialDrafter, PerfectDrafter
from refllm.decode.speculative.interface import Proposal, TreeProposal
from refllm.decode.speculative.jacobi_drafter import JacobiDrafter
from refllm.decode.speculative.loop import speculate, verify_proposal, verify_tree_proposal
from refllm.decode.speculative.model_drafter import ModelDrafter
from refllm.decode.speculative.ngram_drafter import NGramDrafter
from refllm.decode.speculative.tree import Tree
from refllm.decode.speculative.tree_drafter import TreeDrafter
from refllm.decode.speculative.verification import verify_block
from refllm.kv.contiguous import ContiguousCache, ContiguousPolicy
from refllm.model.llama import forward
from strategies import seeds


def no_token_twice(output: list[int], z: Any) -> Any:
    """No token follows itself; another text than that fails."""
    if any(map(int.__eq__, output, output[1:])):
        raise ValueError("no such text")
    z[output[-1:]] = -np.inf
    return z


WAYS = {
    "plain": SamplingParams(temperature=1.0),
    "filtered": SamplingParams(temperature=0.7, top_k=2),
    "penalised": SamplingParams(temperature=1.0, repetition_penalty=1.7),
    "processed": SamplingParams(
        temperature=1.0,
        presence_penalty=0.7,
        frequency_penalty=-0.4,
        logit_bias={0: 0.5, 2: -0.5},
        bad_words=[(0, 2), (2, 2, 1)],
        logits_processors=[lambda output, z: z * (1 + 0.5 * len(output))],
    ),
    "failing after drafts that are not accepted": SamplingParams(
        temperature=1.0, logits_processors=[no_token_twice]
    ),
}
LIMITS = {"processed": (2, frozenset([1]))}  # min_tokens, end tokens
DRAFTERS = {
    "model": lambda target: ModelDrafter(random_model(SMALL, 9), 2),
    "a model with its own sampling parameters": lambda target: ModelDrafter(
        random_model(SMALL, 9), 2, sampling=SamplingParams(0.5, top_k=2)
    ),
    "a model that stops": lambda target: ModelDrafter(random_model(SMALL, 9), 2, confidence=0.5),
    "n-gram": lambda target: NGramDrafter(2, shortest=1),
    "a tree that is a chain": lambda target: TreeDrafter(random_model(SMALL, 9), 2, confidence=0.0),
    "a tree that fans out": lambda target: TreeDrafter(random_model(SMALL, 9), 2, confidence=0.99),
    "n-gram, else a tree": lambda target: Cascade(
        NGramDrafter(2), TreeDrafter(random_model(SMALL, 9), 2, confidence=0.99)
    ),
    "Jacobi": lambda target: JacobiDrafter(2),
    "perfect": lambda target: PerfectDrafter(target, 2),
    "adversary": lambda target: AdversarialDrafter(target, 2),
}


@pytest.mark.theorem(
    "Speculative generation has the output distribution of plain generation, whatever the "
    "drafts, with penalties, biases, bad words, min_tokens, filters and a user's own processor",
    source=(
        "Leviathan et al. 2023, theorem of section 2.3; by enumeration of every uniform of "
        "a real network"
    ),
)
@pytest.mark.parametrize("sampling", WAYS)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_the_output_distribution_is_that_of_plain_generation(sampling, drafter, monkeypatch):
    use_exact_draws(monkeypatch)
    monkeypatch.setattr(
        module,
        "choose_tokens",
        lambda z, sampling, rng: [
            enumeration.draw(  # the prefill's token
                process_logits(z, sampling.temperature, sampling.top_k, sampling.top_p)[0],
                rng.random(),
            )
        ],
    )
    target = random_model(SMALL, 4)
    length = 4 if drafter == "model" and sampling == "plain" else 3
    rules = (
        [verification.verify, verify_block]
        if (sampling, drafter) == ("plain", "model")
        else [verification.verify]
    )
    limits = LIMITS.get(sampling, ())
    for rule in rules:

        def run(rng, rule=rule):
            steps = speculate(
                target.weights,
                SMALL,
                PROMPT,
                length,
                WAYS[sampling],
                rng,
                DRAFTERS[drafter](target),
                rule,
                processors=LogitsProcessors(WAYS[sampling], *limits),
            )
            return tuple(t for step in steps for t in step.tokens)

        # each probability is a product of four, each of them a network's, which agree
        # within 1e-13 in any batch
        assert (
            largest_difference(
                exact_distribution(run),
                output_distribution(target, WAYS[sampling], length, *limits),
            )
            <= 1e-11
        )


@pytest.fixture(scope="module")
def models() -> tuple[Model, Model]:
    return load("stdlib", dtype="float64"), load("stdlib-draft", dtype="float64")


def prompts(model: Model, count: int, length: int = 60) -> list[list[int]]:
    documents = held_out_documents()
    return [
        model.tokenizer.encode(documents[i % len(documents)].text)[:length] for i in range(count)
    ]


@pytest.mark.theorem(
    "At temperature 0 the output is plain greedy output, token for token, on the bundled model "
    "in float64",
    source="Leviathan et al. 2023, section 2.2",
)
@pytest.mark.parametrize(
    "kind",
    ["model", "confident", "n-gram", "Jacobi", "perfect", "adversary", "tree", "fan", "cascade"],
)
def test_greedy_output_is_the_same_on_the_bundled_model(models, kind):
    target, draft = models
    drafter = {
        "model": lambda: ModelDrafter(draft, 3),
        "confident": lambda: ModelDrafter(draft, 6, confidence=0.3),
        "n-gram": lambda: NGramDrafter(6),
        "Jacobi": lambda: JacobiDrafter(3),
        "perfect": lambda: PerfectDrafter(target, 3),
        "adversary": lambda: AdversarialDrafter(target, 3),
        "tree": lambda: TreeDrafter(draft, 5),
        "fan": lambda: TreeDrafter(draft, 3, confidence=0.99),
        "cascade": lambda: Cascade(NGramDrafter(4), TreeDrafter(draft)),
    }[kind]()
    for prompt in prompts(target, 1 + (kind == "model")):
        plain = target.generate(prompt, 32, ignore_eos=True)
        steps = list(
            speculate(
                target.weights, target.config, prompt, 32, GREEDY, np.random.default_rng(0), drafter
            )
        )
        assert [t for step in steps for t in step.tokens] == plain
        accepted = sum(s.accepted for s in steps)
        proposed = sum(len(s.drafts) for s in steps)
        if kind == "perfect":
            assert accepted == proposed > 0
        if kind == "adversary":
            assert accepted == 0 < proposed


@pytest.mark.theorem(
    "After every step the target's cache holds the keys and values of the sequence, and what a "
    "fresh forward writes",
    source="rollback is a length that is lower",
)
@pytest.mark.parametrize("kind", [ModelDrafter, TreeDrafter])
def test_the_cache_after_verification_is_that_of_the_sequence(models, kind):
    target, draft = models
    kept = []

    class Kept(ContiguousPolicy):
        def new_cache(self, *args, **kwargs):
            kept.append(super().new_cache(*args, **kwargs))
            return kept[-1]

    [prompt] = prompts(target, 1)
    text = list(prompt)
    drafter = kind(draft, 4)
    for step in speculate(
        target.weights,
        target.config,
        prompt,
        24,
        SamplingParams(0.9),
        np.random.default_rng(3),
        drafter,
        policy=Kept(),
    ):
        [cache] = kept
        text += step.tokens
        # the token that was just emitted has no keys and values yet
        assert cache.lengths == [len(text) - 1]
    fresh = ContiguousCache(target.config, 1, len(text), like=target.weights["norm"])
    ids = np.asarray(text[: cache.lengths[0]])
    forward(target.weights, target.config, ids, np.arange(len(ids)), fresh.view([len(ids)]))
    for mine, theirs in (
        (cache.keys, fresh.keys[..., : len(ids)]),
        (cache.values, fresh.values[..., : len(ids), :]),
    ):
        mine = mine[..., : len(ids)] if mine.shape[3] == 64 else mine[..., : len(ids), :]
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-10 * abs(theirs).max())


@given(length=st.integers(0, 9), gamma=st.integers(1, 12))
def test_the_length_is_as_requested(length, gamma):
    target = random_model(SMALL, 4)
    plain = [
        t
        for (t,) in generate_tokens(
            target.weights, SMALL, [PROMPT], length, GREEDY, np.random.default_rng(0)
        )
    ]
    for drafter in (PerfectDrafter(target, gamma), JacobiDrafter(gamma)):
        steps = list(
            speculate(
                target.weights, SMALL, PROMPT, length, GREEDY, np.random.default_rng(0), drafter
            )
        )
        assert [t for step in steps for t in step.tokens] == plain
        assert all(len(step.drafts) <= gamma for step in steps)


def test_the_api_takes_a_drafter_for_text_and_tokens(models):
    target, draft = models
    text = "class Stack:\n    def push(self, item):\n"
    steps = []
    plain = target.generate(text, 30)
    assert target.generate(text, 30, drafter=ModelDrafter(draft)) == plain
    assert target.generate(text, 30, drafter=draft) == plain  # a model drafts for itself
    assert "".join(target.stream(text, 30, drafter=NGramDrafter(), on_step=steps.append)) == plain
    assert sum(len(step.tokens) for step in steps) == 30
    ids = target.tokenizer.encode(text, special=True)
    assert target.generate(ids, 30, drafter=draft) == target.generate(ids, 30)
    stopped = target.generate(text, 30, stop=plain[5:9])
    assert target.generate(text, 30, stop=plain[5:9], drafter=PerfectDrafter(target, 8)) == stopped


def test_an_end_token_among_accepted_drafts_ends_the_output():
    target = random_model(SMALL, 4)
    plain = [
        t
        for (t,) in generate_tokens(
            target.weights, SMALL, [PROMPT], 8, GREEDY, np.random.default_rng(0)
        )
    ]
    from dataclasses import replace

    model = Model(replace(SMALL, eos_token_ids=(plain[4],)), target.weights, target.tokenizer)
    drafter = PerfectDrafter(target, 8)
    assert model.generate(PROMPT, 8, drafter=drafter) == plain[: plain.index(plain[4])]
    assert model.generate(PROMPT, 8, drafter=drafter, ignore_eos=True) == plain


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1e-9])
@pytest.mark.parametrize("last", [1, 2, 4])
def test_a_processor_that_fails_fails_after_the_tokens_before_it(last, temperature, tree):
    """All drafts are accepted, those behind the failure too: they are not part of the output."""

    def fails(output: list[int], z: Any) -> Any:
        if len(output) >= last:
            raise ValueError("no such text")
        return z

    target = random_model(SMALL, 4)
    plain = [
        t
        for (t,) in generate_tokens(
            target.weights, SMALL, [PROMPT], 8, GREEDY, np.random.default_rng(0)
        )
    ]
    drafter: Any = PerfectDrafter(target, 8)
    if tree:
        drafter = TreeDrafter(target, 5, confidence=0.0)
    sampling = SamplingParams(temperature, logits_processors=[fails])
    found: list[int] = []
    steps = speculate(target.weights, SMALL, PROMPT, 8, sampling, np.random.default_rng(0), drafter)
    with pytest.raises(ValueError, match="no such text"):
        found.extend(token for step in steps for token in step.tokens)
    assert found == plain[:last]


def test_a_draft_model_of_another_vocabulary_is_rejected(models):
    with pytest.raises(ValueError, match="vocabulary of 3 tokens and the target of 4096"):
        models[0].generate("x = ", 4, drafter=ModelDrafter(random_model(SMALL, 1)))


def test_logits_that_are_not_finite_are_rejected():
    z = np.zeros((2, 3))
    z[1, 2] = np.nan
    for sampling in (GREEDY, SamplingParams(1.0)):
        with pytest.raises(ValueError, match="NaN"):
            verify_proposal(z, Proposal([0], None), sampling, np.random.default_rng(0))
        with pytest.raises(ValueError, match="NaN"):
            verify_tree_proposal(
                z, TreeProposal([0], None, Tree.chain(1)), sampling, np.random.default_rng(0)
            )


@settings(max_examples=10)
@given(seed=st.integers(0, 99))
def test_penalties_in_vectorised_rows_are_those_of_each_prefix(seed):
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((4, 9))
    text = rng.integers(0, 9, 3).tolist()
    drafts = rng.integers(0, 9, 3).tolist()
    penalised = LogitsProcessors(SamplingParams(repetition_penalty=1.5))
    for i, row in enumerate(module.processed_logits(z, penalised, text, 2, drafts)):
        seen = np.zeros((1, 9), dtype=bool)
        seen[0, [*text, *drafts[:i]]] = True
        np.testing.assert_allclose(
            row, apply_repetition_penalty(z[i : i + 1], seen, 1.5)[0], rtol=EPS
        )
    assert module.processed_logits(z, LogitsProcessors(GREEDY), text, 2, drafts) is z


@given(seed=seeds, parents=st.sampled_from([[-1, -1, -1], [-1, 0, 0], [-1, 0, -1], [-1, 0, 1]]))
def test_penalties_in_a_tree_are_those_of_each_path(seed, parents):
    rng = np.random.default_rng(seed)
    tree = Tree(parents)
    z = rng.standard_normal((4, 9))
    text = rng.integers(0, 9, 3).tolist()
    nodes = rng.integers(0, 9, 3).tolist()
    penalised = LogitsProcessors(SamplingParams(repetition_penalty=1.5))
    for i, row in enumerate(module.processed_logits(z, penalised, text, 2, nodes, tree)):
        seen = np.zeros((1, 9), dtype=bool)
        seen[0, text + [nodes[a] for a in tree.ancestors(i - 1)]] = True
        np.testing.assert_allclose(
            row, apply_repetition_penalty(z[i : i + 1], seen, 1.5)[0], rtol=EPS
        )
