"""JSON Schemas by refllm."""

from __future__ import annotations

from collections.abc import Callable

from common import Channel

import refllm
from engines.grammars import Rejected, serve
from refllm.checkpoints.tokenizer import Tokenizer
from refllm.decode.grammar import Grammar, GrammarError, compile
from refllm.errors import InputError


class Matcher:
    """A state of a grammar."""

    def __init__(self, grammar: Grammar) -> None:
        self.grammar = grammar
        self.state = grammar.start

    def mask(self) -> object:
        return self.grammar.mask(self.state)

    def accept(self, token: int) -> bool:
        try:
            self.state = self.grammar.advance(self.state, token)
        except InputError:
            return False
        return True

    def accepting(self) -> bool:
        return self.grammar.accepting(self.state)


class Engine:
    """refllm.decode.grammar."""

    name = "refllm"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        compile(choices=["a"], tokenizer=tokenizer)  # builds the trie, which is not timed

    def compile(self, schema: str) -> Callable[[], Matcher]:
        try:
            grammar = compile(json_schema=schema, tokenizer=self.tokenizer)
        except GrammarError as error:
            raise Rejected(str(error)) from error
        return lambda: Matcher(grammar)


def main() -> None:
    channel = Channel()
    channel.send(engine="refllm")
    serve(channel, lambda model: Engine(refllm.load(model).tokenizer))


if __name__ == "__main__":
    main()
