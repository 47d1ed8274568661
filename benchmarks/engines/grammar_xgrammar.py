"""JSON Schemas by xgrammar: a pushdown automaton with an adaptive token mask cache, in C++."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import xgrammar
from common import Channel

import refllm
from engines.grammars import Rejected, serve
from refllm.decode.grammar import token_bytes


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the warnings that xgrammar writes to standard error, several for each schema."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class Matcher:
    """A matcher at the start of a text."""

    def __init__(self, compiled: xgrammar.CompiledGrammar, vocabulary: int) -> None:
        self.inner = xgrammar.GrammarMatcher(compiled)
        self.bits = xgrammar.allocate_token_bitmask(1, vocabulary)

    def mask(self) -> object:
        return self.inner.fill_next_token_bitmask(self.bits)

    def accept(self, token: int) -> bool:
        return bool(self.inner.accept_token(token))

    def accepting(self) -> bool:
        return bool(self.inner.is_completed())


class Engine:
    """xgrammar as JSON Schema means it: any whitespace, additional properties where the schema
    does not forbid them, one thread, no cache of compiled schemas.
    """

    name = "xgrammar"

    def __init__(self, model: str) -> None:
        loaded = refllm.load(model)
        tokens = [token or b"" for token in token_bytes(loaded.tokenizer)]
        self.vocabulary = loaded.config.vocab_size
        info = xgrammar.TokenizerInfo(
            tokens,
            vocab_type=xgrammar.VocabType.RAW,
            vocab_size=self.vocabulary,
            stop_token_ids=list(loaded.config.eos_token_ids),
        )
        self.compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def compile(self, schema: str) -> Callable[[], Matcher]:
        try:
            with _silent():
                compiled = self.compiler.compile_json_schema(schema, strict_mode=False)
        except Exception as error:  # it raises several kinds
            raise Rejected(str(error)) from error
        return lambda: Matcher(compiled, self.vocabulary)


def main() -> None:
    channel = Channel()
    channel.send(engine="xgrammar")
    serve(channel, Engine)


if __name__ == "__main__":
    main()
