"""Small grammars over tokens for the tests of decoding: tables, made without any compiler."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import takewhile
from typing import Any

import numpy as np

from drafting import PROMPT, next_logits
from refllm.decode.sampling import process_logits
from refllm.decode.sampling_params import SamplingParams
from refllm.errors import InputError


class TableGrammar:
    """A DFA over tokens: ``edges[state][token]`` is the next state; state 0 is the start.

    ``end_tokens`` may follow exactly where a state is accepting, and lead to the state None.
    """

    def __init__(
        self,
        edges: Sequence[dict[int, int]],
        accepting: Collection[int],
        vocabulary: int,
        end_tokens: Collection[int] = (),
        forced: dict[int, bytes] | None = None,
    ):
        self.edges = edges
        self.accepted = frozenset(accepting)
        self.vocabulary = vocabulary
        self.end_tokens = tuple(end_tokens)
        self._forced = forced or {}
        self.start = 0

    def mask(self, state: int | None) -> np.ndarray:
        """bool[V]."""
        mask = np.zeros(self.vocabulary, bool)
        if state is not None:
            mask[list(self.edges[state])] = True
            mask[list(self.end_tokens)] = state in self.accepted
        return mask

    def advance(self, state: int | None, token: int) -> int | None:
        """The next state; InputError for an illegal token."""
        if state is not None and token in self.end_tokens and state in self.accepted:
            return None
        if state is None or token not in self.edges[state]:
            raise InputError(f"token {token} may not follow")
        return self.edges[state][token]

    def accepting(self, state: int | None) -> bool:
        """Whether the output may end."""
        return state is None or state in self.accepted

    def forced(self, state: int | None) -> bytes:
        """What must follow."""
        return self._forced.get(state, b"")

    def reads(self, tokens: Sequence[int]) -> Any:
        """The state after ``tokens``, or False if they are illegal."""
        state: int | None = self.start
        for token in tokens:
            try:
                state = self.advance(state, token)
            except InputError:
                return False
        return state


class WordGrammar:
    """Some ASCII words, read token by token: the state is the text so far."""

    start = ""

    def __init__(self, words: Sequence[str], spellings: Sequence[str], end_tokens: Any = ()):
        """``spellings[token]`` is the text of a token; an empty one is never legal."""
        self.words = words
        self.spellings = spellings
        self.end_tokens = tuple(end_tokens)
        self._masks: dict[str | None, np.ndarray] = {}

    @classmethod
    def of(cls, words: Sequence[str], model: Any) -> WordGrammar:
        """For the tokenizer and the end tokens of a model."""
        ends = model.config.eos_token_ids
        texts = [model.tokenizer.decode([token]) for token in range(model.config.vocab_size)]
        return cls(words, ["" if t in ends else text for t, text in enumerate(texts)], ends)

    def _may_follow(self, state: str | None, token: int) -> bool:
        if state is None or token in self.end_tokens:
            return state in self.words
        text = self.spellings[token]
        return bool(text) and any(word.startswith(state + text) for word in self.words)

    def mask(self, state: str | None) -> np.ndarray:
        """bool[V]."""
        if state not in self._masks:
            tokens = range(len(self.spellings))
            legal = [state is not None and self._may_follow(state, t) for t in tokens]
            self._masks[state] = np.array(legal)
        return self._masks[state]

    def advance(self, state: str | None, token: int) -> str | None:
        """The text with the token's; None after an end token."""
        if state is None or not self._may_follow(state, token):
            raise InputError(f"token {token} may not follow")
        return None if token in self.end_tokens else state + self.spellings[token]

    def accepting(self, state: str | None) -> bool:
        """Whether the text is a word."""
        return state is None or state in self.words

    def matches(self, text: str) -> bool:
        """Whether a whole text is legal."""
        return text in self.words

    def forced(self, state: str | None) -> bytes:
        """The longest text that all words continue with, up to where one may end."""
        if state is None or state in self.words:
            return b""
        rests = [word[len(state) :] for word in self.words if word.startswith(state)]
        shared = takewhile(lambda letters: len(set(letters)) == 1, zip(*rests, strict=False))
        return "".join(letters[0] for letters in shared).encode()


def random_grammar(
    seed: int, vocabulary: int, states: int = 4, end_tokens: Collection[int] = (), edges: int = 3
) -> TableGrammar:
    """A random DFA of which every state leads to an accepting one; some states are complete."""
    rng = np.random.default_rng(seed)
    tokens = np.setdiff1d(np.arange(vocabulary), list(end_tokens))
    table: list[dict[int, int]] = []
    for state in range(states):
        count = int(rng.integers(1, min(edges, len(tokens)) + 1))
        chosen = rng.choice(tokens, count, replace=False)
        table.append({int(token): int(rng.integers(states)) for token in chosen})
        if state + 1 < states:  # state after state, so that the last one is always reached
            table[-1][int(chosen[0])] = state + 1
    accepting = {states - 1, *(s for s in range(1, states) if rng.random() < 0.3)}
    if rng.random() < 0.5:
        table[-1] = {}  # complete
    return TableGrammar(table, accepting, vocabulary, end_tokens)


def constrained_logits(z: np.ndarray, grammar: TableGrammar, output: Sequence[int]) -> np.ndarray:
    """z[V] with -inf for what may not follow ``output``: the definition."""
    state = grammar.reads(output)
    assert state is not False
    return np.where(grammar.mask(state), z, -np.inf)


def is_complete(grammar: TableGrammar, output: Sequence[int]) -> bool:
    """Whether nothing but end tokens may follow an output that may end."""
    state = grammar.reads(output)
    if state is None:
        return True
    return state is not False and grammar.accepting(state) and not grammar.edges[state]


# over three tokens
GRAMMARS = {
    "never complete": TableGrammar([{0: 1, 1: 1, 2: 2}, {0: 0, 1: 2}, {2: 2, 0: 1}], [2], 3),
    "one token is legal now and then": TableGrammar(
        [{0: 1, 2: 1}, {1: 2}, {0: 0, 1: 3}, {}], [3], 3
    ),
    "an end token": TableGrammar([{0: 1, 2: 1}, {0: 0, 2: 1}], [1], 3, end_tokens=(1,)),
}


def constrained_distribution(
    target: Any, grammar: TableGrammar, sampling: SamplingParams, length: int
) -> dict[tuple[int, ...], float]:
    """The masked and renormalised distribution of outputs after ``PROMPT``, end token included."""
    found: dict[tuple[int, ...], float] = {}

    def follow(output: tuple[int, ...], chance: float) -> None:
        if len(output) == length or is_complete(grammar, output):
            found[output] = found.get(output, 0.0) + chance
            return
        z = constrained_logits(next_logits(target, [*PROMPT, *output]), grammar, output)
        p = process_logits(z[None], sampling.temperature, sampling.top_k)[0]
        for token in np.flatnonzero(p):
            follow((*output, int(token)), chance * p[token])

    follow((), 1.0)
    return found
