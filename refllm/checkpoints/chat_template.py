"""Messages as the text that a chat model was trained on: its chat template, rendered.

A chat model reads one text. Its checkpoint brings a Jinja template that writes the text of a
list of messages, with control tokens around each::

    [{"role": "user", "content": "Hi"}]  →  <|im_start|>user\\nHi<|im_end|>\\n

| name                     | given to the template                                          |
|--------------------------|----------------------------------------------------------------|
| ``messages``             | dicts with ``role`` and ``content``; without entries of None   |
| ``tools``, ``documents`` | lists of dicts, or None                                        |
| ``add_generation_prompt``| whether the text ends where the assistant's answer begins      |
| ``bos_token``, …         | the tokenizer's special tokens, by the names of its files      |
| any other                | an option of this template, such as ``enable_thinking``        |

The text equals that of ``transformers``' ``apply_chat_template``, and knows which of its
characters the template wrote (``chat_template_text``), so that ``chat_template_tokens`` can
tell a control token of the template from one in a message. A role counts as the template's
where it is one of ``ROLES``, since templates make control tokens of roles, as in
``'<|' + role + '|>'``; any other role is a word like any other.

Source: ``transformers.utils.chat_template_utils`` (names, settings, ``reasoning_content``,
how a final message is continued).

Left out: images, audio and video in messages; tools given as Python functions (pass their
JSON schema); masks of the assistant's tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from refllm.checkpoints.chat_template_text import TemplateText, literal
from refllm.errors import InputError

__all__ = ["ROLES", "ChatTemplates", "Message", "checked_messages"]

Message = Mapping[str, Any]

ROLES = frozenset(
    (
        *("system", "developer", "user", "assistant", "model"),
        *("tool", "function", "ipython", "environment", "observation"),
    )
)
DEFAULT = "default"  # the names of templates that are chosen without being asked for
TOOL_USE = "tool_use"
# The names that a message's reasoning is passed under; templates read the first, or the second.
REASONING = ("reasoning_content", "thinking", "reasoning")
_END_OF_FINAL = "CONTINUE_FINAL_MESSAGE_TAG "


@dataclass(frozen=True)
class ChatTemplates:
    """The chat templates of a checkpoint: name → Jinja; and the special tokens that they may
    write: name, such as ``bos_token`` → token.

    >>> chatml = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    >>> str(ChatTemplates({"default": chatml}).render([{"role": "user", "content": "Hi"}]))
    '<|user|>Hi<|end|>'
    """

    sources: Mapping[str, str] = field(default_factory=dict)
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    def source(self, name: str | None = None, *, tools: bool = False) -> str:
        """The template of this name; without a name, the one for tools where tools are given,
        else the default.

        Raises
        ------
        InputError
            if there is none.
        """
        if not self.sources:
            raise InputError(
                "this checkpoint has no chat template: it is no chat model, or its "
                "chat_template.jinja is missing; continue a plain text with generate instead"
            )
        wanted = [name] if name is not None else [TOOL_USE] * tools + [DEFAULT]
        for candidate in wanted:
            if candidate in self.sources:
                return self.sources[candidate]
        raise InputError(
            f"there is no chat template named {wanted[-1]!r}; the checkpoint has "
            f"{', '.join(map(repr, sorted(self.sources)))}"
        )

    def render(
        self,
        messages: Sequence[Message],
        *,
        template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        now: datetime | None = None,
        **options: Any,
    ) -> TemplateText:
        """The text of a conversation.

        ``template`` names one of several; ``now`` is the time of ``strftime_now``, by default
        the current one. With ``continue_final_message`` the text ends where the last message
        does, without the template's end of a turn, so that a model continues it.

        Raises
        ------
        InputError
            for messages that are none, a template that rejects them, or one that fails.
        """
        # jinja2 is imported where a template is rendered, since ``import refllm`` is fast
        from refllm.checkpoints.chat_template_sandbox import compiled, rendered

        source = self.source(template, tools=tools is not None)
        chat = checked_messages(messages)
        names: dict[str, Any] = {}
        names |= {name: literal(token) for name, token in self.special_tokens.items()}
        names |= plain_value(options, "the template's options")
        names["messages"] = chat
        names["tools"] = _dicts("tools", tools)
        names["documents"] = _dicts("documents", documents)
        names["add_generation_prompt"] = bool(add_generation_prompt)
        if not continue_final_message:
            return _text(rendered(compiled(source), names, now))
        if add_generation_prompt:
            raise InputError(
                "continue_final_message continues the last message and add_generation_prompt "
                "begins a new one: choose one of them"
            )
        if "content" not in source:
            raise InputError("continue_final_message: the chat template reads no content")
        final = _mark_end(chat[-1])
        return _cut_at_end(_text(rendered(compiled(source), names, now)), final)


def _text(text: str) -> TemplateText:
    """What a template returned, a ``TemplateText`` already unless it is empty."""
    return text if isinstance(text, TemplateText) else TemplateText(text)


# --- messages -------------------------------------------------------------------------------


def checked_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as a template takes them: a copy in plain Python values.

    Raises
    ------
    InputError
        naming the message, unless each is a dict with a ``role`` and a ``content`` that is
        text, or a list of parts of text, or, beside ``tool_calls``, missing.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise InputError(
            "messages must be a list of dicts such as {'role': 'user', 'content': 'Hello'}, "
            f"got {type(messages).__name__}"
        )
    if not messages:
        raise InputError("messages is empty: a chat needs at least one message")
    return [_checked(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _checked(message: Message, where: str) -> dict[str, Any]:
    """One message, checked and copied."""
    if not isinstance(message, Mapping):
        raise InputError(
            f"{where} must be a dict with a role and a content, got {type(message).__name__}"
        )
    plain: dict[str, Any] = plain_value(
        {key: v for key, v in message.items() if v is not None}, where
    )
    role = plain.get("role")
    if not isinstance(role, str) or not role:
        raise InputError(f"{where} needs a role, such as 'user', got {role!r}")
    if role in ROLES:
        plain["role"] = literal(role)
    _check_content(plain, where)
    reasoning = next((plain[key] for key in REASONING if key in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _check_content(message: dict[str, Any], where: str) -> None:
    """InputError unless a message has a content of text."""
    content = message.get("content")
    if content is None:
        if not message.get("tool_calls"):
            raise InputError(f"{where} needs a content")
    elif isinstance(content, list):
        for i, part in enumerate(content):
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                raise InputError(
                    f"{where}: part {i} of its content is no {{'type': 'text', 'text': …}}; "
                    "refllm's models read text only"
                )
    elif not isinstance(content, str):
        raise InputError(f"{where}: its content must be text, got {type(content).__name__}")


def plain_value(value: Any, where: str) -> Any:
    """A copy in the types of JSON, none of whose text counts as the template's; InputError for
    any other type.

    Objects would bring methods into the template that the sandbox does not know.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return TemplateText(str.__str__(value))
    for kind in (int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {plain_value(k, where): plain_value(v, f"{where}[{k!r}]") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_value(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise InputError(
        f"{where} is a {type(value).__name__}: a chat template takes text, numbers, lists and dicts"
    )


def _dicts(name: str, value: Sequence[Mapping[str, Any]] | None) -> list[Any] | None:
    """A list of dicts, copied; InputError for anything else."""
    if value is None:
        return None
    if isinstance(value, (str, Mapping)) or not all(isinstance(item, Mapping) for item in value):
        raise InputError(f"{name} must be a list of dicts, got {value!r:.80}")
    copied: list[Any] = plain_value(list(value), name)
    return copied


# --- continuing the final message -----------------------------------------------------------


def _mark_end(message: dict[str, Any]) -> str:
    """Append a mark to the text of the last message; return the text without it."""
    content = message.get("content")
    if isinstance(content, list) and content:
        part = content[-1]
        final: str = part["text"]
        part["text"] = final + _END_OF_FINAL
        return final
    if not isinstance(content, str):
        raise InputError("continue_final_message: the last message has no text to continue")
    message["content"] = content + _END_OF_FINAL
    return content


def _cut_at_end(text: TemplateText, final: str) -> TemplateText:
    """The text up to the mark. Where the template trimmed the message, its end is trimmed."""
    mark = _END_OF_FINAL.strip()
    if final.strip() not in text or mark not in text:
        raise InputError(
            "continue_final_message: the chat template does not show all of the last message"
        )
    end = text.rindex(mark)
    kept = text[:end]
    return kept if text[end:].startswith(_END_OF_FINAL) else kept.rstrip()
