"""``load``, ``Model`` and the static batch: what is generated is what the network says,
however it is computed.

Equality of tokens across batch sizes and cache layouts is asserted in float64, where the
two largest logits of these networks are never within rounding of each other: the helper
``greedy_by_hand`` asserts that they were not.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fakecupy
import refllm
from chat_models import chat_model
from conftest import to_host
from refllm.api import Model, load
from refllm.checkpoints.chat_template import ChatTemplates
from refllm.checkpoints.sources import BUNDLED
from refllm.checkpoints.tensor_files import CheckpointError
from refllm.checkpoints.writer import save
from refllm.decode import generate
from refllm.decode.generate import generate_tokens
from refllm.decode.sampling_params import SamplingParams
from refllm.errors import InputError
from refllm.kv.kivi import Kivi
from tiny_models import byte_tokenizer, tiny_config, tiny_model, tiny_params

V = 257
prompts = st.lists(st.integers(0, V - 1), min_size=1, max_size=12)


def network(seed: int = 0, *, xp=np, dtype: str = "float64", **changes) -> Model:
    made = tiny_model(seed, xp=xp, dtype=dtype, **changes)
    return Model(made.config, made.weights, made.tokenizer)


MODEL = network()
ENDLESS = network(eos_token_ids=())


def greedy_by_hand(model: Model, prompt: list[int], count: int) -> list[int]:
    """The argmax of a full forward, again and again: no cache, no batch."""
    tokens = list(prompt)
    for _ in range(count):
        z = np.sort(model.logits(tokens)[-1])
        assert z[-1] - z[-2] > 1e-9 * np.abs(z).max(), (
            "a tie: the test could not tell right from wrong"
        )
        tokens.append(int(model.logits(tokens)[-1].argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    config = tiny_config()
    save(path, config, tiny_params(config, 0, "float32"), byte_tokenizer(), dtype="float32")
    return path


# --- loading ------------------------------------------------------------------------------


def test_a_directory_gives_config_weights_and_tokenizer(directory):
    model = refllm.load(directory, backend="numpy", dtype="float64")
    assert model.config == tiny_config()
    assert model.weights["norm"].dtype == np.float64
    assert model.tokenizer.decode(model.tokenizer.encode("def f():")) == "def f():"
    expected = network(dtype="float32")  # the same seed: what was saved
    np.testing.assert_array_equal(
        load(directory, backend="numpy").logits([0, 5, 9]), expected.logits([0, 5, 9]), strict=True
    )


def test_a_path_may_begin_with_the_home_directory(directory, monkeypatch):
    monkeypatch.setenv("HOME", str(directory.parent))
    assert load("~/tiny").config == tiny_config()


@pytest.mark.parametrize("name", ["stdlib", "stdlib-draft"])
def test_a_bundled_model_is_found_by_its_name(name):
    model = load(name)
    assert model.config.vocab_size == model.tokenizer.vocab_size == 4096
    assert (BUNDLED / name / "model.safetensors").stat().st_size < 12e6
    assert isinstance(model.generate("import ", 3), str)


def test_what_is_neither_a_folder_nor_bundled_is_rejected(tmp_path):
    for path in (str(tmp_path / "nowhere"), "~no-user-of-that-name/x"):
        with pytest.raises(CheckpointError, match="does not exist: pass the path of"):
            load(path)
    with pytest.raises(CheckpointError, match="neither a folder nor a bundled model"):
        load("x" * 5000)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        load(tmp_path / "file")


# --- logits -------------------------------------------------------------------------------


@pytest.mark.theorem(
    "A token's logits do not depend on what comes after it", source="Vaswani et al. 2017, §3.2.3"
)
@given(prompts, st.integers(0, V - 1))
def test_logits_are_causal(tokens, extra):
    z = MODEL.logits(tokens)
    # sums over at most 24 products in 2 layers of 7 products each: 24 · 14 · eps, and the
    # softmax's own share
    np.testing.assert_allclose(
        MODEL.logits([*tokens, extra])[:-1], z, rtol=0, atol=1e-12 * np.abs(z).max()
    )


@pytest.mark.parametrize(
    "tokens",
    [[], [-1], [V], [1.5], [[1, 2]], np.array([0.0]), np.array([[1]]), np.array([], np.int64)],
)
def test_logits_rejects_what_is_no_sequence_of_known_tokens(tokens):
    with pytest.raises(ValueError, match="logits:"):
        MODEL.logits(tokens)


# --- generation ---------------------------------------------------------------------------


@pytest.mark.theorem(
    "Greedy decoding against the cache gives the tokens of the full forward pass repeated",
    source="causality: what is cached is what would be recomputed",
)
@given(prompts, st.integers(0, 8))
def test_cached_generation_equals_repeated_full_forward(prompt, count):
    assert ENDLESS.generate(prompt, count) == greedy_by_hand(ENDLESS, prompt, count)


@pytest.mark.theorem(
    "A sequence's tokens do not depend on its neighbours in the batch", source="ragged batching"
)
@given(st.lists(prompts, min_size=1, max_size=5))
def test_a_ragged_batch_gives_what_each_prompt_gives_alone(batch):
    together = ENDLESS.generate_batch(batch, 6)
    assert together == [greedy_by_hand(ENDLESS, prompt, 6) for prompt in batch]


@pytest.mark.theorem(
    "A prefill in any passes gives the tokens of one pass: chunked prefill = prefill",
    source="serving arithmetic",
)
@given(st.lists(prompts, min_size=1, max_size=5), st.integers(1, 9))
def test_a_prefill_in_several_passes_is_one_prefill(batch, budget):
    together = ENDLESS.generate_batch(batch, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "PREFILL_TOKENS", budget)
        assert ENDLESS.generate_batch(batch, 4) == together


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(1, 30))
def test_conservation_passes_bring_every_token_once_and_cut_only_what_fills_a_pass(lengths, budget):
    plan = list(generate.prefill_chunks(lengths, budget))
    assert [sum(column) for column in zip(*plan, strict=True)] == lengths
    assert all(0 < sum(counts) <= budget for counts in plan[:-1])
    assert 0 < sum(plan[-1]) <= budget + budget // 4
    # a small rest goes along
    assert all(sum(map(sum, plan[i:])) > budget + budget // 4 for i in range(len(plan) - 1))
    begun = [0] * len(lengths)
    for counts in plan:
        for b, n in enumerate(counts):
            begun[b] += n
            if n and begun[b] < lengths[b]:
                assert n == budget  # cut, and alone in its pass
    for one, two in pairwise(plan):  # no pass has room for the prompt that follows it
        following = next(b for b, n in enumerate(two) if n)
        assert sum(one) + lengths[following] > budget


def test_a_batch_goes_on_until_its_last_sequence_has_ended():
    """The end token is one that some sequence goes on after, and that comes at different
    steps, or never, in others.
    """
    batch = [[0, 7], [3], [9, 8, 7, 6], [100]]
    free = ENDLESS.generate_batch(batch, 12)

    def cut(end: int) -> list[list[int]]:
        return [ids[: ids.index(end)] if end in ids else ids for ids in free]

    def tells(end: int) -> bool:
        goes_on = any(end in ids and set(ids[ids.index(end) :]) != {end} for ids in free)
        return goes_on and len({len(ids) for ids in cut(end)}) > 1

    end = next(token for ids in free for token in ids if tells(token))
    model = network(eos_token_ids=(end,))
    assert model.generate_batch(batch, 12) == cut(end)
    assert model.generate_batch(batch, 12, ignore_eos=True) == free


def test_text_gives_text_and_only_what_is_new():
    ids = MODEL.tokenizer.encode("def f", special=True)
    assert ids[0] == MODEL.config.bos_token_id  # the prompt begins as the tokenizer's file says
    expected = MODEL.tokenizer.decode(MODEL.generate(ids, 20))
    assert MODEL.generate("def f", 20) == expected
    assert "".join(MODEL.stream("def f", 20)) == expected


@given(st.integers(0, 2**32 - 1), st.floats(0.5, 2.0))
def test_streamed_pieces_join_to_the_decoded_tokens_and_every_token_is_reported(seed, temperature):
    """Half of these tokens are single bytes of broken UTF-8: no piece may end inside a
    character.
    """
    tokens: list[int] = []
    sampling = SamplingParams(temperature=temperature)
    pieces = list(ENDLESS.stream("x", 24, sampling=sampling, rng=seed, on_token=tokens.append))
    assert len(tokens) == 24
    assert "".join(pieces) == ENDLESS.tokenizer.decode(tokens)
    assert all(pieces)
    assert tokens == ENDLESS.generate(
        ENDLESS.tokenizer.encode("x", special=True), 24, temperature=temperature, rng=seed
    )


@given(st.integers(0, 23), st.integers(1, 3))
def test_generation_ends_before_the_first_stop_string(start, length):
    whole = ENDLESS.generate("x", 24)
    stop = whole[start : start + length]
    if stop:
        assert ENDLESS.generate("x", 24, stop=[stop]) == whole[: whole.index(stop)]
        # one string is one stop
        assert ENDLESS.generate("x", 24, stop=stop) == whole[: whole.index(stop)]


def test_the_end_token_is_reported_but_no_part_of_the_text():
    prompt = ENDLESS.tokenizer.encode("x", special=True)
    free = ENDLESS.generate(prompt, 5)
    model = network(eos_token_ids=(free[2],))
    seen = []
    first = free.index(free[2])
    assert model.generate(prompt, 5) == free[:first]
    list(model.stream("x", 5, on_token=seen.append))
    assert seen == free[: first + 1]


def test_the_same_seed_gives_the_same_tokens_and_another_gives_others():
    runs = [ENDLESS.generate([0, 1], 30, temperature=1.5, rng=seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_greedy_generation_uses_no_randomness():
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    ENDLESS.generate([0, 1], 5, rng=rng)
    assert rng.bit_generator.state == before


@given(prompts, st.integers(0, 2**32 - 1))
def test_top_one_is_greedy_at_any_temperature(prompt, seed):
    expected = ENDLESS.generate(prompt, 5)
    assert ENDLESS.generate(prompt, 5, temperature=2.0, top_k=1, rng=seed) == expected
    assert ENDLESS.generate(prompt, 5, temperature=2.0, top_p=1e-9, rng=seed) == expected
    assert ENDLESS.generate(prompt, 5, temperature=2.0, min_p=1.0, rng=seed) == expected


@given(prompts)
def test_the_repetition_penalty_counts_prompt_and_output(prompt):
    penalty = 1.7
    tokens = list(prompt)
    for _ in range(5):
        z = ENDLESS.logits(tokens)[-1].copy()
        for t in set(tokens):
            z[t] = z[t] / penalty if z[t] > 0 else z[t] * penalty
        tokens.append(int(z.argmax()))
    assert ENDLESS.generate(prompt, 5, repetition_penalty=penalty) == tokens[len(prompt) :]


@pytest.mark.parametrize(
    ("prompt", "count", "options", "message"),
    [
        ([], 1, {}, "empty"),
        ([0.5], 1, {}, "no integer"),
        ([V], 1, {}, f"within 0..{V - 1}"),
        ([-1], 1, {}, "within 0"),
        ([0], -1, {}, "max_tokens"),
        ([0], 2.0, {}, "max_tokens must be an integer"),
        ([0], "3", {}, "max_tokens must be an integer"),
        ([0], None, {}, "max_tokens must be an integer"),
        (b"ab", 1, {}, "sequence of token ids"),  # two bytes would pass for two ids
        (7, 1, {}, "sequence of token ids"),
        (None, 1, {}, "sequence of token ids"),
        ([[0, 1]], 1, {}, "no integer"),
        ("a\ud800", 1, {}, "character 1 of the text is no Unicode"),
        ([0], 2048, {}, "positions"),
        ([0], 1, {"temperature": -1.0}, "temperature"),
        ([0], 1, {"temperature": float("nan")}, "temperature"),
        ([0], 1, {"temperature": float("inf")}, "temperature"),
        ([0], 0, {"temperature": "1"}, "temperature must be a number, got '1'"),
        ([0], 0, {"temperature": float("inf")}, "temperature"),  # also where nothing is drawn
        ([0], 1, {"top_k": -1}, "top_k"),
        ([0], 0, {"top_k": 1.5}, "top_k must be 0"),
        ([0], 0, {"top_p": None}, "top_p must be a number"),
        ([0], 0, {"repetition_penalty": float("inf")}, "repetition_penalty must be finite"),
        ([0], 1, {"top_p": 0.0}, "top_p"),
        ([0], 1, {"top_p": 1.1}, "top_p"),
        ([0], 1, {"min_p": 1.1}, "min_p"),
        ([0], 1, {"repetition_penalty": 0.0}, "repetition_penalty"),
        ([0], 1, {"stop": [""]}, "stop must be strings that are not empty"),
        ([0], 1, {"min_tokens": 2}, "min_tokens must be at most max_tokens, 1, got 2"),
        ([0], 1, {"logprobs": 1}, "pass details=True"),
        ([0], 1, {"stop_token_ids": [2**20]}, "outside the vocabulary"),
        ([0], 1, {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens must be"),
        ([0], 1, {"sampling": SamplingParams(), "top_k": 1}, r"either sampling=.*\(top_k\), not"),
        ([0], 1, {"sampling": 0.7}, "sampling must be a SamplingParams"),
    ],
)
def test_bad_requests_are_rejected_by_name(prompt, count, options, message):
    with pytest.raises(ValueError, match=message):
        MODEL.generate(prompt, count, **options)


def test_the_keywords_of_sampling_are_a_shorthand_everywhere():
    shorthand = {
        "temperature": 1.5,
        "top_k": 9,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition_penalty": 1.3,
    }
    sampling = SamplingParams(**shorthand)

    def run(**options):
        return [
            ENDLESS.generate([0, 1], 12, rng=1, **options),
            ENDLESS.generate("x", 12, rng=1, **options),
            ENDLESS.generate("x", 12, rng=1, stop="\0\0", **options),
            "".join(ENDLESS.stream("x", 12, rng=1, **options)),
            ENDLESS.generate_batch([[0, 1], [2]], 12, rng=1, **options),
        ]

    assert run(**shorthand) == run(sampling=sampling)
    assert run(**shorthand) != run()
    for call in (
        lambda **options: ENDLESS.generate_batch([[0]], 1, **options),
        lambda **options: list(ENDLESS.stream("x", 1, **options)),
    ):
        with pytest.raises(ValueError, match=r"either sampling=.*\(temperature\), not both"):
            call(sampling=sampling, temperature=1.5)


def test_a_drafter_is_an_object():
    with pytest.raises(
        TypeError,
        match=r"a drafter is a Model, or one of refllm.decode.speculative .* got 'ngram'",
    ):
        MODEL.generate([1], 2, drafter="ngram")


def test_no_prompt_at_all_is_rejected():
    with pytest.raises(ValueError, match="no prompt"):
        MODEL.generate_batch([], 3)


@pytest.mark.parametrize(
    "prompts", ["ab", b"ab", ["ab"], [b"ab"], [1, 2], [None], None, [np.array(1)]]
)
def test_a_batch_of_what_is_no_token_prompt_is_rejected(prompts):
    with pytest.raises(ValueError, match="a prompt must be a sequence of token ids"):
        MODEL.generate_batch(prompts, 1)


def test_a_batch_may_be_an_array_or_made_of_iterators_and_is_left_as_it_was(xp):
    batch = [[1, 2], [3, 4]]
    expected = ENDLESS.generate_batch(batch, 3)
    array = np.array(batch, np.uint8)
    assert (
        ENDLESS.generate_batch(array, 3) == ENDLESS.generate_batch(xp.asarray(batch), 3) == expected
    )
    assert ENDLESS.generate_batch((iter(row) for row in batch), 3) == expected
    assert (
        ENDLESS.generate(iter(batch[0]), 3)
        == ENDLESS.generate(xp.asarray(batch[0]), 3)
        == expected[0]
    )
    assert batch == array.tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_degenerate_input_logits_without_a_largest_one_end_with_an_error_and_not_with_token_0(
    xp, value
):
    model = network(xp=xp, dtype="float32")
    # ±inf and NaN, as an overflow leaves them
    model.weights["norm"] = model.weights["norm"] * value
    for temperature in (0.0, 1.0):
        with np.errstate(invalid="ignore"), pytest.raises(ValueError, match="logits"):
            model.generate([1, 2], 3, temperature=temperature, rng=0)


def test_no_new_tokens_is_an_empty_answer():
    assert MODEL.generate("x", 0) == ""
    assert MODEL.generate([0], 0) == []


# --- on every array library ---------------------------------------------------------------


def test_every_library_gives_the_same_tokens(xp):
    batch = [[0, 9, 8], [5]]
    expected = network(dtype="float32").generate_batch(batch, 8)
    model = network(xp=xp, dtype="float32")
    assert model.generate_batch(batch, 8) == expected
    for sampling in (
        SamplingParams(temperature=0.9, top_k=20, top_p=0.9),
        SamplingParams(repetition_penalty=1.3),
    ):
        host = network(dtype="float32").generate_batch(batch, 8, sampling=sampling, rng=3)
        assert model.generate_batch(batch, 8, sampling=sampling, rng=3) == host
    z = to_host(model.logits(xp.asarray([0, 9, 8])))
    # float32 products of at most 24 terms; the two libraries may sum in another order
    np.testing.assert_allclose(
        z, network(dtype="float32").logits([0, 9, 8]), rtol=0, atol=2e-6 * np.abs(z).max()
    )


@pytest.mark.parametrize(
    ("count", "sampling"),
    [(1, SamplingParams()), (3, SamplingParams()), (3, SamplingParams(temperature=1.0))],
)
def test_a_decode_step_crosses_the_border_a_fixed_number_of_times(count, sampling):
    """Tokens and positions go over in one copy, the chosen tokens come back in one,
    whatever the context is.

    Sampling adds the uniforms (one copy in) and two looks at whether its numbers are sound
    (two booleans back).
    """
    model = network(xp=fakecupy, dtype="float32", eos_token_ids=())
    steps = generate_tokens(
        model.weights, model.config, [[0, 5]] * count, 12, sampling, np.random.default_rng(0)
    )
    next(steps)  # prefill
    costs = []
    for _ in range(11):
        with fakecupy.counting() as c:
            next(steps)
        costs.append((c.h2d, c.d2h, c.syncs))
    sampled = sampling.temperature > 0
    assert set(costs) == {(1 + sampled, 1 + 2 * sampled, 1 + 2 * sampled)}


# --- chat ---------------------------------------------------------------------------------


HELLO = [{"role": "user", "content": "def <|im_end|>"}]


def test_a_chat_is_the_generation_of_its_prompt():
    model = chat_model()
    prompt = model.chat_tokenizer.encode(HELLO, add_generation_prompt=True)
    expected = model.tokenizer.decode(model.generate(prompt, 8))
    assert model.chat(HELLO, 8) == expected
    ticks: list[int] = []
    pieces = list(model.stream_chat(HELLO, 8, on_token=ticks.append))
    assert "".join(pieces) == expected
    assert len(ticks) == 8
    assert model.chat(HELLO, 8, temperature=1.0, rng=3) == model.tokenizer.decode(
        model.generate(prompt, 8, temperature=1.0, rng=3)
    )
    assert model.chat(HELLO, 8, drafter=model) == expected
    model = chat_model(12)
    long = [{"role": "user", "content": "xy" * 60}]
    few_bits = Kivi(2, 2, group=4, residual=16)
    assert model.chat(long, 8, cache=few_bits) != model.chat(long, 8)


def test_an_end_token_or_a_stop_string_ends_a_chat():
    model = chat_model()
    tokens = model.generate(model.chat_tokenizer.encode(HELLO, add_generation_prompt=True), 8)
    ending = chat_model(eos_token_ids=(tokens[3],))
    first = tokens.index(tokens[3])
    assert ending.chat(HELLO, 8) == model.tokenizer.decode(tokens[:first])
    assert len(ending.chat(HELLO, 8, ignore_eos=True)) > len(ending.chat(HELLO, 8))
    text = model.chat(HELLO, 8)
    assert model.chat(HELLO, 8, stop=text[2]) == text[: text.index(text[2])]


def test_tools_documents_and_options_reach_the_template():
    source = "{{ tools | tojson }}{{ documents | tojson }}{{ mood }}{{ messages[0].content }}"
    model = chat_model()
    model.chat_templates = ChatTemplates({"default": "no", "rag": source})
    given: list[list[int]] = []
    model._tokens = lambda ids, *rest, **more: given.append(list(ids)) or iter(())
    options = {"tools": [{"n": 1}], "documents": [{"m": 2}], "template": "rag"}
    assert (
        model.chat([{"role": "user", "content": "x"}], template_options={"mood": "?"}, **options)
        == ""
    )
    assert model.tokenizer.decode(given[0]) == '[{"n": 1}][{"m": 2}]?x'


def test_an_answer_fits_into_the_context_unless_it_is_asked_to_be_longer():
    model = chat_model(positions=60, eos_token_ids=())
    prompt = model.chat_tokenizer.encode(HELLO, add_generation_prompt=True)
    ticks: list[int] = []
    list(model.stream_chat(HELLO, on_token=ticks.append))
    assert len(ticks) == 60 - len(prompt)
    with pytest.raises(InputError, match="exceeds the model's 60 positions"):
        model.chat(HELLO, 60)
    with pytest.raises(InputError, match=r"the messages have \d+ tokens, and the model reads 60"):
        model.chat([{"role": "user", "content": "x" * 60}])


def test_a_chat_needs_messages_and_a_template():
    with pytest.raises(InputError, match="messages is empty"):
        chat_model().chat([])
    with pytest.raises(InputError, match=r"messages\[0\] needs a content"):
        chat_model().chat([{"role": "user"}])
    with pytest.raises(InputError, match="has no chat template"):
        MODEL.chat(HELLO)
    with pytest.raises(InputError, match="give either sampling="):
        chat_model().chat(HELLO, sampling=SamplingParams(), temperature=0.5)


def test_a_directory_brings_its_template(directory, tmp_path):
    import shutil

    copied = shutil.copytree(directory, tmp_path / "copy")
    (copied / "chat_template.jinja").write_text("{{ messages[0].content }}{{ bos_token }}")
    (copied / "tokenizer_config.json").write_text('{"bos_token": "<|endoftext|>"}')
    model = load(copied, dtype="float64")
    assert model.chat_tokenizer.encode(HELLO)[-1] == 0
    assert model.chat(HELLO, 3) == model.tokenizer.decode(
        model.generate([*model.tokenizer.encode(HELLO[0]["content"]), 0], 3)
    )


@pytest.mark.real
def test_the_real_model_knows_the_capital_of_france():
    model = load("smollm2")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    assert model.chat(question, 30) == "The capital of France is Paris."
    conversation = model.conversation()
    assert "".join(conversation.say("What is the capital of France?", 30)).endswith("Paris.")
    assert "Berlin" in "".join(conversation.say("And of Germany?", 30))
    assert conversation.reused > conversation.computed


# --- what the caller did wrong ------------------------------------------------------------


@pytest.mark.parametrize("rng", ["a", 1.5, -1, [1, "b"], object(), True])
def test_a_seed_that_is_none_is_rejected_at_the_call(rng):
    for call in (
        lambda: MODEL.generate([1], 1, rng=rng),
        lambda: MODEL.generate_batch([[1]], 1, rng=rng),
        lambda: MODEL.stream("x", 1, rng=rng),
    ):
        with pytest.raises(InputError, match="rng must be a numpy.random.Generator, a seed"):
            call()


def test_ragged_tokens_are_rejected():
    with pytest.raises(InputError, match=r"those of one sequence, \[T\]"):
        MODEL.logits([[1, 2], [3]])


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (3, {}, "a prompt must be a sequence of token ids"),
        ("x", {"max_tokens": -1}, "max_tokens must be an integer"),
        ("x", {"cache": 3}, "a cache policy is a Kivi"),
        ("x", {"stop": [""]}, "stop must be strings that are not empty"),
        ("x", {"temperature": -1}, "temperature must be"),
        ([V], {}, "has a token that is no integer within"),
    ],
)
@pytest.mark.parametrize("drafted", [False, True])
def test_a_stream_checks_its_arguments_at_the_call(prompt, options, message, drafted):
    drafter = MODEL if drafted else None
    with pytest.raises(InputError, match=message):
        MODEL.stream(prompt, **{"max_tokens": 1, "drafter": drafter} | options)  # and no next()


def test_a_stream_of_no_drafter_is_rejected_at_the_call():
    with pytest.raises(TypeError, match="a drafter is a Model"):
        MODEL.stream("x", 1, drafter=3)


def test_a_mistyped_keyword_is_answered_by_the_function_that_was_called():
    from refllm.serve import Request

    for call, name in (
        (MODEL.generate, "generate"),
        (MODEL.stream, "stream"),
        (Request, "Request"),
    ):
        with pytest.raises(
            TypeError, match=rf"^{name}\(\) got .* 'temperatur'; did you mean 'temperature'\?"
        ):
            call([1], 1, temperatur=0.5)
        with pytest.raises(
            TypeError, match=rf"^{name}\(\) got .* 'max_token'; did you mean 'max_t"
        ):
            call([1], max_tokens=1, max_token=2)
    with pytest.raises(TypeError, match="'best'; did you mean 'best_of'"):
        Request([1], best=2)
    with pytest.raises(TypeError, match=r"^generate\(\) got an unexpected keyword argument 'ids'$"):
        MODEL.generate([1], 1, ids=[2])  # a local name of the method is no parameter


@pytest.mark.parametrize("name", [3, None, b"stdlib", ""])
def test_a_model_is_named_by_a_string_or_a_path(name):
    with pytest.raises(InputError, match="a model is named by a string or a path, got"):
        load(name)
