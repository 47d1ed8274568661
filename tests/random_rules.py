"""Random grammars over the letters a and b, and the texts to compare them on.

Trees are drawn node by node, so left recursion (also through rules that may be empty), ambiguity,
useless rules and empty languages all occur.
"""

from __future__ import annotations

from itertools import product

from hypothesis import strategies as st

from refllm.decode.grammar.automaton import State, accepting, step
from refllm.decode.grammar.context_free import ContextFree
from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.rules import (
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

PLACE = Position(1, 1)
LETTERS = "ab"
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
