"""``compile`` makes a ``Grammar`` of a regular expression, a JSON Schema, an EBNF grammar or a list
of choices, for the vocabulary of one tokenizer.

    regex  ──▶ DFA ───────────────┐
    choices ─▶ DFA ───────────────┤
    ebnf ────▶ rules as frames ───┼──▶ automaton ──▶ masks over the token trie
    json_schema ─▶ shapes, frames ┘

A ``Grammar`` is the constraint that decoding follows (``decode.constraint``): ``start``,
``mask(state)``, ``advance(state, token)``, ``accepting(state)``. States are values: advancing one
never changes it, so that branching, beams and rolling back are keeping another state.

| state                  | mask                                                             |
|------------------------|------------------------------------------------------------------|
| in the text            | the tokens whose bytes may follow                                |
| at an end of the text  | these, and the end tokens                                        |
| after an end token     | nothing                                                          |

Masking and renormalising at each step is not conditioning on the grammar: texts whose beginnings
have many illegal continuations become too probable (``conditioning``).

Left out: temporal constraints across several texts; grammars over token ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import index
from typing import Any

import numpy as np

from refllm.checkpoints.tokenizer import Tokenizer
from refllm.decode.grammar.automata.dfa import DFA
from refllm.decode.grammar.automata.dfa_operations import from_words
from refllm.decode.grammar.automata.utf8 import to_bytes
from refllm.decode.grammar.automaton import Automaton, State, Terminal, enter, step
from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.forced import forced_bytes
from refllm.decode.grammar.json_machine.json_text import Whitespace
from refllm.decode.grammar.json_machine.object_keys import Order
from refllm.decode.grammar.masks import TokenMasks
from refllm.decode.grammar.patterns.regex import from_pattern
from refllm.decode.grammar.rule_grammars.context_free import ContextFree
from refllm.decode.grammar.rule_grammars.ebnf import parse
from refllm.decode.grammar.schema import compile_schema
from refllm.decode.grammar.token_trie import TokenTrie, trie_of
from refllm.decode.grammar.vocabulary import drops_first_space, end_tokens_of
from refllm.errors import InputError

ENDED = State(frozenset(), False)  # after an end token: nothing may follow
_TEXT_BYTES = frozenset([9, 10, 13, *range(0x20, 0x7F), *range(0x80, 0xC0), *range(0xC2, 0xF5)])


class RegularAutomaton:
    """The texts of one DFA over bytes."""

    def __init__(self, dfa: DFA) -> None:
        self.dfa = dfa

    def start(self) -> State | None:
        """The state before the first byte."""
        return enter([(Terminal(self.dfa), None)])


class Grammar:
    """Which texts are legal, for the vocabulary of one tokenizer.

    Parameters
    ----------
    automaton
        where texts begin
    trie
        the tokens of the vocabulary
    end_tokens
        the tokens that end a text
    notes
        what is not enforced, in sentences

    Attributes: ``start``, the state of the empty output; ``notes``; ``vocabulary``, V;
    ``end_tokens``; ``masks``, whose caches count what they hold.

    A grammar can be pickled: the copy compiles again from what it was compiled from. States of one
    copy have the same meaning for the other, but do not find its cached masks. Threads may share a
    grammar.

    Raises
    ------
    GrammarError
        if no text is legal.
    """

    def __init__(
        self,
        automaton: Automaton,
        trie: TokenTrie,
        end_tokens: Iterable[int] = (),
        notes: Iterable[str] = (),
    ) -> None:
        start = automaton.start()
        if start is None:
            raise GrammarError("the grammar is unsatisfiable: no text is legal")
        self.start = start
        self.automaton = automaton
        self.vocabulary = trie.vocabulary
        self.end_tokens = frozenset(end_tokens)
        for token in self.end_tokens:
            if not 0 <= token < self.vocabulary:
                raise InputError(
                    f"end token {token} is outside the vocabulary of {self.vocabulary}"
                )
        self.masks = TokenMasks(trie, self.end_tokens)
        self.notes = tuple(notes)
        self._tokens = trie.tokens
        self._source: tuple[object, ...] | None = None

    def mask(self, state: State) -> np.ndarray:
        """The tokens that may follow, bool[V]: a new array on the host."""
        return self.masks.mask(state)

    def advance(self, state: State, token: int) -> State:
        """The state after one more token: after all of its bytes.

        Raises
        ------
        InputError
            for a token that may not follow.
        """
        token = index(token)
        if not 0 <= token < self.vocabulary:
            raise InputError(f"token {token} is outside the vocabulary of {self.vocabulary}")
        if token in self.end_tokens:
            if not state.finished:
                raise InputError(f"the end token {token} may not follow: the text is not complete")
            return ENDED
        text = self._tokens[token]
        after = self.read(state, text) if text else None
        if after is None:
            shown = "is a special or empty token" if not text else f"is {text!r}"
            raise InputError(f"token {token} may not follow: it {shown}")
        return after

    def read(self, state: State, text: bytes) -> State | None:
        """The state after more bytes; None if they may not follow."""
        after: State | None = state
        for byte in text:
            if after is None:
                return None
            after = step(after, byte)
        return after

    def accepting(self, state: State) -> bool:
        """Whether the text may end here: whether the end tokens are legal."""
        return state.finished

    def matches(self, text: str | bytes) -> bool:
        """Whether a whole text is legal, however it is tokenized."""
        data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        after = self.read(self.start, data)
        return after is not None and after.finished

    def forced(self, state: State) -> bytes:
        """The bytes that follow in every text; empty where there is a choice."""
        return forced_bytes(state)

    def only_token(self, state: State) -> int | None:
        """The only legal token, which has probability 1; None if there are several or none."""
        legal = np.flatnonzero(self.mask(state))
        return int(legal[0]) if len(legal) == 1 else None

    def __reduce__(self) -> tuple[object, ...]:
        if self._source is None:
            return Grammar, (self.automaton, self.masks.trie, self.end_tokens, self.notes)
        return _again, (self._source, self.masks.trie, self.end_tokens, self.notes)


def compile(
    *,
    regex: str | None = None,
    json_schema: object = None,
    ebnf: str | None = None,
    choices: Sequence[str] | None = None,
    tokenizer: Tokenizer,
    order: Order = "any",
    whitespace: Whitespace = "default",
    end_tokens: Iterable[int] | None = None,
) -> Grammar:
    """A grammar for one tokenizer, from exactly one description.

    Parameters
    ----------
    regex
        a regular expression that the whole text matches, as ``re.fullmatch`` reads it
    json_schema
        a JSON Schema: a dict, a boolean or JSON text; the text is what ``json.dumps`` writes
    ebnf
        a grammar in llama.cpp's GBNF or in Lark's syntax
    choices
        the texts that are legal
    tokenizer
        the model's (``model.tokenizer``); its tokens are read once
    order, whitespace
        of JSON: keys in ``"any"`` order or in that of the ``"schema"``; ``"default"`` whitespace
        or ``"compact"``
    end_tokens
        the tokens that end a text, by default the model's

    Raises
    ------
    GrammarError
        if the description is malformed, unsatisfiable, or cannot be enforced; of a schema it
        names JSON Pointer and keyword.
    InputError
        for none or several descriptions, or a tokenizer whose tokens have no bytes of their own.

    >>> tokenizer = Tokenizer.train(["yes no"], vocab_size=260)
    >>> grammar = compile(choices=["yes", "no"], tokenizer=tokenizer)
    >>> grammar.matches("yes"), grammar.matches("yes!"), grammar.forced(grammar.start)
    (True, False, b'')
    """
    described = {"regex": regex, "json_schema": json_schema, "ebnf": ebnf, "choices": choices}
    given = [name for name, value in described.items() if value is not None]
    if len(given) != 1:
        raise InputError(
            "a grammar is compiled from exactly one of regex, json_schema, ebnf and choices; got "
            f"{' and '.join(given) or 'none'}"
        )
    for name, value, known in (
        ("order", order, ("any", "schema")),
        ("whitespace", whitespace, ("default", "compact")),
    ):
        if value not in known:
            raise InputError(f"{name} is one of {', '.join(known)}, got {value!r}")
    if not isinstance(tokenizer, Tokenizer):
        raise InputError(
            f"tokenizer must be a refllm tokenizer, such as model.tokenizer, got "
            f"{type(tokenizer).__name__}"
        )
    source = (given[0], described[given[0]], order, whitespace)
    trie = trie_of(tokenizer)
    if end_tokens is None:
        ends = frozenset(token for token in end_tokens_of(tokenizer) if token < trie.vocabulary)
    else:
        ends = frozenset(map(index, end_tokens))
    return _again(source, trie, ends, _vocabulary_notes(tokenizer, trie, ends))


def _again(
    source: tuple[Any, ...], trie: TokenTrie, ends: frozenset[int], notes: tuple[str, ...]
) -> Grammar:
    """The grammar of a description."""
    automaton, found = _automaton(*source)
    grammar = Grammar(automaton, trie, ends, dict.fromkeys([*found, *notes]))
    grammar._source = source
    return grammar


def _automaton(
    kind: str, description: Any, order: Order, whitespace: Whitespace
) -> tuple[Automaton, tuple[str, ...]]:
    """The automaton of a description, and notes about it."""
    if kind == "json_schema":
        return compile_schema(description, order=order, whitespace=whitespace)
    if kind == "choices":
        return RegularAutomaton(_words(description)), ()
    if not isinstance(description, str):
        raise InputError(f"{kind} must be a str, got {type(description).__name__}")
    if kind == "ebnf":
        rules = ContextFree(parse(description))
        return rules, rules.notes
    dfa = from_pattern(description, search=False, dialect="python")
    if dfa.empty:
        raise GrammarError(
            f"the regular expression {description!r} is unsatisfiable: no text matches"
        )
    return RegularAutomaton(to_bytes(dfa)), ()


def _words(choices: Any) -> DFA:
    """The DFA of a list of texts."""
    if isinstance(choices, str):
        raise InputError(f"choices must be a list of texts, got the text {choices!r}")
    words = list(choices)
    if not words:
        raise GrammarError("an empty list of choices is unsatisfiable: no text is legal")
    for word in words:
        if not isinstance(word, str):
            raise InputError(f"choices must be texts, got {word!r}")
        try:
            word.encode()
        except UnicodeEncodeError:
            raise InputError(f"the choice {word!r} is not Unicode text") from None
    return from_words({word.encode(): 1 for word in words}, size=256)


def _vocabulary_notes(
    tokenizer: Tokenizer, trie: TokenTrie, ends: frozenset[int]
) -> tuple[str, ...]:
    """What the vocabulary cannot do."""
    notes = []
    missing = sorted(_TEXT_BYTES - trie.single)
    if missing:
        shown = ", ".join(f"0x{byte:02X}" for byte in missing[:8])
        more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        notes.append(
            f"no token of the vocabulary is the single byte {shown}{more}: a text that needs one "
            "may have no token to go on with"
        )
    if not ends:
        notes.append("the tokenizer has no end token: a text ends where nothing may follow")
    if drops_first_space(tokenizer):
        notes.append("the tokenizer drops a space at the beginning of a text, and masks do not")
    return tuple(notes)
