"""Constraints: their states, their masks among the logits processors, and generation with them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import to_host
from drafting import PROMPT, SMALL, next_logits, random_model
from grammars import TableGrammar, constrained_logits, is_complete, random_grammar
from processing import processed
from refllm.api import Model
from refllm.decode.constraint import (
    ENDED,
    ILLEGAL,
    ConstraintFailure,
    ConstraintStates,
    NoTokenLeft,
    _Trail,
    check_constraint,
)
from refllm.decode.logits_processors import LogitsProcessors, Row, process_rows
from refllm.decode.sampling_params import SamplingParams
from refllm.decode.speculative.model_drafter import ModelDrafter
from refllm.errors import InputError
from strategies import seeds

V = 5
END = 4
TOKEN_LISTS = st.lists(st.integers(0, V - 1), max_size=7)


def five_token_model(seed: int = 4, **changes: Any) -> Model:
    """A random network of five tokens, of which the last may be an end token."""
    config = replace(SMALL, vocab_size=V, **changes)
    record = random_model(config, seed)
    return Model(record.config, record.weights, record.tokenizer)


# --- states ---------------------------------------------------------------------------------


@pytest.mark.theorem(
    "The state of an output is that of a walk from the start, in whatever order outputs are asked "
    "for and however few of them are remembered",
    source="decode/constraint.py: a state is a function of the output alone",
)
@given(
    seed=seeds,
    outputs=st.lists(TOKEN_LISTS, min_size=1, max_size=12),
    width=st.integers(1, 3),
    ends=st.sampled_from([(), (END,)]),
)
def test_states_do_not_depend_on_what_was_asked_before(seed, outputs, width, ends):
    grammar = random_grammar(seed, V, end_tokens=ends)
    states = ConstraintStates(grammar, V, ends, width)
    rng = np.random.default_rng(seed)
    # near each other, as the outputs of a batch and its drafts are
    walks = [walk(grammar, rng, len(output)) for output in outputs]
    asked = [tokens for pair in zip(outputs, walks, strict=True) for tokens in pair]
    for output in asked + asked[::-1]:
        state = grammar.reads(output)
        mask = states.mask(output)
        if state is False:
            assert states.state(output) is ILLEGAL
            assert mask is None
        else:
            assert mask.tolist() == grammar.mask(state).tolist()
            assert states.state(output) == (ENDED if state is None else state)
        assert states.is_complete(output) == is_complete(grammar, output)
        assert len(states._trails) <= width


def walk(grammar: TableGrammar, rng: np.random.Generator, length: int) -> list[int]:
    """A random legal output of at most ``length`` tokens."""
    output: list[int] = []
    while len(output) < length:
        legal = np.flatnonzero(grammar.mask(grammar.reads(output)))
        if not len(legal):
            break
        output.append(int(rng.choice(legal)))
    return output


def test_a_state_is_computed_once_for_each_token_of_a_growing_output():
    calls: list[int] = []

    class Counting(TableGrammar):
        def advance(self, state, token):
            calls.append(token)
            return super().advance(state, token)

    grammar = Counting([{0: 0, 1: 0}], [0], V)
    states = ConstraintStates(grammar, V)
    output = [0, 1, 1, 0, 1]
    for length in range(6):
        for drafts in ([], [0], [0, 0], [0]):  # a draft that is asked for twice is kept
            states.mask([*output[:length], *drafts])
    assert len(calls) == 5 + 6 * 2 - 4  # where the output goes on as the drafts did, they are kept


def test_sequences_that_grow_side_by_side_keep_their_states():
    calls: list[int] = []

    class Counting(TableGrammar):
        def advance(self, state, token):
            calls.append(token)
            return super().advance(state, token)

    states = ConstraintStates(Counting([{0: 0, 1: 0, 2: 0}], [0], V), V, width=3)
    for length in range(1, 30):
        for token in range(3):
            assert states.state([token] * length) == 0
    assert len(calls) == 3 * 29


def test_end_tokens_are_those_of_the_model():
    """A checkpoint may know another end token than its tokenizer, and more of them."""

    class Kept(TableGrammar):
        """Its masks are its own, and not to be changed; token 4 is text to it."""

        masks = (
            np.array([True, False, False, False, True]),
            np.array([False, False, False, True, False]),
        )

        def mask(self, state):
            return self.masks[state]

        def advance(self, state, token):
            return 1

    grammar = Kept([{0: 1}, {}], [1], 5, end_tokens=[3])
    states = ConstraintStates(grammar, 6, end_tokens=[4, 5])
    for _ in range(2):
        assert states.mask([]).tolist() == [True] + [False] * 5
        assert states.mask([0]).tolist() == [False] * 4 + [True] * 2
    assert states.state([0, 3]) is ILLEGAL
    assert states.state([0, 4]) is ENDED
    assert states.state([4]) is ILLEGAL
    assert states.state([0, 4, 5]) is ILLEGAL
    assert states.is_complete([0])
    assert states.is_complete([0, 5])
    assert not states.is_complete([0, 3])
    assert grammar.masks[0].tolist() == [True, False, False, False, True]
    assert grammar.masks[1].tolist() == [False, False, False, True, False]


def test_none_is_a_state_like_any_other():
    class Free:
        start = None

        def mask(self, state):
            return np.ones(V, bool)

        def advance(self, state, token):
            return None

        def accepting(self, state):
            return True

    states = ConstraintStates(Free(), V)
    assert states.state([0, 1]) is None
    assert states.mask([0, 1]).all()
    assert five_token_model().generate(PROMPT, 3, grammar=Free()) == five_token_model().generate(
        PROMPT, 3
    )


def test_a_grammar_of_a_larger_vocabulary_is_of_another_tokenizer():
    states = ConstraintStates(TableGrammar([{0: 0}], [0], 7), 5)
    with pytest.raises(
        ConstraintFailure, match="7 tokens for a vocabulary of 5.*another tokenizer"
    ):
        states.mask([])


@pytest.mark.parametrize("error", [KeyError("x"), MemoryError(), GeneratorExit()])
def test_what_a_constraint_raises_is_its_failure(error):
    class Failing(TableGrammar):
        def mask(self, state):
            raise error

    states = ConstraintStates(Failing([{0: 0}], [0], V), V)
    with pytest.raises(ConstraintFailure, match=f"the grammar raised {type(error).__name__}"):
        states.mask([])


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_program_is_no_failure_of_a_constraint(error):
    class Failing(TableGrammar):
        def accepting(self, state):
            raise error

    with pytest.raises(error):
        ConstraintStates(Failing([{0: 0}], [0], V), V).mask([])


def test_what_is_no_constraint_is_rejected():
    grammar = TableGrammar([{0: 0}], [0], V)
    check_constraint(None)
    check_constraint(grammar, jumps=True)
    for wrong in ("[0-9]+", TableGrammar, object()):
        with pytest.raises(InputError, match=r"grammar must be one of .*compile"):
            check_constraint(wrong)
    grammar.forced = None  # type: ignore[method-assign, assignment]
    check_constraint(grammar)
    with pytest.raises(InputError, match="TableGrammar has no forced"):
        check_constraint(grammar, jumps=True)
    with pytest.raises(InputError, match="jump_forward needs a grammar"):
        check_constraint(None, jumps=True)


@given(a=st.lists(st.integers(0, 1)), b=st.lists(st.integers(0, 1)), n=st.integers(0, 40))
def test_what_two_outputs_share_is_their_longest_common_prefix(a, b, n):
    a = [0] * n + a
    b = [0] * n + b
    same = _Trail(a, []).shared_length(tuple(b))
    assert a[:same] == b[:same]
    assert same == min(len(a), len(b)) or a[same] != b[same]


# --- masks ----------------------------------------------------------------------------------


def settings_that_fight() -> st.SearchStrategy[SamplingParams]:
    """Settings that would make illegal tokens likely, and that mask some tokens."""
    return st.builds(
        SamplingParams,
        repetition_penalty=st.sampled_from([1.0, 1.7, 0.5]),
        presence_penalty=st.sampled_from([0.0, -3.0]),
        logit_bias=st.sampled_from([None, dict.fromkeys(range(V), 50.0), {0: -50.0, 1: 90.0}]),
        bad_words=st.sampled_from([(), [(0,)], [(1, 2)]]),
        logits_processors=st.sampled_from([(), [lambda output, z: z * 0.0 + 3.0]]),
    )


@pytest.mark.theorem(
    "Whatever bias, penalty or function of the user is set: a token that the grammar forbids has "
    "probability 0, and a legal one has the logit that it has without the grammar",
    source="decode/logits_processors.py, steps 1 and 6",
)
@given(seed=seeds, sampling=settings_that_fight(), minimum=st.integers(0, 3), ends=st.booleans())
def test_illegal_tokens_have_no_probability_whatever_is_set(xp, seed, sampling, minimum, ends):
    end_tokens = (END,) if ends else ()
    grammar = random_grammar(seed, V, end_tokens=end_tokens)
    rng = np.random.default_rng(seed)
    output = walk(grammar, rng, int(rng.integers(0, 4)))
    z = rng.standard_normal((3, V))
    states = ConstraintStates(grammar, V, end_tokens)
    constrained = LogitsProcessors(sampling, minimum, frozenset(end_tokens), states)
    free = LogitsProcessors(sampling, minimum, frozenset(end_tokens))
    rows = [None, Row(constrained, [1], output), Row(free, [1], output)]
    with np.errstate(invalid="ignore"):  # the user's function: 0 · -inf
        expected = processed(z[1], sampling, [1], output, minimum, end_tokens)
    legal = grammar.mask(grammar.reads(output))
    try:
        with np.errstate(invalid="ignore"):
            found = to_host(process_rows(xp.asarray(z), rows))
    except NoTokenLeft:
        banned = {0} if (0,) in sampling.bad_words else set()
        banned |= {2} if (1, 2) in sampling.bad_words and output[-1:] == [1] else set()
        banned |= set(end_tokens) if len(output) < minimum else set()
        assert set(np.flatnonzero(legal)) <= banned
        return
    assert (found[1][~legal] == -np.inf).all()
    if not sampling.logits_processors:
        assert found[1][legal].tolist() == pytest.approx(expected[legal].tolist())
    assert found[0].tolist() == z[0].tolist()


def test_a_users_function_sees_which_tokens_are_legal():
    seen: list[list[float]] = []

    def watch(output: list[int], z: Any) -> Any:
        seen.append(z.tolist())
        return z

    grammar = TableGrammar([{0: 0, 2: 0}], [0], 3)
    sampling = SamplingParams(logits_processors=[watch])
    one = LogitsProcessors(sampling, constraint=ConstraintStates(grammar, 3))
    process_rows(np.zeros((1, 3)), [Row(one, [], [])])
    assert seen == [[0.0, -np.inf, 0.0]]


def test_rows_after_drafts_have_the_masks_of_their_own_states():
    grammar = TableGrammar([{0: 1}, {1: 2}, {2: 0}], [0], 3)
    one = LogitsProcessors(SamplingParams(), constraint=ConstraintStates(grammar, 3))
    rows = [Row(one, [9], [0, 1, 2, 0][:length]) for length in range(5)]
    found = process_rows(np.zeros((5, 3)), rows)
    assert np.isfinite(found).argmax(-1).tolist() == [0, 1, 2, 0, 1]
    assert np.isfinite(found).sum() == 5


def test_where_no_token_is_left_one_sentence_says_why():
    grammar = TableGrammar([{0: 1, 1: 1}, {}], [1], V, end_tokens=[END])

    def process(sampling: SamplingParams, output: list[int], minimum: int = 0) -> None:
        states = ConstraintStates(grammar, V, [END])
        one = LogitsProcessors(sampling, minimum, frozenset([END]), states)
        process_rows(np.zeros((1, V)), [Row(one, [], output)])

    process(SamplingParams(bad_words=[(0,)]), [])
    process(SamplingParams(), [0], minimum=1)
    with pytest.raises(NoTokenLeft, match="the 0 of the output: bad_words forbid all 2 that"):
        process(SamplingParams(bad_words=[(0,), (1,)]), [])
    with pytest.raises(
        NoTokenLeft, match="the 1 of the output: bad_words or min_tokens, 2, forbid"
    ):
        process(SamplingParams(), [0], minimum=2)
    with pytest.raises(NoTokenLeft, match="the grammar allows none"):
        process(SamplingParams(), [0, END])
    with pytest.raises(NoTokenLeft, match="does not allow the tokens of the output"):
        process(SamplingParams(), [2])


# --- generation -----------------------------------------------------------------------------


def stepwise(
    model: Model,
    grammar: TableGrammar,
    max_tokens: int,
    rng: np.random.Generator,
    temperature: float,
    prompt: list[int] = PROMPT,
) -> tuple[list[int], str]:
    """One token at a time from full forwards: the definition of a constrained output."""
    output: list[int] = []
    for _ in range(max_tokens):
        z = constrained_logits(next_logits(model, [*prompt, *output]), grammar, output)
        u = rng.random()
        if temperature == 0:
            token = int(z.argmax())
        else:
            p = np.exp((z - z.max()) / temperature)
            token = int((np.cumsum(p) > u * p.sum()).argmax())
        if token in model.config.eos_token_ids:
            return output, "stop"
        output.append(token)
        if is_complete(grammar, output):
            return output, "stop"
    return output, "length"


@pytest.mark.theorem(
    "A constrained output is sampled token by token from the masked and renormalised distribution; "
    "it ends where the grammar is complete, with or without an end token",
    source="Willard and Louf 2023, section 4; by full forwards",
)
@given(
    seed=seeds,
    ends=st.booleans(),
    temperature=st.sampled_from([0.0, 1.0, 0.7]),
    max_tokens=st.integers(1, 6),
)
def test_generation_is_stepwise_masking(seed, ends, temperature, max_tokens):
    end_tokens = (END,) if ends else ()
    model = five_token_model(eos_token_ids=end_tokens)
    grammar = random_grammar(seed, V, end_tokens=end_tokens)
    expected, reason = stepwise(
        model, grammar, max_tokens, np.random.default_rng(seed), temperature
    )
    options = {"temperature": temperature, "grammar": grammar, "details": True, "rng": seed}
    found = model.generate(PROMPT, max_tokens, **options)
    assert (found.tokens, found.finish_reason, found.stop_reason) == (expected, reason, None)
    chunks = list(model.stream(PROMPT, max_tokens, **options))
    assert [t for chunk in chunks for t in chunk.tokens] == expected
    assert chunks[-1].finish_reason == reason
    assert "".join(chunk.text for chunk in chunks) == found.text
    if reason == "stop":
        assert grammar.accepting(grammar.reads(expected))


@given(seed=seeds, free=st.sets(st.integers(0, 3)), stop=st.booleans())
def test_a_batch_takes_a_grammar_for_each_prompt_or_one_for_all(seed, free, stop):
    model = five_token_model(eos_token_ids=(END,))
    prompts = [[0, 2], [1], [3, 3, 1], [2, 0, 0, 1]]
    grammars = [
        None if b in free else random_grammar(seed + b, V, end_tokens=(END,)) for b in range(4)
    ]
    options: dict[str, Any] = {"stop_token_ids": [1] if stop else []}
    found = model.generate_batch(prompts, 5, grammar=grammars, **options)
    alone = [
        model.generate(prompt, 5, grammar=grammar, **options)
        for prompt, grammar in zip(prompts, grammars, strict=True)
    ]
    assert found == alone
    shared = random_grammar(seed, V, end_tokens=(END,))
    assert model.generate_batch(prompts, 5, grammar=shared, **options) == [
        model.generate(prompt, 5, grammar=shared, **options) for prompt in prompts
    ]
    with pytest.raises(InputError, match="4 prompts need as many grammars, or one, got 2"):
        model.generate_batch(prompts, 5, grammar=[shared, shared])


def test_a_sequence_of_a_batch_that_has_ended_fails_no_other():
    """The stop token ends the first sequence; the bad word would leave it no token later."""
    model = five_token_model()
    dead_end = TableGrammar([{0: 1}, {1: 2}, {2: 0}], [2], V)
    loop = TableGrammar([{3: 0}], [0], V)
    found = model.generate_batch(
        [[0], [1]], 6, grammar=[dead_end, loop], stop_token_ids=[1], bad_words=[(2,)]
    )
    assert found == [[0], [3] * 6]


def test_log_probabilities_are_before_or_after_the_mask_as_the_mode_says():
    model = five_token_model()
    grammar = TableGrammar([{1: 1, 2: 1}, {3: 2}, {}], [2], V)
    for mode in ("raw_logprobs", "processed_logprobs"):
        found = model.generate(
            PROMPT, 5, grammar=grammar, logprobs=-1, logprobs_mode=mode, details=True
        )
        assert len(found.logprobs) == len(found.tokens) == 2
        for i, entry in enumerate(found.logprobs):
            z = next_logits(model, [*PROMPT, *found.tokens[:i]])
            if mode == "processed_logprobs":
                z = constrained_logits(z, grammar, found.tokens[:i])
            logp = z - z.max() - np.log(np.exp(z - z.max()).sum())
            assert [entry[t].logprob for t in range(V)] == pytest.approx(logp.tolist())
        # exactly one token was legal
        assert (found.logprobs[1][3].logprob == 0.0) == (mode == "processed_logprobs")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_device_gets_the_masks_of_a_step_at_once(xp, temperature):
    """The same tokens as on the host, with a drafter and without."""
    host = five_token_model(eos_token_ids=(END,))
    record = random_model(host.config, 4, xp)
    model = Model(record.config, record.weights, record.tokenizer)
    for seed in range(4):
        grammar = random_grammar(seed, V, end_tokens=(END,))
        options: dict[str, Any] = {"grammar": grammar, "temperature": temperature, "rng": seed}
        expected = host.generate(PROMPT, 8, **options)
        assert model.generate(PROMPT, 8, **options) == expected
        # a draft of one token at temperature 0 leaves the tokens as they are
        drafter = ModelDrafter(model, 2)
        if temperature == 0:
            assert model.generate(PROMPT, 8, drafter=drafter, **options) == expected


def test_min_tokens_beyond_the_end_of_a_grammar_is_an_error():
    for ends in ((), (END,)):
        model = five_token_model(eos_token_ids=ends)
        grammar = TableGrammar([{1: 1}, {2: 2}, {}], [1, 2], V, end_tokens=ends)
        assert model.generate(PROMPT, 5, grammar=grammar, min_tokens=2) == [1, 2]
        with pytest.raises(NoTokenLeft, match="the 2 of the output"):
            model.generate(PROMPT, 5, grammar=grammar, min_tokens=3)


def test_ignore_eos_contradicts_a_grammar():
    grammar = random_grammar(0, V)
    with pytest.raises(InputError, match="ignore_eos .* and a grammar ends there"):
        five_token_model().generate(PROMPT, 3, grammar=grammar, ignore_eos=True)


def test_a_grammar_that_allows_everything_changes_nothing():
    model = five_token_model(eos_token_ids=(END,))
    grammar = TableGrammar([dict.fromkeys(range(4), 0)], [0], V, end_tokens=(END,))
    for seed in range(20):
        plain = model.generate(PROMPT, 8, temperature=1.0, rng=seed, details=True)
        same = model.generate(PROMPT, 8, temperature=1.0, rng=seed, details=True, grammar=grammar)
        assert plain == same
