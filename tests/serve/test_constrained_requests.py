"""Requests with a grammar in the engine: their tokens are those of serving them alone."""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import enumeration
from drafting import PROMPT as SHORT
from drafting import SMALL, random_model, use_exact_draws
from enumeration import exact_distribution, largest_difference
from grammars import (
    GRAMMARS,
    TableGrammar,
    WordGrammar,
    constrained_distribution,
    is_complete,
    random_grammar,
)
from networks import NETWORKS
from refllm.api import Model
from refllm.decode.sampling_params import GREEDY
from refllm.decode.speculative.control_drafters import PerfectDrafter
from refllm.decode.speculative.model_drafter import ModelDrafter
from refllm.decode.speculative.ngram_drafter import NGramDrafter
from refllm.errors import InputError
from refllm.serve import model_runner
from refllm.serve.adaptive_drafts import AdaptiveDrafting
from refllm.serve.async_engine import AsyncEngine
from refllm.serve.engine import Engine
from refllm.serve.factory import POLICIES
from refllm.serve.request import Request
from serving import served_model

V = 257
END = 5  # of ``served_model``
PROMPTS = [[1, 2, 3, 4, 7], [1, 2, 3, 4, 7, 7], [1, 2, 3, 4], [40, 41] * 4]


def wide_grammar(seed: int) -> TableGrammar:
    """A random grammar with more tokens in each state."""
    return random_grammar(seed, V, states=5, end_tokens=(END,), edges=40)


def mixed(seed: int, count: int) -> list[Request]:
    """Requests with and without a grammar, of every kind."""
    rng = np.random.default_rng(seed)
    asked = []
    for i in range(count):
        options: dict[str, Any] = {"grammar": wide_grammar(seed + i)} if i % 3 else {}
        kind = int(rng.integers(4))
        if kind == 0:
            options |= {"temperature": 0.9, "seed": i, "n": int(rng.integers(1, 4))}
        elif kind == 1:
            options |= {"beam": True, "n": int(rng.integers(1, 4))}
        elif kind == 2:
            options |= {"temperature": 0.7, "seed": i, "best_of": 3, "repetition_penalty": 1.4}
        prompt = PROMPTS[int(rng.integers(4))]
        asked.append(Request(prompt, int(rng.integers(1, 10)), i, **options))
    return asked


def served(asked: list[Request], **options: Any) -> tuple[dict[Any, Any], Engine]:
    """The results, and the engine; the invariants hold after every step."""
    engine = Engine(served_model(), **{"num_blocks": 24, "block_size": 4, "poison": True} | options)
    for request in asked:
        engine.submit(request)
    results = {}
    while engine.unfinished:
        engine.step()
        engine.check()
        results |= engine.results
        engine.results = {}
    assert engine.used_blocks == 0
    return results, engine


def alone(request: Request) -> list[Any]:
    """The outputs of a request that is served alone."""
    results, _ = served([request], num_blocks=80, prefix_cache=None)
    return results[request.request_id].outputs


@pytest.mark.theorem(
    "In a batch with other requests, constrained and not, with preemption, prefix caches, chunks "
    "and drafts, a request gets the outputs that it gets alone, and each is one of its grammar, or "
    "the beginning of one where max_tokens cuts it off",
    source="a state is a function of the output alone",
)
@pytest.mark.parametrize("cache", [None, "hash", "radix"])
@given(
    seed=st.integers(0, 10_000),
    blocks=st.integers(14, 40),
    budget=st.integers(4, 40),
    drafts=st.sampled_from(["none", "n-gram", "model"]),
)
def test_a_constrained_request_is_served_as_alone(cache, seed, blocks, budget, drafts):
    asked = mixed(seed, 5)
    options: dict[str, Any] = {"prefix_cache": cache, "num_blocks": blocks}
    if drafts == "n-gram":
        options["drafter"] = lambda: NGramDrafter(3, longest=2, shortest=1)
    elif drafts == "model":
        options["drafter"] = AdaptiveDrafting(
            PerfectDrafter(served_model(), 3, sampling=GREEDY, sequences=2)
        )
    results, _ = served(asked, max_batch_tokens=budget, **options)
    for request in asked:
        found = results[request.request_id]
        assert found.error is None
        assert [facts(o) for o in found.outputs] == [facts(o) for o in alone(request)]
        if request.grammar is not None:
            for output in found.outputs:
                assert_is_of_the_grammar(output, request)


def facts(output: Any) -> tuple[Any, ...]:
    """What rounding does not change."""
    return output.tokens, output.text, output.finish_reason, output.stop_reason


def assert_is_of_the_grammar(output: Any, request: Request) -> None:
    """What has ended is accepted, what was cut off is not complete."""
    state = request.grammar.reads(output.tokens)
    assert state is not False
    if output.finish_reason == "stop":
        assert request.grammar.accepting(state)
    else:
        assert output.finish_reason == "length"
        assert len(output.tokens) == request.max_tokens
        assert not is_complete(request.grammar, output.tokens)


def test_preemption_and_accepted_drafts_occur():
    """The cases of the test above have both."""
    asked = [
        Request(PROMPTS[i % 4], 12, i, grammar=TableGrammar([{9: 1}, {8: 0, 7: 0}], [], V))
        for i in range(6)
    ]
    drafter = AdaptiveDrafting(lambda: NGramDrafter(3, longest=2, shortest=1))
    results, engine = served(asked, num_blocks=9, drafter=drafter)
    assert engine.preemptions > 0
    assert drafter.stats.accepted > 10
    plain, slow = served(asked, num_blocks=80)
    assert {k: r.outputs for k, r in results.items()} == {k: r.outputs for k, r in plain.items()}
    assert slow.preemptions == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_serves_constrained_requests(policy):
    grammars = [wide_grammar(3), None, wide_grammar(8)]
    asked = [
        Request(PROMPTS[i], 7, i, grammar=grammar, temperature=1.0, seed=i)
        for i, grammar in enumerate(grammars)
    ]
    results, _ = served(asked, policy=policy, num_blocks=1024)
    for request in asked:
        [found] = results[request.request_id].outputs
        assert facts(found) == facts(alone(request)[0])


@given(seed=st.integers(0, 500), temperature=st.sampled_from([0.0, 1.0]))
def test_the_engine_and_generate_agree(seed, temperature):
    grammar = wide_grammar(seed)
    request = Request(PROMPTS[0], 8, 0, grammar=grammar, temperature=temperature, seed=seed)
    found = served([request])[0][0].outputs[0]
    expected = served_model().generate(
        PROMPTS[0], 8, grammar=grammar, temperature=temperature, rng=seed, details=True
    )
    assert found == expected


def test_beams_are_legal_and_ranked_by_their_constrained_probabilities():
    """All texts of a grammar of four, enumerated: log p of the masked and renormalised rows."""
    record = random_model(replace(SMALL, vocab_size=5), 4)
    model = Model(record.config, record.weights, record.tokenizer)
    grammar = TableGrammar([{0: 1, 3: 2}, {1: 3, 2: 3}, {0: 3, 4: 3}, {}], [3], 5)
    engine = Engine(model, num_blocks=20, block_size=4)
    engine.submit(Request(SHORT, 6, 0, beam=True, n=4, length_penalty=0.0, grammar=grammar))
    outputs = engine.run()[0].outputs
    expected = {}
    for first, second in ((0, 1), (0, 2), (3, 0), (3, 4)):
        score = 0.0
        for i, token in enumerate((first, second)):
            z = np.asarray(model.logits([*SHORT, first, second][: len(SHORT) + i])[-1])
            legal = grammar.mask(grammar.reads([first, second][:i]))
            score += z[token] - np.log(np.exp(z[legal]).sum())
        expected[first, second] = score
    assert {tuple(o.tokens): o.score for o in outputs} == pytest.approx(expected)
    assert [o.score for o in outputs] == sorted((o.score for o in outputs), reverse=True)
    assert {o.finish_reason for o in outputs} == {"stop"}


@pytest.mark.theorem(
    "In the engine, too, sampled drafts of a constrained request keep the masked and renormalised "
    "distribution, also where the budget of a step cuts them",
    source="Leviathan et al. 2023; by enumeration of every uniform",
)
@pytest.mark.parametrize("budget", [2048, 2], ids=["whole", "cut by the budget"])
@pytest.mark.parametrize("name", GRAMMARS)
@pytest.mark.parametrize("aware", [True, False])
def test_sampled_drafts_keep_the_constrained_distribution(monkeypatch, budget, name, aware):
    use_exact_draws(monkeypatch)
    grammar = GRAMMARS[name]
    record = random_model(SMALL, 4)
    config = replace(SMALL, eos_token_ids=grammar.end_tokens)
    target = Model(config, record.weights, record.tokenizer)

    def unaware() -> Any:
        drafter = ModelDrafter(random_model(SMALL, 9), 2)
        drafter.constrains = False
        return drafter

    def run(rng: Any) -> tuple[int, ...]:
        drafter: Any = AdaptiveDrafting(ModelDrafter(random_model(SMALL, 9), 2))
        engine = Engine(
            target,
            num_blocks=8,
            block_size=4,
            drafter=drafter if aware else unaware,
            max_batch_tokens=budget,
            seed=0,
        )
        engine.submit(Request(SHORT, 4, 0, temperature=1.0, grammar=grammar))
        engine._requests[0].sequence_state(0).rng = rng
        engine._requests[0].sequence_state(0).uniform = lambda place: 0.5
        monkeypatch.setattr(
            model_runner.sampling,
            "sample",
            lambda p, u: np.asarray([enumeration.draw(row, rng.random()) for row in p]),
        )
        return tuple(engine.run()[0].tokens)

    found = exact_distribution(run)
    expected: dict[Any, float] = {}
    for output, chance in constrained_distribution(target, grammar, GREEDY_BUT_WARM, 4).items():
        kept = tuple(t for t in output if t not in grammar.end_tokens)
        expected[kept] = expected.get(kept, 0.0) + chance
    assert largest_difference(found, expected) <= 1e-11


GREEDY_BUT_WARM = replace(GREEDY, temperature=1.0)


@pytest.mark.parametrize("minimum", [0, 2, 3])
@pytest.mark.parametrize("stop", ["es", "s", "sx", "yes", "e"])
def test_stop_strings_at_the_end_of_a_complete_output(stop, minimum):
    """What was held back for a stop string is part of the text; one that is complete with the last
    token counts if the output has more than ``min_tokens``.
    """
    model = served_model(300)
    words = WordGrammar.of(["yes"], model)
    y, e, s = (model.tokenizer.encode(letter)[0] for letter in "yes")
    spelled = TableGrammar([{y: 1}, {e: 2}, {s: 3}, {}], [3], 300, words.end_tokens)
    options: dict[str, Any] = {"grammar": spelled, "stop": stop, "min_tokens": minimum}
    found = model.generate([1], 9, details=True, **options)
    engine = Engine(model, num_blocks=20, block_size=4)
    engine.submit(Request([1], 9, 0, **options))
    assert facts(engine.run()[0].outputs[0]) == facts(found)
    assert "".join(model.stream([1], 9, **options)) == found.text
    last = {"es": 3, "s": 3, "yes": 3, "e": 2}.get(stop)  # token that completes the stop string
    stops = last is not None and last > minimum
    assert found.finish_reason == "stop"
    assert found.stop_reason == (stop if stops else None)
    assert found.text == ("yes"[: "yes".index(stop)] if stops else "yes")


def test_a_stop_string_that_half_a_character_completes_ends_a_complete_output():
    """The last token is the first byte of a character, which decodes as U+FFFD at the end."""
    model = served_model(300)
    (half,) = [t for t in range(300) if model.tokenizer.decode([t, t]) == "\ufffd\ufffd"][:1]
    grammar = TableGrammar([{9: 1}, {half: 2}, {}], [2], 300, (5,))
    options: dict[str, Any] = {"grammar": grammar, "stop": "\ufffd"}
    found = model.generate([1], 9, details=True, **options)
    assert (found.stop_reason, found.text) == ("\ufffd", model.tokenizer.decode([9]))
    engine = Engine(model, num_blocks=20, block_size=4)
    engine.submit(Request([1], 9, 0, **options))
    assert facts(engine.run()[0].outputs[0]) == facts(found)


# --- jump-forward ---------------------------------------------------------------------------

TEXTS = ['{"return": true}', '{"return": false, "self": 1}', "import self"]


@pytest.mark.theorem(
    "With jump_forward a request gets the tokens that Model.generate gives, in any batch, with "
    "preemption, chunks and prefix caches; every jumped token is counted, and saves a pass",
    source="serve/base_scheduler.py: what was jumped over is not computed yet",
)
@given(
    seed=st.integers(0, 1000),
    blocks=st.integers(20, 40),
    budget=st.sampled_from([5, 12, 200]),
    cache=st.sampled_from([None, "hash", "radix"]),
    n=st.integers(1, 2),
)
def test_jumps_in_a_batch_are_those_alone(seed, blocks, budget, cache, n):
    model = served_model(300)
    grammar = WordGrammar.of(TEXTS, model)
    engine = Engine(
        model, num_blocks=blocks, block_size=4, max_batch_tokens=budget, prefix_cache=cache
    )
    options = {"grammar": grammar, "jump_forward": True, "temperature": 1.0}
    for i in range(3):
        engine.submit(Request([1, 2, 3, i], 30, i, seed=seed + i, n=n, **options))
    engine.submit(Request([1, 2, 3, 4], 9, "free", seed=seed, temperature=1.0))
    while engine.unfinished:
        engine.step()
        engine.check()
    results = engine.results
    for i in range(3):
        outputs = sorted(results[i].outputs, key=lambda output: output.index)
        for output in outputs:
            rng = np.random.default_rng(seed + i if not output.index else [seed + i, output.index])
            alone_ = model.generate([1, 2, 3, i], 30, rng=rng, details=True, **options)
            assert replace(output, index=0) == alone_
            assert output.text in TEXTS
        assert results[i].jumped_tokens == sum(output.jumped_tokens for output in outputs)
    assert engine.jumped_tokens == sum(result.jumped_tokens for result in results.values())
    assert results["free"].tokens == model.generate([1, 2, 3, 4], 9, rng=seed, temperature=1.0)


def test_a_jump_is_computed_in_one_step_and_streamed_at_once():
    model = served_model(300)
    grammar = WordGrammar.of(["return self if else None"], model)
    updates: list[Any] = []
    engine = Engine(model, num_blocks=40, block_size=4)
    engine.submit(
        Request([1, 2], 30, 0, grammar=grammar, jump_forward=True), lambda u: updates.append(u)
    )
    result = engine.run()[0]
    canonical = model.tokenizer.encode("return self if else None")
    assert result.tokens == canonical
    assert (engine.steps, len(updates)) == (1, 1)
    assert updates[0].tokens == canonical
    assert updates[0].text == "return self if else None"
    assert result.jumped_tokens == engine.jumped_tokens == len(canonical) - 1
    plain = Engine(model, num_blocks=40, block_size=4)
    plain.submit(Request([1, 2], 30, 0, grammar=grammar))
    assert plain.run()[0].text == result.text
    assert plain.steps >= len(canonical)


def test_a_step_with_a_jump_that_fails_is_repeated():
    """The jump of the step that failed is neither counted nor kept."""
    model = served_model(300)
    request = Request(
        [1, 2], 30, 0, grammar=WordGrammar.of(TEXTS, model), jump_forward=True, seed=1
    )
    results = []
    for fails in (False, True):
        engine = Engine(model, num_blocks=40, block_size=4)
        engine.submit(request)
        update = engine.scheduler.update

        def failing(plan: Any, outcomes: Any, update: Any = update, engine: Any = engine) -> Any:
            engine.scheduler.update = update
            raise MemoryError("planted")

        if fails:
            engine.scheduler.update = failing
            with pytest.raises(MemoryError, match="planted"):
                engine.step()
        results.append(engine.run()[0].outputs)
        engine.check()
    assert results[0] == results[1]
    assert results[0][0].jumped_tokens > 0


def test_drafts_and_jumps_in_the_engine_stay_in_the_grammar():
    model = served_model(300)
    words = ["".join(letters) + " return self" for letters in product("xy", repeat=5)]
    grammar = WordGrammar.of(words, model)
    drafting = AdaptiveDrafting(ModelDrafter(model, 3, sequences=3))
    engine = Engine(model, num_blocks=60, block_size=4, drafter=drafting, seed=0)
    for i in range(12):
        most = 40 if i < 6 else i
        engine.submit(
            Request([1, i], most, i, grammar=grammar, jump_forward=True, temperature=1.0, seed=i)
        )
    while engine.unfinished:
        engine.step()
        engine.check()
    for result in engine.results.values():
        assert len(result.tokens) <= result.request.max_tokens
        assert any(word.startswith(result.text) for word in words)
        assert result.finish_reason == ("stop" if result.text in words else "length")
    assert engine.jumped_tokens > 0
    assert engine.jumped_tokens == sum(one.jumped_tokens for one in engine.results.values())
    assert drafting.stats.accepted > 0


def test_what_cannot_jump_is_rejected():
    grammar = WordGrammar.of(TEXTS, served_model(300))
    Request([1], 4, grammar=grammar, jump_forward=True)
    for wrong in ({"logprobs": 1}, {"best_of": 2}, {"beam": True, "n": 2}):
        with pytest.raises(InputError, match="without their log-probabilities"):
            Request([1], 4, grammar=grammar, jump_forward=True, **wrong)
    with pytest.raises(InputError, match="jump_forward needs a grammar"):
        Request([1], 4, jump_forward=True)
    engine = Engine(served_model(300), num_blocks=40, block_size=4, policy="static")
    with pytest.raises(InputError, match="the rows of a static batch advance one token at a time"):
        engine.submit(Request([1], 4, grammar=grammar, jump_forward=True))


# --- errors ---------------------------------------------------------------------------------


def test_where_no_token_is_left_the_request_ends_with_the_sentence():
    grammar = TableGrammar([{9: 1}, {8: 2}, {}], [2], V, end_tokens=(END,))
    asked = [
        Request(PROMPTS[0], 6, "banned", grammar=grammar, bad_words=[(9, 8)]),
        Request(PROMPTS[0], 6, "longer", grammar=grammar, min_tokens=4),
        Request(PROMPTS[0], 6, "fine", grammar=grammar),
        Request(PROMPTS[0], 6, "beams", grammar=grammar, bad_words=[(8,)], beam=True, n=2),
    ]
    results, _ = served(asked)
    assert results["fine"].tokens == [9, 8]
    assert re.fullmatch(
        "no token may follow the 1 of the output: bad_words forbid all 1 that the grammar allows",
        results["banned"].error,
    )
    assert "the 2 of the output: bad_words or min_tokens, 4, forbid" in results["longer"].error
    assert "bad_words forbid" in results["beams"].error
    assert results["banned"].tokens == [9]
    assert results["longer"].tokens == [9, 8]


def test_beams_that_are_complete_before_min_tokens_are_an_error():
    grammar = TableGrammar([{9: 1, 7: 1}, {}], [1], V, end_tokens=(END,))
    request = Request(PROMPTS[0], 6, 0, grammar=grammar, min_tokens=2, beam=True, n=2)
    results, _ = served([request])
    assert "min_tokens, 2, forbid" in results[0].error


def test_a_draft_that_leads_into_a_dead_end_fails_nothing_before_it():
    """The n-gram drafts 8 after 9; what would follow is banned, and the sentence comes there."""
    grammar = TableGrammar([{9: 1}, {8: 2, 7: 2}, {9: 1}], [], V)
    request = Request([9, 8, 9, 8], 9, 0, grammar=grammar, bad_words=[(8, 9), (7, 9)])
    results, _ = served([request], drafter=lambda: NGramDrafter(4, longest=2, shortest=1))
    assert len(results[0].tokens) == 2
    assert "bad_words forbid all 1" in results[0].error


def test_what_is_no_grammar_is_rejected_when_the_request_is_made():
    with pytest.raises(InputError, match="request 'x': grammar must be one of"):
        Request([1], 4, "x", grammar="[a-z]+")
    with pytest.raises(InputError, match="ignore_eos"):
        Engine(served_model(), num_blocks=8).submit(
            Request([1], 4, grammar=wide_grammar(0), ignore_eos=True)
        )


def test_a_grammar_of_another_vocabulary_fails_its_own_request():
    other = TableGrammar([{0: 0}], [0], 300)
    asked = [Request([1], 4, "x", grammar=other), Request([1], 4, "y")]
    results, _ = served(asked)
    assert "a mask of 300 tokens for a vocabulary of 257" in results["x"].error
    assert results["y"].error is None


def test_an_aborted_request_leaves_no_state_behind():
    engine = Engine(served_model(), num_blocks=24, block_size=4)
    engine.submit(Request(PROMPTS[0], 9, "x", grammar=TableGrammar([{9: 0, 8: 0}], [], V)))
    for _ in range(4):
        engine.step()
    assert engine.abort("x")
    assert (
        engine.results["x"].tokens
        == alone(Request(PROMPTS[0], 4, 0, grammar=TableGrammar([{9: 0, 8: 0}], [], V)))[0].tokens
    )
    assert not engine._requests


def test_the_async_engine_streams_constrained_requests():
    grammar = wide_grammar(3)
    request = Request(PROMPTS[0], 8, grammar=grammar)

    async def main() -> Any:
        with AsyncEngine(Engine(served_model(), num_blocks=40, block_size=4)) as server:
            return [chunk async for chunk in server.generate(request)]

    chunks = asyncio.run(main())
    tokens = [token for chunk in chunks for token in chunk.tokens]
    expected = alone(replace(request, request_id=0))[0]
    assert [t for t in tokens if t != END] == expected.tokens
    assert chunks[-1].finish_reason == expected.finish_reason


def test_networks_without_end_tokens_end_with_the_grammar():
    """Also where another request of the batch is not constrained."""
    record = random_model(NETWORKS["llama-yarn"], 1)
    assert not record.config.eos_token_ids
    model = Model(record.config, record.weights, record.tokenizer)
    grammar = TableGrammar([{9: 1, 8: 1}, {7: 2}, {}], [2], 300)
    engine = Engine(model, num_blocks=20, block_size=4)
    engine.submit(Request([1, 2], 6, "constrained", grammar=grammar, n=2, temperature=1.0, seed=1))
    engine.submit(Request([1, 2], 6, "free"))
    results = engine.run()
    assert [(o.finish_reason, o.tokens[1]) for o in results["constrained"].outputs] == [
        ("stop", 7)
    ] * 2
    assert results["free"].tokens == model.generate([1, 2], 6)
