"""The engine: the tokens of a request depend on it alone; an error in one request affects no
other.
"""

from __future__ import annotations

import gc
import random
from collections import Counter
from typing import Any
from weakref import WeakSet

import numpy as np
import pytest
from hypothesis import settings

from refllm.api import Model
from refllm.decode.speculative.interface import Proposal
from refllm.decode.speculative.model_drafter import ModelDrafter
from refllm.decode.speculative.ngram_drafter import NGramDrafter
from refllm.serve import factory, model_runner
from refllm.serve.adaptive_drafts import AdaptiveDrafting
from refllm.serve.engine import Engine
from refllm.serve.plan import SequenceUpdate
from refllm.serve.request import Request
from serving import TOLERANCE, alone, ends_of, last_logits, served_model, without_end
from tiny_models import tiny_model

PROMPTS = [
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 10],
    [1, 2, 3, 4, 5, 6, 7, 8, 20],
    [1, 2, 3, 30],
    [40, 41] * 7,
    [50],
]


def some_request(rng: random.Random, name: int) -> Request:
    """Prompts that share prefixes; greedy, sampled and penalised; one continuation or
    several.
    """
    prompt = PROMPTS[rng.randrange(len(PROMPTS))] + [
        rng.randint(60, 62) for _ in range(rng.randint(0, 3))
    ]
    sampling: dict[str, Any] = {"seed": name}
    if rng.random() < 0.6:
        sampling |= {
            "temperature": rng.choice([0.5, 1.0]),
            "top_p": rng.choice([1.0, 0.9]),
            "top_k": rng.choice([0, 20]),
        }
    if rng.random() < 0.3:
        sampling["repetition_penalty"] = 1.3
    if rng.random() < 0.3:
        sampling |= {"presence_penalty": 0.4, "frequency_penalty": 0.2}
    if rng.random() < 0.2:
        sampling |= {"logit_bias": {5: 4.0, 7: -1.0}, "bad_words": [(9,), (60, 61)]}
    if rng.random() < 0.2:
        sampling["logits_processors"] = [lambda output, z: z * (1 + len(output) % 2)]
    longest = rng.randint(1, 9)
    sampling["min_tokens"] = rng.choice([0, 0, rng.randint(0, longest)])
    sampling["stop_token_ids"] = rng.choice([(), (), (7, 8, 9, 11)])
    sampling["include_stop_str_in_output"] = rng.random() < 0.3
    sampling["logprobs"] = rng.choice([None, 0, 2])
    sampling["prompt_logprobs"] = rng.choice([None, None, 1])
    sampling["prompt_logprobs_start"] = rng.choice([0, 0, 2, len(prompt) // 2, len(prompt) + 1])
    n = rng.choice([1, 1, 1, 3])
    return Request(
        prompt,
        longest,
        request_id=name,
        n=n,
        ignore_eos=rng.random() < 0.5,
        priority=rng.randint(0, 2),
        salt=rng.choice([None, None, "tenant"]),
        **sampling,
    )


def some_engine(rng: random.Random, **options: Any) -> Engine:
    """Any policy, any cache, and hardly enough memory, budget and slots."""
    policy = rng.choice([*factory.CONTINUOUS * 3, *factory.POLICIES])
    continuous = policy in factory.CONTINUOUS
    size = rng.choice([1, 2, 4, 5])
    drafter = rng.choice([None, None, lambda: NGramDrafter(3, longest=2, shortest=1)])
    return Engine(
        served_model(),
        num_blocks=rng.randint(30, 60) // size,
        block_size=size,
        policy=policy,
        poison=True,
        prefix_cache=rng.choice(["hash", "radix", None]) if continuous else None,
        drafter=drafter,
        max_batch_tokens=rng.choice([3, 7, 16, 200]),
        max_sequences=rng.choice([3, 5, 16]),
        chunked=not continuous or rng.random() < 0.8,
        long_prefill=rng.choice([0, 0, 2]),
        longest=30,
        **options,
    )


def check_logprobs(request: Request, expected: list[int], found: Any) -> None:
    """Each token that was sampled, and the best, as log_softmax of a full forward has them."""
    k = request.output.logprobs
    if k is None:
        assert found is None
        return
    assert len(found) == len(expected)
    for i, (token, entry) in enumerate(zip(expected, found, strict=True)):
        check_entry(entry, token, (*request.prompt, *expected[:i]), k)


def check_prompt_logprobs(request: Request, found: Any) -> None:
    """The same of each token of the prompt from ``prompt_logprobs_start`` on, but the first."""
    k = request.output.prompt_logprobs
    if k is None:
        assert found is None
        return
    assert len(found) == len(request.prompt)
    start = min(len(found), max(1, request.output.prompt_logprobs_start))
    assert found[:start] == [None] * start
    for i, entry in enumerate(found[start:], start):
        check_entry(entry, request.prompt[i], tuple(request.prompt[:i]), k)


def check_entry(entry: Any, token: int, before: tuple[int, ...], k: int) -> None:
    z = last_logits(before)
    log_p = z - z.max() - np.log(np.exp(z - z.max()).sum())
    best = np.argsort(-log_p, kind="stable")[:k].tolist()
    assert next(iter(entry)) == token
    assert set(entry) == {token, *best}
    for t, one in entry.items():
        assert abs(one.logprob - log_p[t]) <= 1e-12
        assert one.rank == 1 + int((log_p > log_p[t] + 1e-12).sum())


def holds(engine: Engine, request: Request) -> bool:
    return engine.scheduler.rejection_reason(request) is None


@pytest.mark.theorem(
    "The tokens of a request depend on its prompt, settings and seed alone: not on batch, "
    "budget, chunks, order of arrival, policy, cached prefixes, preemption or n-gram drafts",
    source="Kwon et al. 2023; Yu et al. 2022; serve/engine.py",
)
def test_invariance_tokens_depend_on_the_request_alone():
    seen: Counter[str] = Counter()
    for seed in range(max(24, settings.default.max_examples // 4)):
        rng = random.Random(seed)
        engine = some_engine(
            rng, on_plan=lambda plan: seen.update(chunked=sum(not i.samples for i in plan.items))
        )
        requests = [r for r in (some_request(rng, name) for name in range(7)) if holds(engine, r)]
        rng.shuffle(requests)
        for request in requests:
            engine.submit(request)
            for _ in range(rng.choice([0, 0, 1, 3])):
                engine.step()
        results = engine.run()
        engine.check()
        for request in requests:
            outputs = results[request.request_id].outputs
            assert len(outputs) == request.n
            for output in outputs:
                expected, nearest = alone(request, output.index)
                assert nearest > TOLERANCE, (
                    "rounding could decide a token: the comparison would be void"
                )
                assert output.tokens == without_end(expected, request), (seed, request)
                ended = expected and expected[-1] in ends_of(request)
                assert output.finish_reason == ("stop" if ended else "length")
                stop_token = ended and (expected[-1] != 5 or request.ignore_eos)
                assert output.stop_reason == (expected[-1] if stop_token else None)
                check_logprobs(request, expected, output.logprobs)
                seen.update(scored=output.logprobs is not None, stopped=bool(stop_token))
            check_prompt_logprobs(request, results[request.request_id].prompt_logprobs)
        assert engine.used_blocks == 0
        seen.update(
            preempted=engine.preemptions,
            hits=engine.cached_tokens,
            copied=engine.copied_blocks,
            drafted=engine.drafter is not None,
            resumed=engine.scheduler.resumed_cached,
        )
    assert all(
        seen[what]
        for what in (
            "chunked",
            "preempted",
            "hits",
            "copied",
            "drafted",
            "resumed",
            "scored",
            "stopped",
        )
    ), seen


def test_invariance_it_runs_on_every_library(xp):
    engine = Engine(
        served_model(xp=xp), num_blocks=12, block_size=4, max_batch_tokens=9, prefix_cache="radix"
    )
    requests = [
        Request(PROMPTS[0], 6, seed=1, temperature=0.9),
        Request(PROMPTS[1], 6, n=2, seed=2, temperature=0.7),
        Request(PROMPTS[3], 5),
        Request(PROMPTS[3], 4, n=2, beam=True),
    ]
    names = [engine.submit(request) for request in requests]
    results = engine.run()
    for name, request in zip(names[:3], requests, strict=False):
        for output in results[name].outputs:
            assert output.tokens == without_end(alone(request, output.index)[0], request)
    assert len(results[names[3]].outputs) == 2


@pytest.mark.theorem(
    "Which physical blocks a sequence lies in changes no bit",
    source="Kwon et al. 2023, section 4.1",
)
def test_invariance_physical_blocks_are_interchangeable():
    outputs = []
    for seed in (0, 1):
        engine = Engine(served_model(), num_blocks=20, block_size=3, poison=True, prefix_cache=None)
        taken = [engine.pool.allocate() for _ in range(20)]
        for block in np.random.default_rng(seed).permutation(taken):
            engine.pool.free(int(block))
        blocks: list[tuple[int, ...]] = []
        engine.on_plan = lambda plan, blocks=blocks: blocks.extend(
            item.blocks for item in plan.items
        )
        for prompt in PROMPTS[:3]:
            engine.submit(Request(prompt, 5))
        outputs.append(([r.tokens for r in engine.run().values()], blocks))
    assert outputs[0][0] == outputs[1][0]
    assert outputs[0][1] != outputs[1][1]


def test_speculation_with_a_draft_model_keeps_greedy_tokens_and_saves_steps():
    target = served_model()
    engine = Engine(target, num_blocks=40, block_size=4, drafter=lambda: ModelDrafter(target, 3))
    request = Request(PROMPTS[0], 12, ignore_eos=True, seed=3)
    sampled = Request(PROMPTS[1], 12, ignore_eos=True, seed=3, temperature=0.8)
    names = [engine.submit(request), engine.submit(sampled)]
    results = engine.run()
    assert results[names[0]].tokens == alone(request)[0]  # greedy: the same tokens
    assert len(results[names[1]].tokens) == 12
    assert engine.steps < 8  # the target drafts for itself: all are accepted, 4 tokens per step


# --- bad input ----------------------------------------------------------------------------


@pytest.fixture
def busy() -> Engine:
    """An engine that serves a request already."""
    engine = Engine(served_model(), num_blocks=8, block_size=4)
    engine.submit(Request(PROMPTS[0], 8, request_id="first", ignore_eos=True))
    engine.step()
    return engine


def assert_serves_on(engine: Engine) -> None:
    results = engine.run()
    assert results["first"].tokens == alone(Request(PROMPTS[0], 8, ignore_eos=True))[0]
    engine.check()
    assert engine.used_blocks == 0


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Request([1] * 40, 1), "needs 40 slots .* pool has 32"),
        (lambda: Request([1] * 30, 9), "needs 40 slots"),
        (
            lambda: Request([1] * 90, 9),
            "90 prompt tokens plus max_tokens 9 exceed the model's 96 positions",
        ),
        (lambda: Request([], 5), "prompt is empty"),
        (lambda: Request([1, 257], 5), "token 257 at position 1 .* vocabulary of 257"),
        (lambda: Request([1, -1], 5), "-1 at position 1"),
        (lambda: Request([1], -1), "max_tokens"),
        (lambda: Request([1], 5, request_id="first"), "'first' is being served"),
        (lambda: Request([1], 5, n=200), "200 sequences, and at most 128"),
        (lambda: Request([1], 5, n=2, beam=True, temperature=1.0), "beam search does not sample"),
        (lambda: Request([1], 5, bad_words=[(257,)]), "bad_words: token 257 is outside"),
        (lambda: Request([1], 5, stop_token_ids=[300]), "stop_token_ids: token 300 is outside"),
        (lambda: Request([1], 5, stop=""), "stop must be"),
    ],
)
def test_bad_input_is_one_clear_error_and_other_requests_continue(busy, make, why):
    with pytest.raises(ValueError, match=why):
        busy.submit(make())
    assert_serves_on(busy)


@pytest.mark.parametrize(("prompt", "new"), [(95, 1), (1, 95), (96, 0)])
def test_a_request_may_fill_the_positions_of_the_model_but_not_exceed_them(prompt, new):
    engine = Engine(served_model(), num_blocks=24, block_size=4)
    name = engine.submit(Request([1] * prompt, new, ignore_eos=True))
    with pytest.raises(ValueError, match="exceed the model's 96 positions"):
        engine.submit(Request([1] * prompt, new + 1))
    assert len(engine.run()[name].tokens) == new


def test_a_search_may_have_as_many_beams_as_there_are_tokens_that_do_not_end():
    engine = Engine(served_model(9), num_blocks=40, block_size=2)
    with pytest.raises(ValueError, match="9 beams need as many first tokens, of 9"):
        engine.submit(Request([1], 1, n=9, beam=True))
    name = engine.submit(Request([1], 1, n=8, beam=True))
    assert len(engine.run()[name].outputs) == 8


def test_an_id_that_the_engine_assigns_is_free():
    engine = Engine(served_model(), num_blocks=8)
    engine.submit(Request([1], 1, request_id=0))
    engine.step()  # its result is not taken
    engine.submit(Request([1], 1, request_id=1))
    assert [engine.submit(Request([1], 1)) for _ in range(2)] == [2, 3]
    assert sorted(engine.run()) == [0, 1, 2, 3]


def test_requests_without_a_seed_draw_theirs_from_the_engines():
    def run(seed: int | None) -> list[list[int]]:
        engine = Engine(served_model(), num_blocks=40, seed=seed)
        names = [engine.submit(Request([1], 8, temperature=1.0, ignore_eos=True)) for _ in range(2)]
        own = engine.submit(Request([1], 8, temperature=1.0, ignore_eos=True, seed=5))
        results = engine.run()
        return [results[name].tokens for name in (*names, own)]

    first, second, own = run(0)
    assert first != second
    assert run(0) == [first, second, own]
    assert run(1)[:2] != [first, second]
    assert run(None)[:2] != run(None)[:2]
    assert run(None)[2] == own


def test_max_tokens_0_gives_empty_outputs(busy):
    name = busy.submit(Request([1, 2], 0, n=2))
    result = busy.run()[name]
    assert [(o.tokens, o.text, o.finish_reason) for o in result.outputs] == [([], "", "length")] * 2


def test_an_id_is_in_use_until_its_result_is_taken(busy):
    while busy.unfinished:
        busy.step()
    with pytest.raises(ValueError, match="result was not taken"):
        busy.submit(Request([1], 1, request_id="first"))
    assert list(busy.run()) == ["first"]
    busy.submit(Request(PROMPTS[0], 8, request_id="first", ignore_eos=True))
    assert_serves_on(busy)


def test_an_abort_keeps_the_tokens_so_far_and_is_false_for_unknown_ids(busy):
    request = Request(PROMPTS[1], 9, request_id=7, ignore_eos=True)
    busy.submit(request)
    busy.step()
    busy.step()
    assert busy.abort(7)
    assert not busy.abort(7)  # it has ended
    assert not busy.abort("unknown")
    assert (busy.results[7].finish_reason, busy.results[7].tokens) == (
        "abort",
        alone(request)[0][:2],
    )
    assert_serves_on(busy)


def test_a_seed_is_none_or_an_integer():
    with pytest.raises(
        ValueError, match="Engine: seed must be .* a seed .an integer, 0 or more. or None, got -1"
    ):
        Engine(served_model(), num_blocks=1, seed=-1)


def test_a_pool_of_one_block_serves_one_at_a_time():
    engine = Engine(served_model(), num_blocks=1, block_size=16)
    names = [engine.submit(Request(prompt, 4, ignore_eos=True)) for prompt in PROMPTS[:3]]
    results = engine.run()
    assert [results[name].tokens for name in names] == [
        alone(Request(prompt, 4, ignore_eos=True))[0] for prompt in PROMPTS[:3]
    ]
    with pytest.raises(ValueError, match="at least one token"):
        Engine(served_model(), num_blocks=0)


def test_nan_logits_end_their_own_request(busy):
    weights = busy.model.weights
    broken = {**weights, "embed_tokens": BrokenEmbedding(weights["embed_tokens"], 99)}
    busy.model = type(busy.model)(busy.model.config, broken, busy.model.tokenizer)
    names = [
        busy.submit(Request([1, 99], 3, n=n, beam=beam))
        for n, beam in ((1, False), (2, False), (2, True))
    ]
    while busy.unfinished:
        busy.step()
    for result in [busy.results.pop(name) for name in names]:
        assert result.error is not None
        assert "NaN" in result.error
        assert {(output.finish_reason, len(output.tokens)) for output in result.outputs} == {
            ("error", 0)
        }
    assert_serves_on(busy)


class BrokenEmbedding:
    """An embedding with one row of NaN."""

    def __init__(self, inner: Any, token: int):
        self.inner = inner
        self.token = token

    def rows(self, tokens: np.ndarray) -> np.ndarray:
        return np.where((tokens == self.token)[:, None], np.nan, self.inner.rows(tokens))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def test_a_step_that_fails_is_rolled_back_and_no_token_is_lost(busy):
    sampled = Request(
        PROMPTS[1], 6, request_id="sampled", temperature=0.9, seed=4, ignore_eos=True, stop="\0\0"
    )
    busy.submit(sampled)
    busy.step()

    def fail(plan: Any) -> None:
        raise MemoryError("no room for the batch")

    busy.on_plan = fail
    with pytest.raises(MemoryError, match="no room"):
        busy.step()
    busy.on_plan = None
    busy.check()
    while busy.unfinished:
        busy.step()
    assert busy.results["sampled"].tokens == alone(sampled)[0]
    assert_serves_on(busy)


def test_a_step_that_fails_before_its_copies_leaves_no_block_half_shared():
    request = Request(PROMPTS[2][:3], 5, n=3, temperature=1.0, seed=2, ignore_eos=True)
    engine = Engine(served_model(), num_blocks=20, block_size=4, prefix_cache=None, poison=True)
    failed: list[int] = []

    def fail(plan: Any) -> None:
        if plan.copies and not failed:
            failed.append(len(plan.copies))
            raise MemoryError("no room to copy")

    engine.submit(request)
    engine.on_plan = fail
    with pytest.raises(MemoryError, match="no room"):
        engine.run()
    (result,) = engine.run().values()
    assert failed == [2]  # one of three keeps the block
    assert [output.tokens for output in result.outputs] == [alone(request, i)[0] for i in range(3)]


def test_text_of_a_step_that_fails_is_discarded(monkeypatch):
    request = Request(PROMPTS[0], 6, seed=1, temperature=1.0, ignore_eos=True, stop="\0\0")
    engine = Engine(served_model(), num_blocks=40)
    received = []
    engine.submit(request, received.append)
    engine.step()

    def fail(*arguments: Any) -> None:
        model_runner.sample_outcomes(*arguments)
        raise MemoryError("after the tokens were chosen")

    with monkeypatch.context() as patch:
        patch.setattr("refllm.serve.engine.sample_outcomes", fail)
        with pytest.raises(MemoryError, match="were chosen"):
            engine.step()
    (result,) = engine.run().values()
    assert result.tokens == alone(request)[0]
    assert (
        "".join(update.text for update in received)
        == result.text
        == engine.model.tokenizer.decode(result.tokens)
    )


def test_outputs_are_in_the_order_of_their_sequences():
    engine = Engine(served_model(9), num_blocks=200, block_size=4)
    ended = []
    for seed in range(12):
        request = Request([1, 2], 20, request_id=seed, n=3, seed=seed, temperature=1.0)
        engine.submit(
            request,
            lambda update: (
                ended.append((update.request_id, update.index)) if update.finish_reason else None
            ),
        )
    results = engine.run()
    for result in results.values():
        assert [output.index for output in result.outputs] == [0, 1, 2]
    assert any([i for s, i in ended if s == seed] != [0, 1, 2] for seed in results), (
        "no sequence ended out of order"
    )


# --- callbacks ----------------------------------------------------------------------------


def test_callbacks_receive_every_token_once_and_the_text_in_parts():
    engine = Engine(served_model(), num_blocks=40)
    received = []
    request = Request(PROMPTS[0], 12, n=3, seed=1, temperature=1.0, ignore_eos=True)
    name = engine.submit(request, received.append)
    outputs = engine.run()[name].outputs
    for output in outputs:
        updates = [update for update in received if update.index == output.index]
        assert [token for update in updates for token in update.tokens] == output.tokens
        assert (
            "".join(update.text for update in updates)
            == output.text
            == engine.model.tokenizer.decode(output.tokens)
        )
        assert [update.finish_reason for update in updates] == [None] * 11 + ["length"]


def test_a_stop_string_ends_the_text_before_it():
    model = served_model()
    request = Request(PROMPTS[0], 40, seed=9, temperature=1.0, ignore_eos=True)
    whole = model.tokenizer.decode(alone(request)[0])
    stop = whole[8:11]
    engine = Engine(model, num_blocks=40)
    received = []
    stopping = Request(
        PROMPTS[0], 40, seed=9, temperature=1.0, ignore_eos=True, stop=[stop, "never without_end"]
    )
    result = engine.run() if engine.submit(stopping, received.append) is not None else {}
    (result,) = result.values()
    assert (result.text, result.finish_reason) == (whole[: whole.index(stop)], "stop")
    assert result.stop_reason == stop == received[-1].stop_reason
    assert "".join(update.text for update in received) == result.text
    assert engine.used_blocks == 0


@pytest.mark.theorem(
    "Of several stop strings the first that is complete ends the text, at the last token, before "
    "the end token and with room for more: the reason says so, and no further token is sampled",
    source="serve/request_state.py, decode/detokenizer.py",
)
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("streams", [False, True])
def test_several_stop_strings_end_the_text_at_once(seed, streams):
    model = served_model()
    settings: dict[str, Any] = {"seed": seed, "temperature": 1.0}
    tokens = without_end(alone(Request(PROMPTS[0], 12, **settings))[0], Request(PROMPTS[0]))
    texts = [model.tokenizer.decode(tokens[:n]) for n in range(len(tokens) + 1)]
    for n in range(1, len(tokens) + 1):
        text = texts[n]
        stop = text[-1:]
        last = n == len(tokens)  # of an output that an end token follows, or max_tokens
        if stop in texts[n - 1] or (stop == "\ufffd" and not last):
            continue  # it was complete earlier, or the next token decides what it is
        longer = text[-3:] + "QQ"  # has begun before, and is never complete
        for room in (n,) if stop == "\ufffd" else (n, n + 1, 12):
            engine = Engine(model, num_blocks=40)
            received: list[SequenceUpdate] = []
            request = Request(PROMPTS[0], room, stop=[stop, longer], **settings)
            name = engine.submit(request, received.append if streams else None)
            result = engine.run()[name]
            assert (result.finish_reason, result.stop_reason) == ("stop", stop)
            assert result.tokens == tokens[:n]
            assert result.text == text[:-1]
            assert engine.sampled_tokens == n
            if streams:
                assert "".join(update.text for update in received) == result.text


def test_a_callback_that_raises_ends_its_own_request(busy):
    def raises(update: SequenceUpdate) -> None:
        raise KeyError("lost")

    name = busy.submit(Request([1, 2], 5, n=2), raises)
    while busy.unfinished:
        busy.step()
    result = busy.results.pop(name)
    assert result.error == "the callback raised KeyError: 'lost'"
    assert {output.finish_reason for output in result.outputs} == {"error"}
    assert_serves_on(busy)


@pytest.mark.parametrize("beam", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1, 4])
def test_an_id_is_in_use_until_the_step_that_ends_its_request_is_over(max_tokens, beam):
    """In its last callback, and where a request without output waits for its step."""
    engine = Engine(served_model(), num_blocks=40)
    refused = []

    def submits_again(update: SequenceUpdate) -> None:
        with pytest.raises(ValueError, match="request 'r' is being served"):
            engine.submit(Request([9], 2, "r"))
        refused.append(update.finish_reason)

    request = Request([1, 2], max_tokens, "r", n=2, beam=beam, ignore_eos=True)
    engine.submit(request, submits_again)
    with pytest.raises(ValueError, match="request 'r' is being served"):
        engine.submit(Request([9], 0, "r"))
    result = engine.run()["r"]
    assert [len(output.tokens) for output in result.outputs] == [max_tokens] * 2
    assert "length" in refused
    assert engine.submit(Request([9], 2, "r")) == "r"


@pytest.mark.parametrize("beam", [False, True])
def test_a_callback_that_changes_its_update_does_not_keep_its_request_from_ending(beam):
    def changes(update: SequenceUpdate) -> None:
        update.finish_reason = None
        update.tokens.clear()

    engine = Engine(served_model(), num_blocks=40)
    request = Request([1, 2], 3, "r", n=2, beam=beam, ignore_eos=True)
    engine.submit(request, changes)
    for _ in range(3):
        engine.step()
    assert not engine.unfinished
    result = engine.run()["r"]
    engine.submit(request)
    assert result.outputs == engine.run()["r"].outputs


class MeddlingDrafter:
    """Changes the tokens that it was given, which are its own."""

    gamma = 2

    def propose(self, tokens: list[int], count: int, sampling: Any, rng: Any) -> Proposal:
        drafts = [tokens[-1]] * min(count, 2)
        tokens[0] = 77
        tokens.append(78)
        return Proposal(drafts, None)

    def observe(self, best: Any, accepted: int) -> None:
        pass


def test_a_drafter_that_changes_the_tokens_changes_no_output():
    request = Request([1, 2, 3], 6, "r", ignore_eos=True)
    engine = Engine(served_model(), num_blocks=40, drafter=MeddlingDrafter)
    engine.submit(request)
    assert engine.run()["r"].tokens == alone(request)[0]
    settings: dict[str, Any] = {"ignore_eos": True, "drafter": MeddlingDrafter()}
    assert served_model().generate([1, 2, 3], 6, **settings) == served_model().generate(
        [1, 2, 3], 6, ignore_eos=True
    )


def test_ctrl_c_in_a_callback_is_raised_and_the_next_run_continues():
    engine = Engine(served_model(), num_blocks=40)
    calls = []

    def interrupted(update: SequenceUpdate) -> None:
        calls.append(update)
        if len(calls) == 1:
            raise KeyboardInterrupt

    # Its first update is also its last: the scheduler has forgotten it by then
    short = engine.submit(Request([1, 2], 1, ignore_eos=True), interrupted)
    long = engine.submit(Request([3], 4))
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    engine.check()
    for _ in range(4):
        engine.step()
    assert not engine.unfinished
    results = engine.run()
    assert results[short].finish_reason == "length"
    assert len(results[short].outputs[0].tokens) == 1
    assert results[long].outputs[0].tokens == alone(Request([3], 4))[0]


def test_a_callback_may_submit_and_abort_but_not_step(busy):
    errors = []

    def meddles(update: SequenceUpdate) -> None:
        try:
            busy.step()
        except RuntimeError as error:
            errors.append(str(error))
        busy.submit(Request([3], 1, request_id="late"))
        busy.abort("own")

    busy.submit(Request([1, 2], 5, request_id="own"), meddles)
    while busy.unfinished:
        busy.step()
    assert "callback called step" in errors[0]
    assert busy.results.pop("own").finish_reason == "abort"
    assert busy.results.pop("late").finish_reason in ("length", "stop")
    assert_serves_on(busy)


def test_a_callback_may_abort_a_search_that_has_just_ended_or_gone_on(busy):
    """Its updates of this step are not published yet, and never will be."""
    search = busy.submit(Request([1, 2], 2, request_id="search", n=2, beam=True))
    aborted = []

    def abort(update: SequenceUpdate) -> None:
        aborted.append(busy.abort(search))

    busy.submit(Request([3], 4, request_id="other"), abort)
    while busy.unfinished:
        updates = busy.step()
        assert all(update.request_id != "search" for update in updates)
        busy.check()
    assert aborted[0]
    assert {output.finish_reason for output in busy.results.pop("search").outputs} == {"abort"}
    assert not busy.results.pop("other").error
    assert_serves_on(busy)


# --- many requests ------------------------------------------------------------------------


@pytest.mark.parametrize(("cache", "count"), [("hash", 500), ("radix", 2000)])
def test_conservation_a_flood_with_random_aborts_ends_with_every_block_free(cache, count):
    rng = random.Random(cache)
    engine = Engine(
        served_model(), num_blocks=24, block_size=4, prefix_cache=cache, max_batch_tokens=256
    )
    names = []
    ended = Counter()
    for name in range(count):
        prompt = PROMPTS[rng.randrange(len(PROMPTS))] + [
            rng.randrange(257) for _ in range(rng.randint(0, 8))
        ]
        beam = rng.random() < 0.02
        names.append(
            engine.submit(
                Request(prompt, rng.randint(0, 6), request_id=name, n=2 if beam else 1, beam=beam)
            )
        )
        if rng.random() < 0.15:
            engine.abort(rng.choice(names))
        if rng.random() < 0.1:
            engine.step()
    while engine.unfinished:
        engine.step()
        if rng.random() < 0.5:
            engine.abort(rng.choice(names))
    engine.check()
    ended.update(
        output.finish_reason for result in engine.run().values() for output in result.outputs
    )
    assert set(ended) == {"length", "stop", "abort"}
    assert engine.preemptions > 0
    assert engine.used_blocks == 0
    if cache == "radix":
        engine.scheduler.memory.cache.evict(engine.pool.num_blocks * 4)
    assert engine.pool.num_free == engine.pool.num_blocks


class Name:
    """An id that can be referred to weakly: whatever keeps anything of a request keeps this."""


MEMORIES = [(policy, None) for policy in factory.POLICIES] + [
    (policy, cache) for policy in factory.CONTINUOUS for cache in ("hash", "radix")
]


@pytest.mark.parametrize(("policy", "cache"), MEMORIES)
def test_conservation_nothing_is_kept_of_requests_whose_outputs_were_taken(policy, cache):
    """Neither of those that have finished nor of those that were aborted while they waited,
    ran or were preempted, nor after a step that failed.
    """
    engine = Engine(
        served_model(9),
        num_blocks=14,
        block_size=2,
        policy=policy,
        prefix_cache=cache,
        drafter=AdaptiveDrafting(lambda: NGramDrafter(2, shortest=1)),
        max_sequences=6,
        longest=12,
    )
    names: WeakSet[Name] = WeakSet()
    for i in range(24):
        forks = engine.scheduler.memory.can_fork and i % 3 == 0
        options = {"n": 2, "beam": i % 2 == 0} if forks else {}
        name = Name()
        names.add(name)
        engine.submit(Request([1, 2, i % 5, 4], i % 7, request_id=name, **options))
        if i % 5 == 0:
            engine.on_plan = lambda plan: [][0]
            with pytest.raises(IndexError):
                engine.step()
            engine.on_plan = None
        if i % 4 == 0:
            engine.step()
        if i % 11 == 3:
            engine.abort(min(names, key=id))
        engine.check()
    assert len(names) == 24
    assert len(engine.run()) == 24
    del name
    gc.collect()
    assert not names


def test_engine_stats():
    engine = Engine(served_model(), num_blocks=40, block_size=4)
    request = Request(PROMPTS[0], 5, ignore_eos=True)
    engine.submit(request)
    engine.run()
    engine.submit(request)
    engine.run()
    assert (engine.steps, engine.sampled_tokens, engine.preemptions, engine.copied_blocks) == (
        10,
        10,
        0,
        0,
    )
    assert (engine.queried_tokens, engine.cached_tokens, engine.hit_rate) == (
        20,
        8,
        0.4,
    )  # two full blocks of ten tokens
    assert engine.computed_tokens == 14 + 14 - 8
    assert engine.peak_blocks == 4
    assert engine.used_blocks == engine.cached_blocks == 0


@pytest.mark.parametrize("beam", [False, True])
def test_the_preemptions_of_a_request_are_those_of_its_sequences(beam):
    engine = Engine(served_model(), num_blocks=9, block_size=2, prefix_cache=None)
    names = [engine.submit(Request([1, 2], 6, ignore_eos=True)) for _ in range(2)]
    names.append(engine.submit(Request([1, 2, 3], 5, n=2, beam=beam, ignore_eos=True)))
    results = engine.run()
    assert sum(results[name].preemptions for name in names) == engine.preemptions > 0
    assert results[names[-1]].preemptions > 0


def test_used_and_cached_blocks_are_told_apart():
    engine = Engine(served_model(), num_blocks=40, block_size=4, prefix_cache="radix")
    assert engine.hit_rate == 0
    plans = []
    engine.on_plan = plans.append
    engine.submit(Request(PROMPTS[0], 5, ignore_eos=True))
    engine.step()
    assert (engine.used_blocks, engine.cached_blocks) == (3, 0)
    engine.run()
    assert (engine.used_blocks, engine.cached_blocks) == (0, 3)  # 14 tokens: three are full
    assert [plan.step for plan in plans] == list(range(engine.steps)) == list(range(5))


@pytest.mark.parametrize("whole", [True, False], ids=["the model's weights", "a weight of a layer"])
def test_weights_replaced_between_requests_are_used_by_the_next(whole):
    first, other = (tiny_model(seed, vocab_size=257, max_position_embeddings=96) for seed in (3, 4))
    model = Model(first.config, first.weights, first.tokenizer)
    engine = Engine(model, num_blocks=40, block_size=4, prefix_cache=None)

    def run() -> list[int]:
        name = engine.submit(Request([1, 2, 3], 8, ignore_eos=True))
        return engine.run()[name].tokens

    assert run() == model.generate([1, 2, 3], 8, ignore_eos=True)
    if whole:
        model.weights = other.weights
    else:
        model.weights["layers"][0]["up_proj"] = other.weights["layers"][0]["up_proj"]
    fresh = Model(model.config, model.weights, model.tokenizer)
    text = [1, 2, 3]
    for _ in range(8):
        text.append(int(fresh.logits(text)[-1].argmax()))
    assert run() == text[3:]


@pytest.mark.parametrize("drafter", [NGramDrafter(3), "ngram", served_model()])
def test_a_drafter_in_place_of_what_makes_one_is_rejected_at_once(drafter):
    with pytest.raises(ValueError, match="makes one drafter per sequence"):
        Engine(served_model(), num_blocks=8, drafter=drafter)
