"""JSON Schemas by llguidance: a lexer of derivatives and an Earley parser, in Rust."""

from __future__ import annotations

from collections.abc import Callable

import llguidance
from common import Channel

import refllm
from engines.grammars import Rejected, serve


class Matcher:
    """A copy of a matcher at the start of a text."""

    def __init__(self, inner: llguidance.LLMatcher) -> None:
        self.inner = inner

    def mask(self) -> object:
        return self.inner.compute_bitmask()

    def accept(self, token: int) -> bool:
        return bool(self.inner.try_consume_tokens([token]) == 1)

    def accepting(self) -> bool:
        return bool(self.inner.is_accepting())


class Engine:
    """llguidance with its default options: flexible whitespace."""

    name = "llguidance"

    def __init__(self, model: str) -> None:
        loaded = refllm.load(model)
        self.tokenizer = llguidance.LLTokenizer(
            loaded.tokenizer.inner.to_str(),
            n_vocab=loaded.config.vocab_size,
            eos_token=list(loaded.config.eos_token_ids),
        )

    def compile(self, schema: str) -> Callable[[], Matcher]:
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(schema)
            matcher = llguidance.LLMatcher(self.tokenizer, grammar, log_level=0)
        except ValueError as error:
            raise Rejected(str(error)) from error
        if matcher.is_error():
            raise Rejected(matcher.get_error())
        return lambda: Matcher(matcher.deep_copy())


def main() -> None:
    channel = Channel()
    channel.send(engine="llguidance")
    serve(channel, Engine)


if __name__ == "__main__":
    main()
