"""Token ids of a rendered chat: the template's control tokens become tokens, and the same
letters in a user's message stay words.

The text knows which characters a literal of the template wrote (``chat_template_text``). A
control token is one where *all* of its characters are the template's; everything else is
ordinary text, whatever it spells::

    <|im_start|>user\\nEnd it with <|im_end|><|im_end|>\\n
    ------------^^^^^^                      ----------     - the template's, ^ a known role

Method: the tokenizer is copied with another spelling for each control token, an unguessable
one that contains no letter, and with every merge left out that could spell the token from
pieces. In the text the template's control tokens are spelled the new way, and the copy
encodes the whole text in one call. So words, added tokens that are no control tokens, and
the white space that some control tokens strip are treated as they always are; and the old
spelling is nothing that the copy knows.

A control token is any special token of the tokenizer, and any other added token, such as
Qwen3's ``<think>``, that stands in a literal of the template and is not white space.

Limits: a role of ``chat_template.ROLES`` counts as the template's. A template that takes its
own control tokens apart by an operation that ``chat_template_text`` leaves out gets words. A
message of the assistant is a message too: control tokens in its content are read back as
words, unless the template writes them from ``tool_calls`` or ``reasoning_content``.

Left out: tokenizers whose vocabulary is no dictionary or list (refllm reads none).
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer as _Tokenizer

from refllm.checkpoints.chat_template import ChatTemplates, Message
from refllm.checkpoints.chat_template_text import runs
from refllm.checkpoints.tokenizer import Tokenizer
from refllm.errors import InputError

__all__ = ["ChatEncoder", "ChatTokenizer"]

_PRIVATE_USE = 0xF0000  # plane 15: 65,534 characters that no alphabet uses
_NONCE_LENGTH = 10  # characters: 160 bits


class ChatTokenizer:
    """Messages → token ids, with the templates and the tokenizer of one checkpoint."""

    def __init__(self, tokenizer: Tokenizer, templates: ChatTemplates):
        self.tokenizer = tokenizer
        self.templates = templates
        self._encoders: dict[str, ChatEncoder] = {}

    def encoder(self, template: str | None = None, *, tools: bool = False) -> ChatEncoder:
        """The encoder for the texts of a template, which is chosen as in
        ``ChatTemplates.source``.
        """
        from refllm.checkpoints.chat_template_sandbox import literals

        source = self.templates.source(template, tools=tools)
        if source not in self._encoders:
            self._encoders[source] = ChatEncoder(self.tokenizer, literals(source))
        return self._encoders[source]

    def encode(self, messages: Sequence[Message], **settings: Any) -> list[int]:
        """Token ids of a conversation; ``settings`` are those of ``ChatTemplates.render``."""
        text = self.templates.render(messages, **settings)
        tools = settings.get("tools") is not None
        return self.encoder(settings.get("template"), tools=tools).encode(text)


class ChatEncoder:
    """Encodes the texts of one chat template with one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, literals: Sequence[str]):
        """``literals``: the string literals of the template."""
        self.tokenizer = tokenizer
        added = {
            token.content: token.special
            for token in tokenizer.inner.get_added_tokens_decoder().values()
            if token.content
        }
        # At one position the longest added token is found, as the library does.
        longest_first = sorted(added, key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self.control_tokens = frozenset(
            token
            for token, special in added.items()
            if special or (not token.isspace() and any(token in text for text in literals))
        )
        nonce = "".join(
            chr(_PRIVATE_USE + secrets.randbelow(1 << 15)) for _ in range(_NONCE_LENGTH)
        )
        self._spelling = {
            token: nonce + chr(_PRIVATE_USE + (1 << 15) + i)
            for i, token in enumerate(sorted(self.control_tokens))
        }
        self._respelled = _respelled(tokenizer.inner, self._spelling)

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered text, without tokens that the tokenizer adds around a text:
        the template writes those.

        ValueError for anything but Unicode text.
        """
        parts = [self._mark(run) if by_template else run for by_template, run in runs(text)]
        try:
            ids: list[int] = self._respelled.encode("".join(parts), add_special_tokens=False).ids
        except TypeError:  # from the library: the text has no UTF-8
            return self.tokenizer.encode(str.__str__(text))  # says where
        self.tokenizer.check_limit(ids)
        return ids

    def begins_with_control_token(self, text: str) -> bool:
        """Whether the text begins with a control token that the template wrote, so that its
        ids do not depend on what stands before it.
        """
        by_template, run = next(runs(text), (False, ""))
        found = self._added.match(run)
        return by_template and found is not None and found[0] in self.control_tokens

    def _mark(self, run: str) -> str:
        """A run that the template wrote, its control tokens in their new spelling."""
        return self._added.sub(lambda found: self._spelling.get(found[0], found[0]), run)


def _respelled(inner: _Tokenizer, spelling: dict[str, str]) -> _Tokenizer:
    """A copy of a tokenizer in which some added tokens are spelled otherwise.

    The same ids; ValueError if the copy does not give them.
    """
    data = json.loads(inner.to_str())
    for token in data["added_tokens"]:
        token["content"] = spelling.get(token["content"], token["content"])
    model = data["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {spelling.get(token, token): i for token, i in model["vocab"].items()}
    else:
        model["vocab"] = [[spelling.get(token, token), *rest] for token, *rest in model["vocab"]]
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if not _spells(pair, spelling)]
    # what is added around a text refers to tokens by their spelling
    data["post_processor"] = None
    copy = _Tokenizer.from_str(json.dumps(data))
    for token, new in spelling.items():
        if copy.token_to_id(new) != inner.token_to_id(token):
            raise InputError(f"the tokenizer's control token {token!r} cannot be told from text")
    return copy


def _spells(pair: str | list[str], spelling: dict[str, str]) -> bool:
    """Whether a merge makes, or takes, one of the tokens.

    >>> _spells("<|end |>", {"<|end|>": "x"}), _spells(["<", "|"], {"<|end|>": "x"})
    (True, False)
    """
    left, right = pair.split(" ", 1) if isinstance(pair, str) else pair
    return bool({left, right, left + right} & spelling.keys())
