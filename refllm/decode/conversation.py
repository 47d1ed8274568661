"""A chat with its history: every turn computes only what is new in it.

1. The conversation with the new message is rendered by the chat template.
2. If that text begins with the text so far, as most templates write it, the token ids so far
   stay: they are the very tokens that the model was given and chose. Otherwise, as where a
   template trims an answer, the whole text is encoded.
3. If the prompt leaves too little room for an answer, the oldest turns are dropped.
4. ``CachedSequence`` keeps the longest common prefix of the ids and computes the rest.
5. The answer is streamed, and joins the history.

Without step 2 an answer would be encoded again. Where the tokenizer chooses other tokens than
the model did, everything from there on would have to be computed again.

Dropping a turn changes the positions of all that follows it, which must be computed again. So
turns are dropped until half of the context is free, which happens once in many turns, not in
each. The system message stays.

Left out: several answers to one message, editing the history, tools that are called (a
caller can append their results to ``messages``).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol

import numpy as np

from refllm.checkpoints.chat_template import Message
from refllm.checkpoints.chat_template_tokens import ChatTokenizer
from refllm.checkpoints.tokenizer import Tokenizer
from refllm.decode.cached_sequence import CachedSequence
from refllm.decode.constraint import Constraint, ConstraintStates, check_constraint
from refllm.decode.detokenizer import Utf8Stream
from refllm.decode.generate import check_max_tokens
from refllm.decode.logits_processors import LogitsProcessors, with_token_ids
from refllm.decode.sampling_params import GREEDY, SamplingParams
from refllm.errors import InputError
from refllm.model.config import ModelConfig
from refllm.model.llama import Weights

__all__ = ["ANSWER_TOKENS", "Conversation"]

ANSWER_TOKENS = 1024  # tokens of an answer, at most
# Turns are dropped unless 1/8 of the context is free, or room for a whole answer if that is less
FREE_PART = 8


class ChatModel(Protocol):
    """What a conversation needs of a model, as ``refllm.Model`` has it."""

    config: ModelConfig
    weights: Weights
    tokenizer: Tokenizer

    @property
    def chat_tokenizer(self) -> ChatTokenizer:
        """Messages → token ids."""


class Conversation:
    """Messages, and the keys and values of their tokens.

    ``messages`` may be read and replaced; the next turn computes what differs. After a turn,
    ``reused`` and ``computed`` count the tokens of its prompt that were in the cache or not,
    ``dropped`` the messages that were left out for it, and ``finish`` says why the answer
    ended: ``"stop"`` (an end token, or a complete answer of its grammar), ``"length"``
    (``max_tokens``), ``"context"`` (no position is left), ``"interrupted"``.
    """

    def __init__(
        self,
        model: ChatModel,
        system: str | None = None,
        *,
        rng: np.random.Generator,
        **settings: Any,
    ):
        """``settings`` are those of ``ChatTemplates.render``: template, tools, its options.

        InputError if the model has no chat template.
        """
        self.model = model
        self.rng = rng
        self.settings = settings
        self._tools = settings.get("tools") is not None
        model.chat_tokenizer.templates.source(settings.get("template"), tools=self._tools)
        self.messages: list[Message] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        self.sequence = CachedSequence(model.weights, model.config)
        self.dropped = 0
        self.finish = ""
        self._turn = 0  # counts messages and resets: an answer belongs to one
        # the text that the ids of the sequence stand for, as far as both are known
        self._text = ""
        self._ids: list[int] = []

    @property
    def reused(self) -> int:
        """Tokens of the last prompt that were in the cache."""
        return self.sequence.reused

    @property
    def computed(self) -> int:
        """Tokens of the last prompt that were computed."""
        return self.sequence.computed

    @property
    def context_used(self) -> int:
        """Tokens of the conversation so far."""
        return len(self._ids)

    @property
    def context_size(self) -> int:
        """Tokens that a conversation can have."""
        return self.model.config.max_position_embeddings

    def reset(self, system: str | None = None) -> None:
        """Forget all messages; begin with another system message, if one is given."""
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self._text = ""
        self._ids = []
        self._turn += 1

    def say(
        self,
        content: str,
        max_tokens: int = ANSWER_TOKENS,
        *,
        sampling: SamplingParams = GREEDY,
        grammar: Constraint | None = None,
        on_prompt: Callable[[], object] | None = None,
        on_token: Callable[[int], object] | None = None,
    ) -> Generator[str, None, None]:
        """Yield the answer to a user's message, in whole characters.

        Message and answer join ``messages`` when the answer ends, or is ended: an answer that
        was interrupted joins up to there, one that never began leaves no message behind.
        The whole answer is one of a ``grammar``, if there is one (``decode.constraint``).
        ``on_prompt`` is called before the prompt is computed, when ``reused``, ``computed``
        and ``dropped`` are known; ``on_token`` with each sampled token.

        InputError for a message that does not fit into the context, or that the template
        rejects; for an answer that goes on after another message was sent, or after a reset.
        """
        check_max_tokens(max_tokens)
        check_constraint(grammar)
        sampling = with_token_ids(sampling, self.model.tokenizer)
        ends = self.model.config.eos_token_ids
        constraint = None
        if grammar is not None:
            constraint = ConstraintStates(grammar, self.model.config.vocab_size, ends)
        processors = LogitsProcessors(sampling, constraint=constraint)
        chat, text, ids = self._prompt([*self.messages, {"role": "user", "content": content}])
        self._turn += 1
        turn = self._turn
        room = self.context_size - len(ids)
        limit = min(max_tokens, room)
        answer: list[int] = []
        characters = Utf8Stream(self.model.tokenizer)
        self.finish = "interrupted"
        if not ids:
            raise InputError("the chat template makes no text of the messages")
        self.sequence.begin(ids)
        if on_prompt is not None:
            on_prompt()
        try:
            tokens = self.sequence.generate(ids, limit, sampling, self.rng, processors)
            for token in tokens:
                if on_token is not None:
                    on_token(token)
                if token in ends:
                    self.finish = "stop"
                    break
                answer.append(token)
                if piece := characters.push(token):
                    yield piece
                    self._check_turn(turn)  # before anything is computed
                if constraint is not None and constraint.is_complete(answer):
                    self.finish = "stop"
                    break
            else:
                self.finish = "length" if limit < room else "context"
            if rest := characters.flush():
                yield rest
        finally:
            if turn == self._turn and (answer or self.finish != "interrupted"):
                reply = self.model.tokenizer.decode(answer)
                self.messages = [*chat, {"role": "assistant", "content": reply}]
                self._text = text + reply
                self._ids = ids + answer

    def _check_turn(self, turn: int) -> None:
        """InputError if another message was sent, or all forgotten, since this turn began."""
        if turn != self._turn:
            raise InputError(
                "this answer was abandoned: the conversation went on before it had ended"
            )

    # --- the prompt -------------------------------------------------------------------------

    def _prompt(self, chat: list[Message]) -> tuple[list[Message], str, list[int]]:
        """The messages that fit, oldest turns dropped; their text; their ids."""
        text, ids = self._encoded(chat)
        size = self.context_size
        self.dropped = 0
        if len(ids) + min(ANSWER_TOKENS, size // FREE_PART) > size:
            while len(ids) > size // 2 and (shorter := without_oldest_turn(chat)):
                self.dropped += len(chat) - len(shorter)
                chat = shorter
                text, ids = self._encoded(chat)
        if len(ids) >= size:
            raise InputError(
                f"the message is too long: with the system message it has {len(ids)} tokens, "
                f"and the model reads {size}"
            )
        return chat, text, ids

    def _encoded(self, chat: Sequence[Message]) -> tuple[str, list[int]]:
        """Text and ids of a prompt; ids of the text so far stay as they are."""
        tokenizer = self.model.chat_tokenizer
        text = tokenizer.templates.render(chat, add_generation_prompt=True, **self.settings)
        encoder = tokenizer.encoder(self.settings.get("template"), tools=self._tools)
        if self._text and text.startswith(self._text):
            rest = text[len(self._text) :]
            if encoder.begins_with_control_token(rest):
                return text, self._ids + encoder.encode(rest)
        return text, encoder.encode(text)


def without_oldest_turn(chat: Sequence[Message]) -> list[Message]:
    """The messages without the oldest user's message and all that answers it; empty if there
    is only one such turn. Messages before the first of a user stay.

    >>> turns = [{"role": role} for role in ("system", "user", "assistant", "user")]
    >>> [message["role"] for message in without_oldest_turn(turns)]
    ['system', 'user']
    """
    users = [i for i, message in enumerate(chat) if message["role"] == "user"]
    if len(users) < 2:
        return []
    return [*chat[: users[0]], *chat[users[1] :]]
