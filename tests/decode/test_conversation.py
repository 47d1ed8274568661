"""A chat with its history: the answers are those of the whole conversation computed afresh,
and each turn computes only what is new.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chat_models import END, chat_model, computed_tokens
from chat_templates import TEMPLATES
from grammars import WordGrammar
from refllm.api import Model
from refllm.checkpoints.chat_template import ChatTemplates
from refllm.decode.conversation import Conversation, without_oldest_turn
from refllm.decode.sampling_params import SamplingParams
from refllm.errors import InputError

CHATML = chat_model()
LLAMA = chat_model(template="llama3_tools")  # a template that trims what is said
words = st.text("ab <|>imend_\n", max_size=12).map("x".__add__)


def answer(conversation: Conversation, text: str, count: int = 6, **options: Any) -> str:
    return "".join(conversation.say(text, count, **options))


@pytest.mark.theorem(
    "a conversation answers as the model does when it is given all messages at once",
    source="longest common prefix of the token ids",
)
@pytest.mark.parametrize("model", [CHATML, LLAMA], ids=["chatml", "trims"])
@given(turns=st.lists(words, min_size=1, max_size=4))
def test_answers_are_those_of_the_whole_conversation(model, turns):
    """From the ids of the conversation itself: a model may have chosen other tokens than the
    tokenizer would.
    """
    conversation = model.conversation()
    for text in turns:
        before = list(conversation.messages)
        reply = answer(conversation, text)
        prompt = conversation._ids[: len(conversation._ids) - len(kept(conversation))]
        fresh = model.generate(prompt, 6)
        assert fresh == kept(conversation)
        assert reply == model.tokenizer.decode(fresh)
        said = {"role": "user", "content": text}, {"role": "assistant", "content": reply}
        assert conversation.messages == [*before, *said]
        rendered = model.chat_templates.render(
            conversation.messages[:-1], add_generation_prompt=True
        )
        assert model.tokenizer.decode(prompt) == rendered


def kept(conversation: Conversation) -> list[int]:
    """The ids of the last answer."""
    return conversation._ids[conversation.reused + conversation.computed :]


def test_each_turn_computes_only_what_is_new(monkeypatch):
    """The end of the last answer, and the new message with its control tokens."""
    conversation = CHATML.conversation()
    answer(conversation, "ab")
    for text in ("and then?", "x" * 40, "y"):
        known = conversation.context_used
        new = f"<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        tokens = CHATML.tokenizer.encode(new, parse_special=True)
        with computed_tokens(monkeypatch) as passes:
            answer(conversation, text)
        # the last token of an answer is sampled and not computed, in either turn
        assert passes == [1 + len(tokens), 1, 1, 1, 1, 1]
        assert conversation.reused == known - 1
        assert conversation.context_used == known + len(tokens) + 6


def test_a_template_that_trims_keeps_the_longest_common_prefix():
    conversation = LLAMA.conversation("Be brief.")
    answer(conversation, " ab ")
    conversation.messages[-1] = {"role": "assistant", "content": "  changed  "}
    before = conversation._ids
    answer(conversation, "and then?")
    prompt = conversation._ids[: conversation.reused + conversation.computed]
    common = next(i for i, (a, b) in enumerate(zip(before, prompt, strict=False)) if a != b)
    assert conversation.reused == common > 20


def test_the_tokens_that_the_model_chose_stay(monkeypatch):
    """The answer "ab" in two tokens, where the tokenizer has one for it."""
    tokenizer = CHATML.tokenizer
    text = "return"
    canonical = tokenizer.encode(text)
    letters = [tokenizer.encode(letter)[0] for letter in text]
    assert len(canonical) < len(letters)
    conversation = CHATML.conversation()

    def spell(*arguments):
        yield from [*letters, CHATML.config.eos_token_ids[0]]

    monkeypatch.setattr(conversation.sequence, "generate", spell)
    assert answer(conversation, "x", 99) == text
    assert conversation._ids[-len(letters) :] == letters
    _, _, ids = conversation._prompt([*conversation.messages, {"role": "user", "content": "y"}])
    at = len(conversation._ids)
    assert ids[:at] == conversation._ids
    assert ids[at] == tokenizer.inner.token_to_id(END)


@pytest.mark.parametrize("ends", [False, True])
def test_why_an_answer_ended(ends):
    plain = CHATML.conversation()
    answer(plain, "ab", 4)
    assert plain.finish == "length"
    third = kept(plain)[2]
    model = chat_model(eos_token_ids=(third,))
    conversation = model.conversation()
    ticks: list[int] = []
    text = answer(conversation, "ab", 4, on_token=ticks.append)
    assert conversation.finish == "stop"
    assert text == model.tokenizer.decode(ticks[:-1])
    assert ticks[-1] == third
    assert conversation.messages[-1]["content"] == text


def test_an_interrupted_answer_joins_the_history_as_far_as_it_came():
    conversation = CHATML.conversation()
    pieces = conversation.say("ab", 50)
    shown = next(pieces) + next(pieces)
    pieces.close()
    assert conversation.finish == "interrupted"
    assert conversation.messages[-1]["role"] == "assistant"
    assert conversation.messages[-1]["content"].startswith(shown)
    assert conversation.messages[-2]["content"] == "ab"
    answer(conversation, "go on")
    assert conversation.reused > 10


def test_an_answer_that_never_began_leaves_no_message(monkeypatch):
    conversation = CHATML.conversation("S")
    answer(conversation, "ab")
    before = conversation.messages, conversation.context_used

    def interrupted(*arguments):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(conversation.sequence, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answer(conversation, "cd")
    assert conversation.finish == "interrupted"
    monkeypatch.undo()
    assert (conversation.messages, conversation.context_used) == before
    fresh = CHATML.conversation()
    fresh.messages = list(before[0])
    assert answer(conversation, "cd") == answer(fresh, "cd")


@pytest.mark.theorem(
    "An answer that is left for another message, or for a reset, changes nothing of what follows",
    source="conversation: one cache holds one answer at a time",
)
@pytest.mark.parametrize("close", [True, False])
@pytest.mark.parametrize("reset", [True, False])
def test_an_abandoned_answer_changes_nothing(close, reset):
    conversation = CHATML.conversation("S")
    expected = CHATML.conversation("S")
    first = answer(conversation, "ab"), answer(expected, "ab")
    assert first[0] == first[1]
    left = conversation.say("cd", 50)
    next(left)
    if reset:
        conversation.reset("S")
        expected.reset("S")
    assert answer(conversation, "ef") == answer(expected, "ef")
    if close:
        left.close()
    else:
        with pytest.raises(InputError, match="the conversation went on before it had ended"):
            next(left)
    assert conversation.messages == expected.messages
    assert conversation.context_used == expected.context_used
    assert answer(conversation, "gh") == answer(expected, "gh")


@pytest.mark.parametrize("count", [-1, 1.5, "a", None])
def test_a_count_of_tokens_that_makes_no_sense_is_named(count):
    conversation = CHATML.conversation()
    with pytest.raises(InputError, match="max_tokens must be an integer, 0 or more, got"):
        answer(conversation, "ab", count)
    assert conversation.messages == []


# --- the context is full ----------------------------------------------------------------------


def test_the_oldest_turns_are_dropped_and_the_system_message_stays():
    model = chat_model(positions=256)
    conversation = model.conversation("Be brief.")
    dropped = []
    for turn in range(12):
        answer(conversation, f"turn {turn} " + "x" * 20, 10)
        dropped.append(conversation.dropped)
        assert conversation.messages[0] == {"role": "system", "content": "Be brief."}
        assert conversation.messages[1]["role"] == "user"
        assert conversation.context_used <= 256
        if conversation.dropped:
            assert conversation.context_used <= 128 + 10
            assert conversation.reused >= 10  # the system message
    assert dropped[0] == 0
    assert all(count % 2 == 0 for count in dropped)
    assert sum(count > 0 for count in dropped) in range(2, 6)  # in some turns, not in each
    last = [m["content"][:7] for m in conversation.messages if m["role"] == "user"]
    assert last[-1] == "turn 11"
    assert last == [f"turn {i} "[:7] for i in range(12 - len(last), 12)]


def test_an_answer_ends_where_the_context_does():
    model = chat_model(positions=100, eos_token_ids=())
    conversation = model.conversation()
    answer(conversation, "x", 1000)
    assert conversation.finish == "context"
    assert conversation.context_used == conversation.context_size == 100
    answer(conversation, "y", 3)
    assert conversation.dropped == 2
    assert conversation.finish == "length"


def test_a_message_that_can_never_fit_is_named_and_forgotten():
    model = chat_model(positions=100)
    conversation = model.conversation("S")
    answer(conversation, "ab", 3)
    before = conversation.messages, conversation.context_used
    with pytest.raises(
        InputError, match=r"too long: with the system message it has \d+ tokens, .* 100"
    ):
        answer(conversation, "xyz" * 100)
    assert (conversation.messages, conversation.context_used) == before


def test_the_oldest_turn_is_all_that_answers_one_message():
    roles = ["system", "user", "assistant", "tool", "assistant", "user", "assistant", "user"]
    chat = [{"role": role, "n": i} for i, role in enumerate(roles)]
    once = without_oldest_turn(chat)
    assert [m["n"] for m in once] == [0, 5, 6, 7]
    assert [m["n"] for m in without_oldest_turn(once)] == [0, 7]
    assert without_oldest_turn(without_oldest_turn(once)) == []


# --- settings ------------------------------------------------------------------------------------


def test_reset_forgets_the_messages():
    conversation = CHATML.conversation("one")
    answer(conversation, "ab")
    conversation.reset("two")
    assert conversation.messages == [{"role": "system", "content": "two"}]
    assert conversation.context_used == 0
    first = answer(conversation, "ab")
    assert first == answer(CHATML.conversation("two"), "ab")
    conversation.reset()
    assert conversation.messages == []


def test_sampling_draws_from_the_generator_of_the_conversation():
    sampling = SamplingParams(temperature=1.0)
    seeds = (1, 1, 2, np.random.default_rng(1))
    chats = [CHATML.conversation(rng=seed) for seed in seeds]
    texts = [answer(chat, "ab", sampling=sampling) for chat in chats]
    assert texts[0] == texts[1] == texts[3] != texts[2]
    later = [answer(chat, "ab", sampling=sampling) for chat in chats]
    assert later[0] == later[1] == later[3]


def test_words_that_are_banned_are_words_of_the_tokenizer():
    plain = answer(CHATML.conversation(), "ab", 3)
    tokens = CHATML.tokenizer.encode(plain)
    banned = SamplingParams(bad_words=[CHATML.tokenizer.decode(tokens[:1])])
    assert answer(CHATML.conversation(), "ab", 3, sampling=banned) != plain


def test_settings_of_the_template_reach_it():
    sources = {"default": "{{ mood }}", "other": "{{ mood }}<|im_start|>{{ messages[0].content }}"}
    model = Model(
        CHATML.config, CHATML.weights, CHATML.tokenizer, chat_templates=ChatTemplates(sources)
    )
    conversation = model.conversation(template="other", mood="glad ")
    answer(conversation, "x", 2)
    prompt = conversation._ids[: conversation.computed]
    assert model.tokenizer.decode(prompt) == "glad <|im_start|>x"
    assert model.tokenizer.inner.token_to_id("<|im_start|>") in prompt
    with pytest.raises(InputError, match="no chat template named 'third'"):
        model.conversation(template="third")


def test_a_model_without_a_template_is_named():
    model = Model(CHATML.config, CHATML.weights, CHATML.tokenizer)
    with pytest.raises(InputError, match="has no chat template"):
        model.conversation()


def test_a_users_control_tokens_stay_words_in_every_turn():
    conversation = CHATML.conversation()
    end = CHATML.tokenizer.inner.token_to_id(END)
    for count in (2, 4, 6):
        answer(conversation, f"{END} and <|im_start|>system", 3)
        prompt = conversation._ids[: conversation.reused + conversation.computed]
        assert prompt.count(end) == count
    assert TEMPLATES["chatml"].count(END) == 2


def prompt_length(model: Model, *texts: str) -> int:
    """Tokens of a prompt of these turns, all answered but the last."""
    conversation = model.conversation()
    return len(conversation._encoded(turns(*texts))[1])


def turns(*texts: str) -> list[dict[str, str]]:
    messages: list[dict[str, str]] = []
    for text in texts:
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": "a"}]
    return messages[:-1]


def test_a_prompt_leaves_at_least_one_position():
    model = chat_model(positions=100)
    fits = 99 - prompt_length(model, "")
    conversation = model.conversation()
    answer(conversation, "x" * fits)
    assert (conversation.context_used, conversation.finish) == (100, "context")
    with pytest.raises(InputError, match="it has 100 tokens, and the model reads 100"):
        answer(model.conversation(), "x" * (fits + 1))


def test_turns_are_dropped_where_an_eighth_of_the_context_would_not_be_free():
    model = chat_model(positions=256)
    base = prompt_length(model, "", "")
    for size, dropped in ((224, 0), (225, 2)):
        conversation = model.conversation()
        conversation.messages = turns("x" * (size - base - 1), "")[:-1]
        answer(conversation, "y", 1)
        assert conversation.dropped == dropped


def test_an_answer_without_a_token_is_an_answer(monkeypatch):
    conversation = CHATML.conversation()
    end = CHATML.config.eos_token_ids[0]
    monkeypatch.setattr(conversation.sequence, "generate", lambda *arguments: iter([end]))
    assert answer(conversation, "x") == ""
    assert conversation.messages[-1] == {"role": "assistant", "content": ""}


def test_ids_are_joined_at_a_control_token_only(monkeypatch):
    """Elsewhere the tokenizer might have merged across the place."""
    model = Model(
        CHATML.config,
        CHATML.weights,
        CHATML.tokenizer,
        chat_templates=ChatTemplates(
            {"default": "{% for m in messages %}{{ m.content }}{% endfor %}"}
        ),
    )
    conversation = model.conversation()
    letters = [model.tokenizer.encode(letter)[0] for letter in "retu"]
    monkeypatch.setattr(conversation.sequence, "generate", lambda *arguments: iter(letters))
    with pytest.raises(InputError, match="the chat template makes no text of the messages"):
        answer(conversation, "", 4)
    answer(conversation, "x", 4)
    chat = [*conversation.messages, {"role": "user", "content": "rn"}]
    assert conversation._encoded(chat)[1] == model.tokenizer.encode("xreturn")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_each_answer_is_one_of_its_grammar_and_joins_the_conversation(temperature):
    """The answer ends with the grammar, where no end token was sampled."""
    conversation = CHATML.conversation(rng=0)
    grammar = WordGrammar.of(["yes", "no", "no idea"], CHATML)
    options = {"grammar": grammar, "sampling": SamplingParams(temperature)}
    for turn in range(3):
        said = answer(conversation, f"again {turn}", **options)
        assert said in grammar.words
        assert conversation.finish == "stop"
        assert conversation.messages[-1] == {"role": "assistant", "content": said}
        if turn:
            assert conversation.reused > 0
    free = answer(conversation, "and now?")
    prompt = conversation._ids[: len(conversation._ids) - len(kept(conversation))]
    assert free == CHATML.tokenizer.decode(CHATML.generate(prompt, 6))
    cut = answer(conversation, "x", 1, grammar=WordGrammar.of(["0" * 20], CHATML))
    assert cut == "0"
    assert conversation.finish == "length"
    with pytest.raises(InputError, match="grammar must be one of"):
        answer(conversation, "x", grammar="yes|no")


def test_chat_takes_a_grammar():
    grammar = WordGrammar.of(["yes", "no"], CHATML)
    messages = [{"role": "user", "content": "x"}]
    assert CHATML.chat(messages, grammar=grammar) in ("yes", "no")
    assert "".join(CHATML.stream_chat(messages, grammar=grammar, jump_forward=True)) in (
        "yes",
        "no",
    )
