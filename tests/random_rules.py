"""Random grammars over the letters a and b, and the texts to compare them on.

Trees are drawn node by node, so left recursion (also through rules that may be empty), ambiguity,
useless rules and empty languages all occur.
"""

from __future__ import annotations

from itertools import product

from hypothesis import strategies as st

from refllm.decode.grammar.automaton import Stack, State, Terminal, accepting, step
from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.rule_grammars.context_free import ContextFree, Rest
from refllm.decode.grammar.rule_grammars.productions import Counted, Part
from refllm.decode.grammar.rule_grammars.rules import (
    EMPTY,
    Alternatives,
    Characters,
    Concatenation,
    Expression,
    Literal,
    Position,
    Reference,
    Repetition,
    Rule,
    RuleSet,
)
from refllm.decode.grammar.stacks import Fork

PLACE = Position(1, 1)
LETTERS = "ab"
FAR = 10**9
CLOSING = bytes(sorted(range(256), key=lambda byte: (byte >= 127, byte < 32, byte)))
NAMES = ("first", "second", "third")

_leaves = st.one_of(
    st.sampled_from(["a", "b", "ab"]).map(Literal),
    st.sampled_from([((97, 98),), ((98, 98),), ()]).map(Characters),
    st.just(EMPTY),
    st.sampled_from(NAMES).map(lambda name: Reference(name, PLACE)),
    st.sampled_from(NAMES).map(lambda name: Reference(name, PLACE)),
)


def _inner(nodes: st.SearchStrategy[Expression]) -> st.SearchStrategy[Expression]:
    several = st.lists(nodes, min_size=2, max_size=3).map(tuple)
    counts = st.sampled_from([(0, 1), (0, None), (1, None), (2, 3), (0, 2), (2, 2), (2, None)])
    return st.one_of(
        several.map(Concatenation),
        several.map(Alternatives),
        st.builds(lambda node, count: Repetition(node, *count), nodes, counts),
    )


expressions = st.recursive(_leaves, _inner, max_leaves=6)


@st.composite
def rule_sets(draw: st.DrawFn) -> RuleSet:
    """Three rules that may refer to each other."""
    rules = {name: Rule(name, draw(expressions), PLACE) for name in NAMES}
    return RuleSet(NAMES[0], rules)


def texts(letters: str, longest: int) -> list[str]:
    """Every text of these letters up to a length."""
    lengths = range(longest + 1)
    return ["".join(each) for n in lengths for each in product(letters, repeat=n)]


def compiled(grammar: RuleSet) -> ContextFree | None:
    """The automaton; None for a grammar without any text."""
    try:
        return ContextFree(grammar)
    except GrammarError as error:
        if "unsatisfiable" not in str(error):
            raise
        return None


def state_after(automaton: ContextFree, text: str | bytes) -> State | None:
    """The state after a text; None if no text of the grammar begins so."""
    state = automaton.start()
    for byte in text.encode() if isinstance(text, str) else text:
        if state is None:
            return None
        state = step(state, byte)
    return state


def accepts(automaton: ContextFree | None, text: str | bytes) -> bool:
    """Whether the automaton accepts the text."""
    if automaton is None:
        return False
    state = state_after(automaton, text)
    return state is not None and accepting(state)


class ShortestTexts:
    """How many more bytes a state needs to be a whole text: the closing of random texts."""

    def __init__(self, automaton: ContextFree) -> None:
        self.lengths: dict[Part, int] = {}
        changed = True
        while changed:  # Bellman and Ford's relaxation; few rounds are needed
            changed = False
            for symbol, productions in automaton.form.table.items():
                for first, following in productions:
                    needed = [first, *(each.symbol for each in following if not each.optional)]
                    total = sum(self.length(each) for each in needed)
                    if total < self.lengths.get(symbol, FAR):
                        self.lengths[symbol] = total
                        changed = True

    def length(self, symbol: Part) -> int:
        """Bytes of the shortest text of a symbol."""
        if isinstance(symbol, Terminal):
            return symbol.dfa.distance() or 0
        if isinstance(symbol, Counted):
            return symbol.minimum * self.length(symbol.item)
        return self.lengths.get(symbol, FAR)

    def height(self, stack: Stack | None) -> int:
        """Bytes of the shortest text of a whole stack."""
        total = 0
        while stack is not None:
            frame = stack.frame
            if isinstance(frame, Fork):
                return total + min(map(self.height, frame.stacks))
            assert isinstance(frame, Rest)
            if not frame.following.optional:
                total += self.length(frame.following.symbol)
            stack = stack.below
        return total

    def missing(self, state: State | None) -> int:
        """Bytes that must follow a state at least."""
        if state is None:
            return FAR
        if accepting(state):
            return 0
        return min(
            (each.terminal.dfa.distance(each.state) or 0) + self.height(each.stack)
            for each in state.threads
        )

    def closed(self, text: bytes, state: State) -> bytes:
        """The text with a shortest ending."""
        while missing := self.missing(state):
            for byte in CLOSING:
                after = step(state, byte)
                if after is not None and self.missing(after) < missing:
                    break
            else:
                raise AssertionError(f"{text!r} cannot be closed")
            state = after
            text += bytes([byte])
        return text
