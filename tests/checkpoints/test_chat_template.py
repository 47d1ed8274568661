"""The text of a conversation: equal to that of transformers, or one sentence that says which
message is wrong.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from chat_templates import (
    CONVERSATIONS,
    DOCUMENTS,
    SPECIAL_TOKENS,
    TEMPLATES,
    TOOLS,
    assistant,
    user,
)
from chat_tokenizer import transformers_tokenizer
from refllm.checkpoints.chat_template import ChatTemplates, checked_messages
from refllm.checkpoints.chat_template_text import written
from refllm.errors import InputError

CHATML = TEMPLATES["chatml"]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "generation prompt": {"add_generation_prompt": True},
    "tools and documents": {"tools": TOOLS, "documents": DOCUMENTS, "enable_thinking": False},
    "continued": {"continue_final_message": True},
}


def templates(source: str = CHATML) -> ChatTemplates:
    return ChatTemplates({"default": source}, SPECIAL_TOKENS)


@pytest.mark.oracle
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers(name, conversation):
    """Where a template rejects the messages, both do."""
    messages = CONVERSATIONS[conversation]
    theirs = transformers_tokenizer()
    for setting in SETTINGS.values():
        try:
            expected = theirs.apply_chat_template(
                messages, chat_template=TEMPLATES[name], tokenize=False, **setting
            )
        except Exception:
            with pytest.raises(InputError):
                templates(TEMPLATES[name]).render(messages, **setting)
            continue
        assert templates(TEMPLATES[name]).render(messages, **setting) == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_template_renders_several_conversations(name):
    """So that the comparison compares more than rejections."""
    texts = []
    for messages in CONVERSATIONS.values():
        try:
            texts.append(templates(TEMPLATES[name]).render(messages, tools=TOOLS))
        except InputError:
            continue
    assert len(set(texts)) >= 3


# --- which template -----------------------------------------------------------------------


def test_a_template_is_chosen_by_name_or_by_whether_tools_are_given():
    both = ChatTemplates({"default": "D", "tool_use": "T", "rag": "R"})
    assert both.render([user("x")]) == "D"
    assert both.render([user("x")], tools=TOOLS) == "T"
    assert both.render([user("x")], tools=[]) == "T"  # as transformers chooses
    assert both.render([user("x")], template="rag", tools=TOOLS) == "R"
    assert ChatTemplates({"default": "D"}).render([user("x")], tools=TOOLS) == "D"
    with pytest.raises(InputError, match="named 'rga'; the checkpoint has 'default', 'rag', 'tool"):
        both.render([user("x")], template="rga")
    with pytest.raises(InputError, match="named 'default'; the checkpoint has 'rag'"):
        ChatTemplates({"rag": "R"}).render([user("x")])
    with pytest.raises(InputError, match="has no chat template: it is no chat model"):
        ChatTemplates().render([user("x")])


def test_options_and_special_tokens_reach_the_template():
    source = "{{ bos_token }}{{ unk_token }}{{ mood }}{{ messages[0].content }}{{ tools }}"
    render = ChatTemplates({"default": source}, {"bos_token": "<s>"}).render
    text = render([user("x")], mood="glad")
    assert text == "<s>gladxNone"
    assert written(text) == b"\1\1\1" + bytes(9)  # an option is a user's, a special token is not
    assert render([user("x")], bos_token="B") == "BxNone"  # an option overrides it
    assert written(render([user("x")], bos_token="B"))[0] == 0


# --- messages -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "messages is empty"),
        ("Hello", r"messages must be a list of dicts .* got str"),
        ({"role": "user"}, r"messages must be a list of dicts .* got dict"),
        (7, r"messages must be a list of dicts .* got int"),
        (["Hello"], r"messages\[0\] must be a dict .* got str"),
        ([user("x"), None], r"messages\[1\] must be a dict .* got NoneType"),
        ([{"content": "x"}], r"messages\[0\] needs a role, such as 'user', got None"),
        ([{"role": 3, "content": "x"}], r"messages\[0\] needs a role.* got 3"),
        ([{"role": "", "content": "x"}], r"messages\[0\] needs a role"),
        ([{"role": "user"}], r"messages\[0\] needs a content"),
        ([{"role": "user", "content": None}], r"messages\[0\] needs a content"),
        ([{"role": "user", "content": None, "tool_calls": []}], r"needs a content"),
        ([user(3)], r"messages\[0\]: its content must be text, got int"),
        ([user(b"x")], r"messages\[0\]\['content'\] is a bytes"),
        ([user(["x"])], r"messages\[0\]: part 0 of its content is no"),
        ([user([{"type": "image"}])], r"part 0 of its content is no .* read text only"),
        ([user([{"type": "text", "text": "x"}, {"type": "text"}])], r"part 1 of its content"),
        ([user("x") | {"name": np.zeros(2)}], r"messages\[0\]\['name'\] is a ndarray"),
        ([user([{"type": "text", "text": "x", "n": object()}])], r"\[0\]\['n'\] is a object"),
    ],
)
def test_what_is_no_message_is_named(messages, sentence):
    with pytest.raises(InputError, match=sentence):
        templates().render(messages)


def test_tools_and_documents_are_lists_of_dicts():
    for name in ("tools", "documents"):
        for wrong in ("x", {"a": 1}, [1], [None]):
            with pytest.raises(InputError, match=f"{name} must be a list of dicts"):
                templates().render([user("x")], **{name: wrong})


def test_messages_are_copied_and_stay_as_they_are():
    messages = copy.deepcopy(CONVERSATIONS["tools"] + CONVERSATIONS["parts"])
    before = copy.deepcopy(messages)
    copied = checked_messages(messages)
    copied[0]["content"] = "changed"
    copied[1]["tool_calls"][0]["id"] = "changed"
    source = TEMPLATES["json"] + "{# content #}"
    templates(source).render(messages, continue_final_message=True)
    assert messages == before


def test_only_known_roles_are_the_templates():
    source = "{% for m in messages %}{{ m.role }}{% endfor %}"
    for role, by_template in (("user", 1), ("observation", 1), ("im_end", 0), ("User", 0)):
        text = templates(source).render([{"role": role, "content": "x"}])
        assert set(written(text)) == {by_template}


def test_subclasses_of_plain_types_bring_no_methods_along():
    class Loud(str):
        def upper(self) -> str:
            raise AssertionError

    class Flag(int):
        pass

    plain = checked_messages([user(Loud("x")) | {"n": Flag(3), "t": True, "f": np.float64(2.5)}])
    assert plain[0]["content"].upper() == "X"
    assert [type(plain[0][key]) for key in "ntf"] == [int, bool, float]


# --- continuing a message -----------------------------------------------------------------


def test_a_final_message_is_continued_where_it_ends():
    prompt = [user("Say it"), assistant("The answer is")]
    text = templates().render(prompt, continue_final_message=True)
    assert text.endswith("<|im_start|>assistant\nThe answer is")
    spaced = [user("Say it"), assistant("It is ")]
    assert templates().render(spaced, continue_final_message=True).endswith("\nIt is ")
    trimmed = templates(TEMPLATES["llama3_tools"]).render(spaced, continue_final_message=True)
    assert trimmed.endswith("<|end|>\n\nIt is")  # a template that trims it


def test_a_message_that_cannot_be_continued_is_named():
    with pytest.raises(InputError, match="choose one of them"):
        templates().render([user("x")], continue_final_message=True, add_generation_prompt=True)
    with pytest.raises(InputError, match="does not show all of the last message"):
        templates("{{ messages[-1].content[:1] }}").render(
            [user("xyz")], continue_final_message=True
        )
    called = assistant(None, tool_calls=[{"name": "f"}])
    with pytest.raises(InputError, match="the last message has no text to continue"):
        templates(TEMPLATES["json"] + "content").render([called], continue_final_message=True)
    with pytest.raises(InputError, match="reads no content"):
        templates("{{ messages }}").render([user("x")], continue_final_message=True)
