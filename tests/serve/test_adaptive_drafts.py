"""Drafting in the engine: the same tokens whatever is drafted; invariants of scheduler and
caches hold after every step.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import enumeration
from drafting import PROMPT, SMALL, output_distribution, random_model, use_exact_draws
from enumeration import exact_distribution, largest_difference
from networks import NETWORKS
from refllm.api import load
from refllm.corpus import held_out_documents
from refllm.decode.sampling_params import GREEDY, SamplingParams
from refllm.decode.speculative.acceptance import Acceptance, expected_length
from refllm.decode.speculative.control_drafters import AdversarialDrafter, PerfectDrafter
from refllm.decode.speculative.interface import NO_DRAFTS, DraftRequest
from refllm.decode.speculative.jacobi_drafter import JacobiDrafter
from refllm.decode.speculative.model_drafter import ModelDrafter
from refllm.decode.speculative.ngram_drafter import NGramDrafter
from refllm.decode.speculative.tree_drafter import TreeDrafter
from refllm.kv.contiguous import ContiguousCache
from refllm.model.llama import forward
from refllm.serve import model_runner
from refllm.serve.adaptive_drafts import MARGIN, PRIOR, PROBE, AdaptiveDrafting
from refllm.serve.draft_costs import Costs, measure_costs
from refllm.serve.engine import Engine
from refllm.serve.request import Request

CONFIG = NETWORKS["llama"]
TARGET = random_model(CONFIG, 1)
DRAFT = random_model(CONFIG, 2)
KINDS = {
    "n-gram": lambda: AdaptiveDrafting(lambda: NGramDrafter(4, shortest=1)),
    "Jacobi": lambda: AdaptiveDrafting(lambda: JacobiDrafter(3)),
    "model": lambda: AdaptiveDrafting(
        ModelDrafter(DRAFT, 3, sampling=GREEDY, sequences=2)
    ),  # fewer caches than sequences
    "perfect": lambda: AdaptiveDrafting(PerfectDrafter(TARGET, 3, sampling=GREEDY, sequences=8)),
    "adversary": lambda: AdaptiveDrafting(AdversarialDrafter(TARGET, 3, sequences=8)),
}


def requests(seed: int, count: int, sampled: bool) -> list[Request]:
    rng = np.random.default_rng(seed)
    shared = rng.integers(0, 300, 9).tolist()
    out = []
    for i in range(count):
        prompt = shared[: rng.integers(1, 10)] + rng.integers(0, 300, rng.integers(1, 8)).tolist()
        options = {}
        if sampled and i % 2:
            options |= {"temperature": 0.8, "top_k": 20, "seed": 100 + i}
        if i % 3 == 2:
            options["repetition_penalty"] = 1.3
        out.append(Request(prompt * (1 + i % 2), int(rng.integers(1, 14)), request_id=i, **options))
    return out


def served(drafter, asked, each_step=None, **options):
    """Tokens and reasons of all, and the engine."""
    settings_ = {"num_blocks": 24, "block_size": 4, "seed": 0, "poison": True, **options}
    engine = Engine(TARGET, drafter=drafter, **settings_)
    for request in asked:
        engine.submit(request)
    results = {}
    while engine.unfinished:
        engine.step()
        engine.check()
        if each_step is not None:
            each_step(engine)
        results |= engine.results
        engine.results = {}
    return {name: (r.tokens, r.text, r.finish_reason) for name, r in results.items()}, engine


@pytest.mark.theorem(
    "With one-hot drafts each request gets the tokens that it gets without, greedy and sampled,"
    " in a ragged batch of paged memory, with preemption, prefix caches, chunks and drafts of "
    "any quality",
    source="draft i stands if it is what place i draws",
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache", [None, "hash", "radix"])
@settings(max_examples=1)
@given(seed=st.integers(0, 999), blocks=st.integers(10, 24), budget=st.integers(4, 40))
def test_tokens_are_those_without_drafts(kind, cache, seed, blocks, budget):
    asked = requests(seed, 4, sampled=True)
    options = {"prefix_cache": cache, "max_batch_tokens": budget, "num_blocks": blocks}
    plain, _ = served(None, asked, **options)
    found, engine = served(KINDS[kind](), asked, **options)
    assert found == plain
    assert engine.used_blocks == 0


def test_preemption_drafts_and_forgotten_caches_all_occur():
    """The cases of the test above have all of these."""
    asked = requests(3, 6, sampled=False)
    drafting = KINDS["perfect"]()
    found, engine = served(drafting, asked, num_blocks=12, prefix_cache=None)
    plain, slow = served(None, asked, num_blocks=12, prefix_cache=None)
    assert found == plain
    assert engine.preemptions > 0
    assert drafting.stats.accepted > 10
    assert drafting.stats.rate > 0.8  # a penalty of one request is unknown to the drafter
    assert engine.steps < slow.steps
    wrong = KINDS["adversary"]()
    served(wrong, asked)
    assert wrong.stats.accepted == 0 < wrong.stats.proposed


@pytest.mark.theorem(
    "Keys and values in the blocks of a sequence are those of its verified tokens, and the "
    "prefix caches hold no others",
    source="Kwon et al. 2023, section 4.3; vLLM: only verified tokens are hashed",
)
@pytest.mark.parametrize("kind", ["model", "adversary"])
@pytest.mark.parametrize("cache", ["hash", "radix"])
def test_caches_hold_verified_tokens_only(kind, cache):
    texts: list[list[int]] = []

    def right(engine, tokens, slots):
        fresh = ContiguousCache(CONFIG, 1, len(tokens), like=TARGET.weights["norm"])
        ids = np.asarray(tokens)
        forward(TARGET.weights, CONFIG, ids, np.arange(len(ids)), fresh.view([len(ids)]))
        mine = engine.cache.keys[:, slots].transpose(0, 2, 3, 1)  # [L, G, D, S]
        np.testing.assert_allclose(
            mine, fresh.keys[:, 0], rtol=0, atol=1e-9 * abs(fresh.keys).max()
        )

    def look(engine):
        for sequence in engine.scheduler.running:
            if sequence.computed:
                blocks = engine.scheduler.memory.blocks(sequence)
                slots = [blocks[p // 4] * 4 + p % 4 for p in range(sequence.computed)]
                right(engine, sequence.tokens[: sequence.computed], slots)
            texts[:] = [
                t for t in texts if t[: len(sequence.tokens)] != sequence.tokens[: len(t)]
            ] + [list(sequence.tokens)]

    asked = requests(5, 3, sampled=False)
    _, engine = served(KINDS[kind](), asked, look, prefix_cache=cache, num_blocks=60)
    memory = engine.scheduler.memory
    found = 0
    for text in texts:  # what a later request would find for the text of an earlier one
        if cache == "radix":
            slots = memory.cache.match(text, record=False).slots
        else:
            blocks = memory.cache.match([*text, 0], keys=[])
            slots = [b * 4 + i for b in blocks for i in range(4)]
        found += len(slots)
        if slots:
            right(engine, text[: len(slots)], slots)
    assert found > 0


def test_greedy_text_is_the_same_on_the_real_model_in_a_batch_with_preemption():
    target = load("stdlib", dtype="float64")
    draft = load("stdlib-draft", dtype="float64")
    documents = held_out_documents()
    asked = [
        Request(target.tokenizer.encode(documents[i].text)[:40], 20, request_id=i, ignore_eos=True)
        for i in range(3)
    ]
    plain = {r.request_id: target.generate(list(r.prompt), 20, ignore_eos=True) for r in asked}
    for drafter in (
        AdaptiveDrafting(ModelDrafter(draft, 3, sequences=4)),
        AdaptiveDrafting(lambda: NGramDrafter(4)),
    ):
        engine = Engine(
            target, num_blocks=9, drafter=drafter, prefix_cache=None
        )  # the first to write its 49th token finds none
        for request in asked:
            engine.submit(request)
        found = {name: r.tokens for name, r in engine.run().items()}
        assert found == plain
        assert engine.preemptions > 0


@pytest.mark.parametrize("stop", [True, False])
def test_a_stop_string_or_end_token_among_accepted_drafts_ends_the_output(stop):
    """All tokens are drafted and accepted, eight per step; what follows the end is
    discarded.
    """
    plain, _ = served(None, [Request([7, 8], 16, request_id=0)])
    tokens, text, _ = plain[0]
    options = {"stop": [text[3:6]]} if stop else {}
    from dataclasses import replace
    from types import SimpleNamespace

    config = CONFIG if stop else replace(CONFIG, eos_token_ids=(tokens[4],))
    model = SimpleNamespace(config=config, weights=TARGET.weights, tokenizer=TARGET.tokenizer)
    asked = Request([7, 8], 16, request_id=0, **options)
    results = []
    for drafter in (None, AdaptiveDrafting(PerfectDrafter(TARGET, 8))):
        engine = Engine(model, num_blocks=24, block_size=4, drafter=drafter, poison=True)
        engine.submit(asked)
        results.append(engine.run()[0])
        engine.check()
    assert results[0] == results[1]
    assert results[1].finish_reason == "stop"
    assert results[1].stop_reason == (text[3:6] if stop else None)
    assert len(results[1].tokens) < 16


@pytest.mark.theorem(
    "With sampled drafts the distribution of a request's output is that of plain sampling, in the "
    "engine too, also where the budget of a step cuts the drafts",
    source="Leviathan et al. 2023; by enumeration of every uniform",
)
@pytest.mark.parametrize("budget", [2048, 2], ids=["whole", "cut by the budget"])
def test_sampled_drafts_keep_the_output_distribution_in_the_engine(monkeypatch, budget):
    use_exact_draws(monkeypatch)
    target = random_model(SMALL, 4)

    def run(rng):
        engine = Engine(
            target,
            num_blocks=8,
            block_size=4,
            drafter=AdaptiveDrafting(ModelDrafter(random_model(SMALL, 9), 2)),
            max_batch_tokens=budget,
            seed=0,
        )
        engine.submit(Request(PROMPT, 4, request_id=0, temperature=1.0))
        engine._requests[0].sequence_state(0).rng = rng
        engine._requests[0].sequence_state(0).uniform = lambda place: 0.5
        monkeypatch.setattr(
            model_runner.sampling,
            "sample",
            lambda p, u: np.asarray([enumeration.draw(row, rng.random()) for row in p]),
        )
        return tuple(engine.run()[0].tokens)

    assert (
        largest_difference(
            exact_distribution(run), output_distribution(target, SamplingParams(temperature=1.0), 4)
        )
        <= 1e-11
    )


# --- settings_of many drafts ----------------------------------------------------------------------


def priced(steps, draft: float, first: float | None = None) -> Costs:
    """Each sequence drafts by itself: B times the cost of one."""
    return Costs(
        steps, [(b, b * (draft if first is None else first), b * draft) for b in (1, 1024)]
    )


FLAT = priced([(1, 1.0), (1000, 1.0)], 0.05)
STEEP = priced([(1, 1.0), (1000, 1000.0)], 0.05)


def test_costs_are_interpolated_between_measured_points():
    costs = priced([(1, 1.0), (2, 1.5), (4, 2.0)], 0.1)
    assert [costs.step(n) for n in (1, 2, 3, 4, 8)] == [1.0, 1.5, 1.75, 2.0, 4.0]
    flat = [(1, 1.0), (1000, 1.0)]
    assert priced(flat, 0.1).best_gamma(0.5, 1, 4) == 2
    assert priced(flat, 0.1, 0.1).best_gamma(0.5, 1, 4) == 2
    # the first costs too much: 1.5 / 1.9, 1.75 / 2, …
    assert priced(flat, 0.1, 0.9).best_gamma(0.5, 1, 4) == 0
    assert priced(flat, 0.0, 0.5).best_gamma(0.5, 1, 4) == 4  # those after it cost nothing


@given(alpha=st.floats(0, 1), batch=st.integers(1, 64), most=st.integers(0, 6))
def test_gamma_has_the_best_rate_and_is_zero_where_drafts_do_not_pay(alpha, batch, most):
    costs = priced([(1, 1.0), (8, 1.2), (64, 4.0), (512, 30.0)], 0.05)
    rates = [
        expected_length(alpha, g) / (costs.step(batch * (1 + g)) + batch * g * 0.05)
        for g in range(most + 1)
    ]
    assert rates[costs.best_gamma(alpha, batch, most)] == max(rates)
    # a step that costs in proportion to its tokens gains nothing
    assert STEEP.best_gamma(alpha, batch, most) == 0
    assert FLAT.best_gamma(1.0, 1, most) == most


def drive(drafting, good: bool, names: int, rounds: int) -> list[int]:
    """γ by round of the first of ``names`` sequences whose drafts are all accepted, or none."""
    sequences = [drafting() for _ in range(names)]
    asks = [
        (sequence, DraftRequest([1, 2, 3, 4, 5, 1], 100, GREEDY, np.random.default_rng(0), 0))
        for sequence in sequences
    ]
    gammas = []
    for _ in range(rounds):  # there is always something to look up
        made = [len(proposal.tokens) for proposal in drafting.propose_batch(asks)]
        gammas.append(made[0])
        for sequence, drafts in zip(sequences, made, strict=True):
            if drafts:
                sequence.observe([0] * (drafts + 1), drafts if good else 0)
    return gammas


def test_gamma_follows_acceptance_and_probes():
    def make(costs):
        return AdaptiveDrafting(lambda: NGramDrafter(4, shortest=1), costs=costs)

    on = drive(make(FLAT), good=True, names=1, rounds=8)
    costly = priced([(1, 1.0), (2, 1.2), (8, 3.8)], 0.0)
    off = drive(make(costly), good=False, names=1, rounds=3 * PROBE)
    assert on[-1] == 4
    assert off[0] > 0
    assert set(off[8:]) == {0, 1}
    assert 1 <= sum(off[8:]) <= 3  # a probe now and then
    assert make(None)().propose([1, 2, 1], 9, GREEDY, np.random.default_rng(0)).tokens == [
        2,
        1,
        2,
        1,
    ]


def test_a_new_sequence_starts_with_the_shared_acceptance_and_failed_probes_become_rarer():
    costly = priced([(1, 1.0), (2, 1.4), (8, 3.8)], 0.0)
    drafting = AdaptiveDrafting(lambda: NGramDrafter(4, shortest=1), costs=costly)
    assert drafting.alpha == PRIOR[0]
    tried = drive(drafting, good=False, names=1, rounds=8 * PROBE)
    assert drafting.alpha < 0.3
    probes = [i for i, drafts in enumerate(tried) if drafts and i > 8]
    waits = [b - a for a, b in itertools.pairwise(probes)]
    assert len(probes) >= 3
    assert all(b == 2 * a for a, b in itertools.pairwise(waits))
    # it does not have to find out itself
    assert drive(drafting, good=False, names=1, rounds=PROBE // 2) == [0] * (PROBE // 2)
    drafting.stats = Acceptance(steps=900, proposed=900, judged=900, accepted=890)
    assert drive(drafting, good=True, names=1, rounds=1)[0] >= 3


# A draft model for two sequences on a machine whose steps cost little more with more tokens, in
# microseconds: three drafts gain 1.3 times at α = 0.75, and lose at 0.5, where nothing is known.
FLATTISH = Costs([(2, 1500.0), (8, 1970.0)], [(2, 380.0, 300.0)])


@pytest.mark.parametrize(("alpha", "least", "most"), [(0.75, 1.15, 1.4), (0.2, 0.95, 1.0)])
def test_an_engine_that_knows_nothing_finds_out_whether_drafts_pay(alpha, least, most):
    """Time without drafts over time with the chosen ones, by the costs."""
    drafting = AdaptiveDrafting(lambda: NGramDrafter(3, shortest=1), costs=FLATTISH)
    rng = np.random.default_rng(0)
    asks = [(drafting(), DraftRequest([1, 2, 3, 4, 5, 1], 3, GREEDY, rng, 0)) for _ in range(2)]
    tokens = seconds = 0.0
    for _ in range(400):
        made = [len(proposal.tokens) for proposal in drafting.propose_batch(asks)]
        seconds += FLATTISH.step(2 + sum(made)) + FLATTISH.drafting(2, max(made))
        for (sequence, _), drafts in zip(asks, made, strict=True):
            accepted = int(np.argmin([*(rng.random(drafts) < alpha), False]))
            tokens += 1 + accepted
            if drafts:
                sequence.observe([0] * (drafts + 1), accepted)
    assert least <= tokens / 2 * FLATTISH.step(2) / seconds <= most


def test_the_optimistic_acceptance_falls_to_the_estimate():
    drafting = AdaptiveDrafting(NGramDrafter, costs=FLAT)
    assert drafting.optimistic_alpha == drafting().optimistic_alpha == 1.0  # 0.5 + 2 · 0.25
    drafting.stats = Acceptance(steps=96, proposed=96, judged=96, accepted=48)
    assert drafting.optimistic_alpha == 0.5 + 2 * math.sqrt(0.25 / 100)
    drafting.stats = Acceptance(steps=96, proposed=96, judged=96, accepted=96)
    assert drafting.alpha < drafting.optimistic_alpha <= 1


def test_at_most_one_sequence_probes_in_a_step():
    drafting = AdaptiveDrafting(lambda: NGramDrafter(4, shortest=1), costs=FLAT)
    drafting.stats = Acceptance(steps=1000, proposed=1000, judged=1000, accepted=0)
    ask = DraftRequest([1, 2, 1], 4, GREEDY, np.random.default_rng(0), 0)
    asked = [(drafting(), ask) for _ in range(3)]
    for _ in range(2 * PROBE):
        proposals = drafting.propose_batch(asked)
        assert sum(bool(proposal.tokens) for proposal in proposals) <= 1
    assert drafting.gammas[1] >= 3  # each of them has had its turn


def test_sampled_drafts_that_the_budget_cuts_are_verified_with_their_own_q():
    drafting = AdaptiveDrafting(ModelDrafter(DRAFT, 4, sequences=2))
    asked = [
        Request([3 + i, 4, 5], 12, request_id=i, seed=i, temperature=1.0, ignore_eos=True)
        for i in range(2)
    ]
    found, engine = served(drafting, asked, max_batch_tokens=6)
    assert [len(tokens) for tokens, _, _ in found.values()] == [12, 12]
    assert drafting.stats.proposed < 4 * drafting.stats.steps  # some were cut
    assert engine.used_blocks == 0


class Silent(NGramDrafter):
    """Never drafts; remembers how many drafts it was asked for."""

    def __init__(self, counts: list[int]):
        super().__init__(4)
        self.counts = counts

    def propose(self, tokens, count, sampling, rng):
        self.counts.append(count)
        return NO_DRAFTS


@pytest.mark.parametrize("wrap", [lambda make: make, AdaptiveDrafting], ids=["plain", "adaptive"])
def test_no_drafts_are_asked_for_that_the_output_has_no_room_for(wrap):
    counts: list[int] = []
    served(wrap(lambda: Silent(counts)), [Request([1, 2], 7, ignore_eos=True)])
    # one token of a step is no draft, and the last token of an output needs no drafts
    assert counts == [4, 4, 3, 2, 1]


def test_recent_drafts_of_a_sequence_weigh_most_beside_those_of_all():
    drafting = AdaptiveDrafting(lambda: NGramDrafter(4, shortest=1))
    first = drafting()
    assert drafting.alpha == first.alpha == 0.5  # nothing is known yet
    first.observe([0] * 5, 2)  # four drafts: two accepted, the third rejected
    first.observe([0] * 5, 4)
    assert (first.accepted, first.judged) == (0.9 * 2 + 4, 0.9 * 3 + 4)
    shared = (0.5 * 4 + 6) / (4 + 7)
    assert drafting.alpha == drafting().alpha == pytest.approx(shared)
    assert first.alpha == pytest.approx((16 * shared + 5.8) / (16 + 6.7))


def test_drafting_must_gain_more_than_the_margin():
    def gamma(draft):
        costs = Costs([(1, 1.0), (1000, 1.0)], [(1, draft, draft)])
        return AdaptiveDrafting(NGramDrafter, costs=costs).worthwhile_gamma(1.0, 1)

    # two tokens in the time of a step and a draft, over one token per step
    assert gamma(2 / MARGIN - 1.001) == 1
    assert gamma(2 / MARGIN - 0.999) == 0


def test_every_draft_is_counted_once():
    drafting = AdaptiveDrafting(lambda: NGramDrafter(4, shortest=1))
    drafting().observe([0] * 5, 2)  # four drafts: two accepted, the third rejected
    drafting().observe([0] * 5, 4)
    stats = drafting.stats
    assert (stats.steps, stats.proposed, stats.judged, stats.accepted) == (2, 8, 7, 6)


def test_a_gamma_is_kept_per_batch_and_acceptance():
    costs = priced([(1, 1.0), (8, 1.2), (64, 4.0), (512, 30.0)], 0.05)
    drafting = AdaptiveDrafting(lambda: NGramDrafter(4), costs=costs)
    cases = [
        (alpha, batch, most) for alpha in (0.1, 0.9) for batch in (1, 64) for most in (1, 4)
    ] * 2
    found = []
    for alpha, drafting.batch, most in cases:
        found.append(drafting.worthwhile_gamma(alpha, most))
    gains = [
        costs.rate(a, b, costs.best_gamma(a, b, most)) / costs.rate(a, b, 0) for a, b, most in cases
    ]
    assert found == [
        costs.best_gamma(*case) if g > MARGIN else 0 for case, g in zip(cases, gains, strict=True)
    ]
    assert len(set(found)) > 1


def test_drafting_is_off_in_a_large_batch_and_on_in_a_small_one():
    costs = priced([(1, 1.0), (4, 1.1), (16, 1.6), (64, 6.0), (256, 24.0)], 0.01)
    drafting = AdaptiveDrafting(lambda: NGramDrafter(3, shortest=1), costs=costs)
    small = drive(drafting, good=True, names=1, rounds=8)
    assert small[-1] > 0
    large = AdaptiveDrafting(lambda: NGramDrafter(3, shortest=1), costs=costs)
    assert drive(large, good=True, names=64, rounds=8)[-1] == 0
    assert large.batch == 64


def test_measured_costs_are_usable():
    costs = measure_costs(TARGET, ModelDrafter(DRAFT, 2), most=6, context=16, rounds=2)
    assert [n for n, _ in costs.steps] == [1, 2, 3, 4, 6]
    assert min(t for _, t in costs.steps) > 0
    [(batch, first, further)] = costs.drafts
    assert batch == 1
    assert first > 0 <= further
    costs = measure_costs(TARGET, ModelDrafter(DRAFT, 2, sequences=3), most=6, context=16, rounds=1)
    assert [b for b, _, _ in costs.drafts] == [1, 2, 3]
    assert costs.drafting(6, 2) == 2 * costs.drafting(3, 2)  # two turns
    assert costs.drafting(3, 0) == measure_costs(TARGET, most=2, rounds=1).drafting(3, 2) == 0
    with pytest.raises(ValueError, match="vocabulary"):
        measure_costs(TARGET, ModelDrafter(random_model(SMALL, 1)), most=2, rounds=1)


def test_the_batch_is_counted_in_each_step_and_no_sequence_is_kept():
    costs = priced([(1, 1.0), (4, 1.05), (16, 1.6), (64, 6.0), (256, 24.0)], 0.01)
    drafting = AdaptiveDrafting(lambda: NGramDrafter(3, shortest=1), costs=costs)
    engine = Engine(TARGET, num_blocks=64, drafter=drafting)
    for i in range(40):  # each sequence asks once
        engine.submit(Request([5, 6, 5, 6, 5], 3, request_id=i, ignore_eos=True))
        engine.run()
    assert drafting.batch == 1
    assert drafting.worthwhile_gamma(0.9, 3) > 0


def test_a_sequence_with_a_bad_start_is_probed_again_beside_one_that_drafts():
    costs = Costs([(1, 1.0), (9, 1.0)], [(1, 0.5, 0.5), (9, 0.5, 0.5)])
    drafting = AdaptiveDrafting(lambda: NGramDrafter(1, shortest=1), costs=costs)
    drafting.stats = Acceptance(steps=1000, proposed=1000, judged=1000, accepted=900)
    asks = [
        (drafting(), DraftRequest([1, 2, 1], 1, GREEDY, np.random.default_rng(0), 0))
        for _ in range(2)
    ]
    drafted = []
    for step in range(40 * PROBE):
        for i, ((sequence, _), proposal) in enumerate(
            zip(asks, drafting.propose_batch(asks), strict=True)
        ):
            if proposal.tokens:
                good = i == 0 or step > PROBE
                sequence.observe([0, 0], int(good))
                if i == 1:
                    drafted.append(step)
    assert 0 in drafted  # it began,
    assert not set(range(20, PROBE)) & set(drafted)  # was bad, and went without
    assert len([step for step in drafted if step > 30 * PROBE]) > 8 * PROBE  # and is back


def test_a_probe_without_drafts_does_not_lengthen_the_probing_interval():
    costly = priced([(1, 1.0), (2, 1.4), (1000, 500.0)], 0.0)
    drafting = AdaptiveDrafting(lambda: NGramDrafter(4, shortest=1), costs=costly)
    drafting.stats = Acceptance(steps=1000, proposed=1000, judged=1000, accepted=0)
    ask = DraftRequest([1, 2, 3, 4], 4, GREEDY, np.random.default_rng(0), 0)  # nothing repeats
    asks = [(drafting(), ask)]
    for _ in range(5 * PROBE):
        assert drafting.propose_batch(asks)[0].tokens == []
    assert drafting.probe_interval == PROBE


def test_sequences_without_a_cache_get_no_drafts_and_the_others_keep_theirs():
    source = ModelDrafter(DRAFT, 3, sampling=GREEDY, sequences=2)
    asked = [Request([7 + i] * 40, 12, request_id=i, ignore_eos=True) for i in range(3)]
    plain, _ = served(None, asked, num_blocks=60)
    found, _ = served(AdaptiveDrafting(source), asked, num_blocks=60)
    assert found == plain
    assert source.computed < 3 * (40 + 12) + 12 * 3 * 3  # every prompt once, and what was drafted

    with pytest.raises(ValueError, match="vocabulary"):
        Engine(TARGET, num_blocks=8, drafter=AdaptiveDrafting(ModelDrafter(random_model(SMALL, 1))))
    for wrong, error in ((NGramDrafter(3), TypeError), (TreeDrafter(DRAFT), ValueError)):
        with pytest.raises(error, match="ModelDrafter"):
            AdaptiveDrafting(wrong)


def test_costs_of_a_draft_model_with_low_confidence_are_not_zero():
    draft = ModelDrafter(DRAFT, 3, confidence=0.9, sequences=3)
    for _, first, further in measure_costs(TARGET, draft, most=2, context=16, rounds=2).drafts:
        assert first > 0
        assert further >= 0
    assert draft.confidence == 0.9
    assert draft.computed >= 2 * 2 * 3 * 3
    for bad in ({"most": 0}, {"context": 2}, {"rounds": 0}):
        with pytest.raises(ValueError, match="at least 1 and context 3"):
            measure_costs(TARGET, **bad)
    with pytest.raises(ValueError, match="a measured step at least"):
        Costs([])


def test_after_a_failure_while_drafting_the_step_is_repeated(monkeypatch):
    """Whether the draft model fails or the making of a drafter: the next step starts where
    the failed one did.
    """
    from refllm.decode.speculative import model_drafter

    real = model_drafter.forward
    failed = []

    def fails_once(*arguments):
        if not failed:
            failed.append(1)
            raise MemoryError
        return real(*arguments)

    asked = Request(list(range(1, 13)), 6, request_id=0, ignore_eos=True)
    [plain] = served(None, [asked])[0].values()

    def made():
        if len(failed) == 1:
            failed.append(1)
            raise MemoryError
        return NGramDrafter(3, shortest=1)

    monkeypatch.setattr(model_drafter, "forward", fails_once)
    for drafter in (AdaptiveDrafting(ModelDrafter(DRAFT, 3, sampling=GREEDY)), made):
        engine = Engine(TARGET, num_blocks=24, block_size=4, drafter=drafter, seed=0)
        engine.submit(asked)
        errors = 0
        while engine.unfinished:
            try:
                engine.step()
            except MemoryError:
                errors += 1
            engine.check()
        assert errors == 1
        assert engine.run()[0].tokens == plain[0]
