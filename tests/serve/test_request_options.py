"""What users of engines expect of a request, each in a batch with preemption and n > 1.

``test_engine`` draws most of these settings at random and compares with one full forward per
token; here are the cases that need a case of their own.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from refllm.api import Model
from refllm.checkpoints.chat_template import ChatTemplates
from refllm.decode.logprobs import Logprob
from refllm.decode.speculative.interface import Proposal
from refllm.decode.speculative.ngram_drafter import NGramDrafter
from refllm.serve.engine import Engine
from refllm.serve.request import Request
from serving import alone, last_logits, served_model

PROMPT = [1, 2, 3, 4, 5, 6, 7, 8]
MODEL = served_model()
LETTERS = dict.fromkeys(MODEL.tokenizer.encode("abcdefgh"), 9.0)  # a bias towards them


def crowded(**options: Any) -> Engine:
    """An engine with so little memory that three sequences preempt each other."""
    defaults = {"num_blocks": 8, "block_size": 4, "max_batch_tokens": 7, "poison": True}
    return Engine(MODEL, **(defaults | options))


def served(request: Request, callback: Any = None, **options: Any) -> Any:
    """The result of a request among others, after preemption."""
    engine = crowded(**options)
    engine.submit(Request([9, 9, 9, 9, 9], 9, ignore_eos=True, request_id="before"))
    engine.submit(request, callback)
    engine.submit(Request([8, 8, 8, 8, 8], 9, ignore_eos=True, n=2, request_id="after"))
    results = engine.run()
    engine.check()
    assert engine.used_blocks == 0
    # a search that ends early leaves room for the others
    assert (
        engine.preemptions > 0 or request.output.stop_token_ids or (request.beam and request.stop)
    )
    return results[request.request_id]


def log_softmax(z: np.ndarray) -> np.ndarray:
    return z - z.max() - math.log(np.exp(z - z.max()).sum())


# --- where the output ends ------------------------------------------------------------------


def text_stop(request: Request) -> str:
    """A character of the text of the request's output, not its first one."""
    text = MODEL.tokenizer.decode(alone(request)[0])
    return next(c for c in text[3:] if c != "\N{REPLACEMENT CHARACTER}" and text.index(c) > 2)


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("drafter", [None, lambda: NGramDrafter(3, shortest=1)])
def test_stop_reason_is_the_string_that_matched(include, drafter):
    base = {"seed": 3, "temperature": 1.0, "ignore_eos": True, "request_id": "r"}
    whole = Request(PROMPT, 12, **base)
    stop = text_stop(whole)
    text = MODEL.tokenizer.decode(alone(whole)[0])
    asked = Request(
        PROMPT, 12, n=2, stop=["\0\0", stop], include_stop_str_in_output=include, **base
    )
    received: list[Any] = []
    result = served(asked, received.append, drafter=drafter)
    first = result.outputs[0]
    end = text.index(stop) + len(stop) * include
    assert (first.text, first.finish_reason, first.stop_reason) == (text[:end], "stop", stop)
    assert result.stop_reason == stop
    assert stop in MODEL.tokenizer.decode(first.tokens)
    for output in result.outputs:
        mine = [update for update in received if update.index == output.index]
        assert "".join(update.text for update in mine) == output.text
        assert (mine[-1].finish_reason, mine[-1].stop_reason) == (
            output.finish_reason,
            output.stop_reason,
        )


def test_of_several_stop_strings_the_one_that_was_held_back_is_the_reason():
    """ "b" counts unless "bcdef" began there: only the last token or the end token decides."""
    for seed in range(99):  # an output whose last character is a new one, and a whole one
        asked = Request(PROMPT, 7, seed=seed, temperature=1.0, ignore_eos=True)
        *tokens, end = alone(asked)[0]
        text = MODEL.tokenizer.decode(tokens)
        if text[-1].isascii() and text.index(text[-1]) == len(text) - 1 and end not in tokens:
            break
    stops = [text[-1], text[-2:] + "more"]  # the longer one would begin first
    base = {"seed": seed, "temperature": 1.0, "ignore_eos": True, "stop": stops, "request_id": "r"}
    for asked in (Request(PROMPT, 6, **base), Request(PROMPT, 9, stop_token_ids=[end], **base)):
        found = served(asked)
        assert (found.text, found.finish_reason) == (text[:-1], "stop")
        assert found.stop_reason == text[-1]
        assert found.tokens[:6] == tokens


def test_stop_strings_do_not_count_before_min_tokens():
    base = {"logit_bias": LETTERS, "request_id": "r"}
    whole = served(Request(PROMPT, 12, min_tokens=12, **base))
    stop = whole.text[4]
    early = served(Request(PROMPT, 12, stop=stop, **base))
    assert early.tokens == whole.tokens[: whole.text.index(stop) + 1]
    counts = len(early.tokens)  # its last token is where the stop string ends
    again = whole.text.find(stop, counts)
    late = served(Request(PROMPT, 12, stop=stop, min_tokens=counts, **base))
    assert late.tokens == (whole.tokens if again < 0 else whole.tokens[: again + 1])
    exact = served(Request(PROMPT, 12, stop=stop, min_tokens=counts - 1, **base))
    assert exact.tokens == early.tokens


def test_min_tokens_masks_the_end_token_in_beams():
    asked = Request(PROMPT, 8, n=3, beam=True, min_tokens=5, request_id="r", logit_bias={5: 9.0})
    result = served(asked, num_blocks=12)
    assert all(len(output.tokens) >= 5 for output in result.outputs)
    assert any(output.finish_reason == "stop" for output in result.outputs)


# --- beams ----------------------------------------------------------------------------------


def beam_search(**options: Any) -> Any:
    """The result of a search over letters that is preempted."""
    options = {"ignore_eos": True, "logit_bias": LETTERS, "request_id": "r"} | options
    options["length_penalty"] = 0.0  # short outputs are better
    return served(Request(PROMPT, 8, n=3, beam=True, **options), num_blocks=12)


def test_a_beam_search_stops_at_strings_and_stop_tokens():
    best = beam_search().outputs[0]
    assert best.finish_reason == "length"
    token = best.tokens[3]
    found = beam_search(stop_token_ids=[token])
    ended = [o for o in found.outputs if o.stop_reason == token]
    assert ended
    assert all(token not in o.tokens and o.finish_reason == "stop" for o in ended)
    stop = best.text[3]
    for include in (False, True):
        found = beam_search(stop=stop, include_stop_str_in_output=include)
        ended = [o for o in found.outputs if o.stop_reason == stop]
        assert ended
        for output in ended:
            whole = MODEL.tokenizer.decode(output.tokens)
            assert whole.index(stop) == len(whole) - 1
            assert output.text == (whole if include else whole[:-1])
            assert output.finish_reason == "stop"
        assert all(stop not in o.text for o in found.outputs if o not in ended)
    # a stop string of one letter ends what the letter's token ends
    assert [o.text for o in beam_search(stop=stop).outputs] == [o.text for o in beam_search(
        stop_token_ids=MODEL.tokenizer.encode(stop)).outputs]  # fmt: skip


def test_a_beam_whose_last_text_completes_a_stop_string_says_so():
    """ "h" is complete, whatever "ghmore" that began before it would have needed."""
    word = MODEL.tokenizer.encode("abcdefgh")

    def spells(output, z):
        z[word[len(output)]] = 50.0
        return z

    best = beam_search(logits_processors=[spells], stop=["h", "ghmore"]).outputs[0]
    assert best.tokens == word
    assert (best.text, best.finish_reason, best.stop_reason) == ("abcdefg", "stop", "h")


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
def test_beams_have_the_logprobs_of_their_tokens(mode):
    asked = Request(
        PROMPT,
        8,
        n=3,
        beam=True,
        logprobs=2,
        logprobs_mode=mode,
        logit_bias={9: 1.5},
        request_id="r",
    )
    result = served(asked, num_blocks=12)
    for output in result.outputs:
        tokens = [next(iter(entry)) for entry in output.logprobs]
        assert tokens[: len(output.tokens)] == output.tokens
        for i, entry in enumerate(output.logprobs):
            z = last_logits((*PROMPT, *tokens[:i])).copy()
            z[9] += 1.5 * (mode == "processed_logprobs")
            log_p = log_softmax(z)
            best = np.argsort(-log_p, kind="stable")[:2].tolist()
            assert set(entry) == {tokens[i], *best}
            assert abs(entry[tokens[i]].logprob - log_p[tokens[i]]) <= 1e-12
        if mode == "processed_logprobs":  # what the search itself adds up
            mean = output.cumulative_logprob / len(output.logprobs)
            assert abs(mean - output.score) <= 1e-11


# --- log-probabilities ----------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["hash", "radix"])
def test_prompt_logprobs_do_not_read_the_prefix_cache(cache):
    """Every prompt token is computed, so that each has its logits; others still find it."""
    engine = Engine(MODEL, num_blocks=40, block_size=4, prefix_cache=cache, poison=True)
    engine.submit(Request(PROMPT, 2))
    engine.run()
    scored = engine.submit(Request(PROMPT, 2, prompt_logprobs=0))
    before = engine.computed_tokens
    result = engine.run()[scored]
    assert engine.computed_tokens - before == len(PROMPT) + 1
    assert len(result.prompt_logprobs) == len(PROMPT)
    engine.submit(Request([*PROMPT, 9], 1))
    before = engine.computed_tokens
    engine.run()
    assert engine.computed_tokens - before == 1
    engine.check()


@pytest.mark.parametrize("cache", ["hash", "radix"])
@pytest.mark.parametrize("start", [0, 1, 4, 5, 6, len(PROMPT) - 1, len(PROMPT), 99])
def test_prompt_tokens_before_the_start_of_their_logprobs_are_read_from_the_cache(cache, start):
    """The logits before position ``start`` are needed, those before that are not."""
    engine = Engine(MODEL, num_blocks=40, block_size=4, prefix_cache=cache, poison=True)
    engine.submit(Request(PROMPT, 2))
    engine.run()
    scored = engine.submit(Request(PROMPT, 1, prompt_logprobs=0, prompt_logprobs_start=start))
    before = engine.computed_tokens
    found = engine.run()[scored].prompt_logprobs
    cached = min(max(0, start - 1), len(PROMPT) - 1) // 4 * 4
    assert engine.computed_tokens - before == len(PROMPT) - cached
    first = min(max(1, start), len(PROMPT))
    assert found[:first] == [None] * first
    assert len(found) == len(PROMPT)
    for i in range(first, len(PROMPT)):
        log_p = log_softmax(last_logits(tuple(PROMPT[:i])))
        assert abs(found[i][PROMPT[i]].logprob - log_p[PROMPT[i]]) <= 1e-12
    engine.check()


def test_prompt_logprobs_survive_preemption_and_come_once():
    asked = Request(PROMPT, 9, n=2, prompt_logprobs=1, ignore_eos=True, request_id="r", seed=1)
    result = served(asked, long_prefill=3)
    assert result.preemptions > 0
    for i, entry in enumerate(result.prompt_logprobs[1:], 1):
        log_p = log_softmax(last_logits(tuple(PROMPT[:i])))
        assert abs(entry[PROMPT[i]].logprob - log_p[PROMPT[i]]) <= 1e-12
        assert isinstance(entry[PROMPT[i]], Logprob)


def test_processed_logprobs_in_a_batch_are_of_the_drawn_distribution():
    asked = Request(
        PROMPT,
        9,
        n=2,
        seed=1,
        temperature=0.7,
        top_k=3,
        logprobs=0,
        logprobs_mode="processed_logprobs",
        ignore_eos=True,
        request_id="r",
    )
    for output in served(asked).outputs:
        for i, (token, entry) in enumerate(zip(output.tokens, output.logprobs, strict=True)):
            z = last_logits((*PROMPT, *output.tokens[:i])) / 0.7
            three = np.sort(z)[-3:]
            expected = z[token] - three.max() - math.log(np.exp(three - three.max()).sum())
            assert abs(entry[token].logprob - expected) <= 1e-11


def test_streamed_updates_have_the_logprobs_of_their_tokens():
    received: list[Any] = []
    asked = Request(
        PROMPT, 9, n=2, seed=1, temperature=1.0, logprobs=1, ignore_eos=True, request_id="r"
    )
    result = served(asked, received.append, drafter=lambda: NGramDrafter(3, shortest=1))
    for output in result.outputs:
        mine = [update for update in received if update.index == output.index]
        assert [entry for update in mine for entry in update.logprobs] == output.logprobs
        assert all(len(update.logprobs) == len(update.tokens) for update in mine)


# --- best_of --------------------------------------------------------------------------------


def test_best_of_returns_the_most_probable_outputs_best_first():
    base = {"seed": 1, "temperature": 1.0, "ignore_eos": True, "request_id": "r", "logprobs": 0}
    every = served(Request(PROMPT, 6, n=4, **base)).outputs
    ranked = sorted(every, key=lambda output: -output.cumulative_logprob)
    result = served(Request(PROMPT, 6, n=2, best_of=4, **base))
    assert [o.tokens for o in result.outputs] == [o.tokens for o in ranked[:2]]
    assert [o.index for o in result.outputs] == [0, 1]
    assert [o.logprobs for o in result.outputs] == [o.logprobs for o in ranked[:2]]
    unasked = served(Request(PROMPT, 6, n=2, best_of=4, **(base | {"logprobs": None})))
    assert [o.tokens for o in unasked.outputs] == [o.tokens for o in ranked[:2]]
    assert all(o.logprobs is None for o in unasked.outputs)


def test_best_of_is_neither_streamed_nor_a_beam_search():
    engine = crowded()
    with pytest.raises(ValueError, match="submit it without a callback"):
        engine.submit(Request(PROMPT, 2, n=1, best_of=2), print)
    with pytest.raises(ValueError, match="best_of must be at least n, 3"):
        Request(PROMPT, 2, n=3, best_of=2)
    with pytest.raises(ValueError, match="None for a beam search"):
        Request(PROMPT, 2, n=2, best_of=2, beam=True)
    assert engine.submit(Request(PROMPT, 0, n=1, best_of=2, request_id="none")) == "none"
    assert [o.tokens for o in engine.run()["none"].outputs] == [[]]


# --- prompts --------------------------------------------------------------------------------


def test_a_text_prompt_is_encoded_as_generate_encodes_it():
    asked = Request("abcd", 9, n=2, ignore_eos=True, request_id="r")
    result = served(asked)
    assert result.prompt == "abcd"
    assert list(result.request.prompt) == MODEL.tokenizer.encode("abcd", special=True)
    assert [o.text for o in result.outputs] == [MODEL.generate("abcd", 9, ignore_eos=True)] * 2
    assert result.prompt_tokens == len(result.request.prompt)


def test_messages_are_rendered_by_the_chat_template():
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if "
    template += "add_generation_prompt %}<assistant>{% endif %}"
    templates = ChatTemplates({"default": template})
    model = Model(MODEL.config, MODEL.weights, MODEL.tokenizer, chat_templates=templates)
    engine = Engine(model, num_blocks=20, block_size=4)
    messages = [{"role": "user", "content": "Hi"}]
    engine.submit(Request(messages, 5, request_id="r"))
    result = engine.run()["r"]
    assert model.tokenizer.decode(result.request.prompt) == "<user>Hi<assistant>"
    assert result.text == model.chat(messages, 5)
    assert result.prompt == (messages[0],)
    plain = SimpleNamespace(config=MODEL.config, weights=MODEL.weights, tokenizer=MODEL.tokenizer)
    with pytest.raises(ValueError, match="messages need a model with a chat template"):
        Engine(plain, num_blocks=20).submit(Request(messages, 5))


def test_a_long_prompt_is_truncated_from_the_left():
    whole = served(Request(PROMPT, 9, ignore_eos=True, request_id="r"))
    longer = Request([9, 9, *PROMPT], 9, ignore_eos=True, request_id="r", truncate_prompt_tokens=8)
    cut = served(longer)
    assert cut.tokens == whole.tokens
    assert list(cut.request.prompt) == PROMPT
    engine = Engine(MODEL, num_blocks=60, block_size=4)
    engine.submit(Request([7] * 200, 6, request_id="r", truncate_prompt_tokens=-1))
    assert len(engine.run()["r"].request.prompt) == 96 - 6  # room for the output is left
    with pytest.raises(ValueError, match="no token ids yet"):
        engine.scheduler.submit(Request("text", 5))
    with pytest.raises(ValueError, match="no Unicode"):
        engine.submit(Request("a\ud800", 5))


# --- time and counts ------------------------------------------------------------------------


class Clock:
    """Seconds that the test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("beam", [False, True])
def test_a_request_times_out_with_what_it_has(beam):
    clock = Clock()
    received: list[Any] = []
    engine = Engine(MODEL, num_blocks=14, block_size=4, poison=True, clock=clock)
    engine.submit(Request(PROMPT, 9, n=3, beam=beam, timeout=5.0, request_id="r", ignore_eos=True),
                  received.append)  # fmt: skip
    engine.submit(Request([9, 9], 9, ignore_eos=True, request_id="other", timeout=99.0))
    for second in range(1, 6):
        engine.step()
        clock.now = float(second)
    assert engine.results == {}
    engine.step()  # at its beginning 5 seconds have passed
    result = engine.results["r"]
    assert {o.finish_reason for o in result.outputs} == {"timeout"}
    assert {len(o.tokens) for o in result.outputs} == {5}
    assert result.text == MODEL.tokenizer.decode(result.tokens)
    assert [update.finish_reason for update in received if update.finish_reason] == ["timeout"] * 3
    engine.check()
    assert len(engine.run()["other"].tokens) == 9
    assert engine.used_blocks == 0


def test_a_waiting_request_times_out_and_its_id_may_be_used_again():
    clock = Clock()
    engine = Engine(MODEL, num_blocks=14, block_size=4, max_sequences=1, clock=clock)
    engine.submit(Request(PROMPT, 9, ignore_eos=True))
    engine.submit(Request([3], 2, request_id="late", timeout=1.0))
    engine.step()
    clock.now = 1.0
    engine.step()
    late = engine.results.pop("late")
    assert (late.tokens, late.finish_reason) == ([], "timeout")
    engine.submit(Request([3], 2, request_id="late", timeout=1.5, ignore_eos=True))
    engine.abort("late")
    engine.results.pop("late")
    engine.submit(Request([3], 2, request_id="late", timeout=50.0, ignore_eos=True))
    clock.now = 2.6  # the deadline of the one that was aborted
    assert len(engine.run()["late"].tokens) == 2


def test_counts_of_requests_add_up_to_those_of_the_engine():
    clock = Clock()
    engine = crowded(drafter=lambda: NGramDrafter(3, shortest=1), clock=clock)
    engine.submit(Request(PROMPT, 2, ignore_eos=True, request_id="first"))
    engine.run()
    before = engine.computed_tokens
    clock.now = 10.0
    for name, n in (("a", 1), ("b", 3), ("c", 1)):
        engine.submit(Request([*PROMPT, 9, 9], 9, n=n, ignore_eos=True, request_id=name))
        clock.now += 1.0
    first = {}
    while engine.unfinished:
        for update in engine.step():
            if update.tokens:
                first.setdefault(update.request_id, clock.now)
        clock.now += 1.0
    results = engine.run()
    assert sum(r.computed_tokens for r in results.values()) == engine.computed_tokens - before
    assert sum(r.preemptions for r in results.values()) == engine.preemptions > 0
    assert results["a"].cached_tokens == 8
    assert results["a"].prompt_tokens == 10
    assert results["b"].generated_tokens == 27
    assert sum(r.drafted_tokens for r in results.values()) > 0
    for r in results.values():
        assert 0 <= r.accepted_tokens <= r.drafted_tokens
        name = r.request.request_id
        assert r.time_to_first_token == first[name] - r.submitted_at
        assert r.finished_at >= r.first_token_at


def test_accepted_drafts_are_counted():
    """A loop of the output is drafted by its own n-grams, and every draft is accepted."""
    asked = Request([3], 20, logit_bias={7: 1e4}, ignore_eos=True, request_id="r")
    engine = Engine(MODEL, num_blocks=14, block_size=4, drafter=lambda: NGramDrafter(4, shortest=1))
    engine.submit(asked)
    result = engine.run()["r"]
    assert result.tokens == [7] * 20
    assert result.drafted_tokens == result.accepted_tokens > 10
    assert result.computed_tokens == engine.computed_tokens == 20


def test_rejected_drafts_count_as_computed():
    class Wrong:
        gamma = 3

        def propose(self, tokens, count, sampling, rng):
            return Proposal([0] * count, None)

        def observe(self, best, accepted):
            pass

    engine = Engine(MODEL, num_blocks=14, block_size=4, drafter=Wrong)
    engine.submit(Request(PROMPT, 9, ignore_eos=True, request_id="r", bad_words=[(0,)]))
    result = engine.run()["r"]
    assert result.accepted_tokens == 0 < result.drafted_tokens
    assert result.computed_tokens == engine.computed_tokens == 8 + 8 + result.drafted_tokens


def test_an_end_token_that_a_processor_forces_counts_from_min_tokens_on():
    """The mask is gone, and still no output is shorter, as in vLLM."""

    def forces(output, z):
        z[5] = 1e3
        return z

    result = served(Request(PROMPT, 9, min_tokens=3, logits_processors=[forces], request_id="r"))
    assert (result.tokens, result.finish_reason) == ([5, 5], "stop")


def test_a_step_that_fails_leaves_no_logprobs_behind():
    engine = Engine(MODEL, num_blocks=14, block_size=4)
    engine.submit(Request(PROMPT, 5, ignore_eos=True, request_id="r", logprobs=0))
    engine.step()
    update = engine.scheduler.update

    def fails(plan, outcomes):
        raise RuntimeError("lost")

    engine.scheduler.update = fails
    with pytest.raises(RuntimeError, match="lost"):
        engine.step()
    engine.scheduler.update = update
    (output,) = engine.run()["r"].outputs
    assert [next(iter(entry)) for entry in output.logprobs] == output.tokens


@pytest.mark.parametrize("min_tokens", [2, 3])
def test_half_a_character_at_the_end_completes_no_stop_string_before_min_tokens(min_tokens):
    """It is held back until the output ends, and shown as the replacement character."""
    model = served_model()
    half = next(t for t in range(257) if model.tokenizer.decode([t]) == "\ufffd")
    options: dict[str, Any] = {
        "logits_processors": [lambda output, z: z - 1e9 * (np.arange(257) != half)],
        "stop": "\ufffd\ufffd\ufffd",
        "min_tokens": min_tokens,
        "ignore_eos": True,
    }
    engine = Engine(model, num_blocks=20)
    engine.submit(Request([1, 2], 3, "r", **options))
    engine.submit(Request([1, 2], 3, "streams", **options), lambda update: None)
    results = engine.run()
    reason = "stop" if min_tokens == 2 else "length"
    for result in (
        results["r"],
        results["streams"],
        model.generate([1, 2], 3, details=True, **options),
    ):
        assert result.finish_reason == reason
        assert len(result.tokens) == 3
        assert result.text == ("" if min_tokens == 2 else "\ufffd" * 3)


def test_best_of_prefers_complete_outputs_to_those_that_were_cut_off():
    time = [0.0]
    engine = Engine(served_model(), num_blocks=80, block_size=4, clock=lambda: time[0])
    options: dict[str, Any] = {"temperature": 1.0, "seed": 4, "timeout": 12, "logprobs": 0}
    options["stop_token_ids"] = list(range(0, 250, 12))
    engine.submit(Request([1, 2, 3], 30, "all", n=6, **options))
    engine.submit(Request([1, 2, 3], 30, "best", n=3, best_of=6, **options))
    while engine.unfinished:
        time[0] += 1
        engine.step()
    results = engine.run()
    sums: dict[str, list[float]] = {"stop": [], "timeout": []}
    for output in results["all"].outputs:
        sums[output.finish_reason].append(output.cumulative_logprob)
    assert len(sums["stop"]) == 3
    assert max(sums["timeout"]) > min(sums["stop"]), "a shorter output has a larger sum"
    best = [output.cumulative_logprob for output in results["best"].outputs]
    assert best == pytest.approx(sorted(sums["stop"], reverse=True), abs=1e-9)
