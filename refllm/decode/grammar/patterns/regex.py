"""Regular expressions → minimal automata over characters.

``parse`` (``regex_syntax.py``) makes a tree, ``PositionAutomaton`` its positions and which may
follow which, the subset construction here the deterministic automaton, and
``dfa_minimization.py`` the smallest one:

    text → tree → positions → sets of positions = states → minimal DFA

>>> dfa = from_pattern("^[a-f0-9]{4}$", search=True)
>>> dfa.matches("c0de"), dfa.matches("coda")
(True, False)

**Dialects.** ``ecma`` (ECMA 262, Unicode mode) is the default, as JSON Schema asks for it. Its
``\\d``, ``\\w`` and ``.`` accept less than those of Python's ``re``, and its ``$`` does not stand
before a final line end: what ``\\w+`` accepts here, validators of both kinds accept. ``python``
means exactly what ``re.compile(pattern)`` does.

**Size.** Positions are counted before they are built, states and work while they are: a pattern
that needs more than ``MAX_STATES`` is rejected within about a second.

**Left out**: see ``regex_syntax.py``. Lookaheads are exact, anywhere (``regex_lookahead.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from refllm.decode.grammar.automata.alphabet import alphabet_of
from refllm.decode.grammar.automata.dfa import ACCEPT, DFA
from refllm.decode.grammar.automata.dfa_builders import explore, too_large
from refllm.decode.grammar.automata.dfa_minimization import minimize
from refllm.decode.grammar.automata.dfa_operations import complement
from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.patterns.position_automaton import (
    START,
    WORD,
    PositionAutomaton,
    bits_of,
)
from refllm.decode.grammar.patterns.regex_classes import Dialect
from refllm.decode.grammar.patterns.regex_context import FINAL_NEWLINE, NEWLINE, Context
from refllm.decode.grammar.patterns.regex_lookahead import (
    class_intervals,
    determinize_with_lookaheads,
)
from refllm.decode.grammar.patterns.regex_syntax import parse
from refllm.decode.grammar.patterns.regex_tree import (
    BEGIN,
    END,
    Assertion,
    Lookahead,
    Node,
    Repeat,
    Sequence,
    Symbols,
)
from refllm.decode.grammar.patterns.unicode_classes import ANY

MAX_WORK = 2_000_000  # positions looked at in one subset construction
COUNTED = 64  # repetition counts above this can be counted beside the automaton


@lru_cache(maxsize=128)
def from_pattern(pattern: str, *, search: bool, dialect: Dialect = "ecma") -> DFA:
    """The minimal automaton, over characters, of the texts that a regular expression matches.

    With ``search`` a match anywhere in the text suffices (JSON Schema's ``pattern``,
    ``re.search``), without it the whole text must match (``re.fullmatch``). Raises
    ``GrammarError`` if the pattern is malformed, not supported or too large.
    """
    shown = pattern if len(pattern) <= 60 else pattern[:57] + "..."
    tree = parse(pattern, dialect)
    return compile_tree(tree, dialect, search=search, what=f"regular expression {shown!r}")


def compile_tree(tree: Node, dialect: Dialect, *, search: bool, what: str) -> DFA:
    """The automaton of a syntax tree, as ``from_pattern``; ``what`` begins its errors."""
    return _compile(tree, dialect, before=search, after=search, what=what)


def from_pattern_with_length(
    pattern: str, *, dialect: Dialect = "ecma"
) -> tuple[DFA, int, int | None]:
    """The texts in which a pattern matches, as an automaton and a range of lengths.

    ``^C{n,m}$`` with one class C and a count above ``COUNTED`` is ``C*`` with the lengths n … m,
    so that a counter beside the automaton takes the place of m states. Every other pattern is
    ``from_pattern(pattern, search=True)`` with any length: 0, None.
    """
    match parse(pattern, dialect):
        case Sequence((Assertion(begin), Repeat(Symbols() as body, low, high), Assertion(end))) if (
            begin == BEGIN and end == END and max(low, high or 0) > COUNTED
        ):
            any_number = Repeat(body, 0, None)
            return _compile(any_number, dialect, before=False, after=False, what=""), low, high
    return from_pattern(pattern, search=True, dialect=dialect), 0, None


_EVERYTHING = Repeat(Symbols(ANY), 0, None)


def _compile(tree: Node, dialect: Dialect, *, before: bool, after: bool, what: str) -> DFA:
    """The minimal automaton of a tree, with any text ``before`` and ``after`` the match."""
    parts = [tree]
    if before:
        parts.insert(0, _EVERYTHING)
    if after:
        parts.append(_EVERYTHING)
    inside_lookahead = after and not before
    try:
        automaton = PositionAutomaton.of(Sequence(tuple(parts)), inside_lookahead=inside_lookahead)
    except GrammarError as error:
        raise GrammarError(f"{what} {error}") from None
    dfas = [_obligation(lookahead, dialect, what) for lookahead in automaton.lookaheads]
    context = Context(automaton, dialect, [part for dfa in dfas for part in class_intervals(dfa)])
    plain = [edges.get(0, 0) for edges in automaton.follow]
    finished = _finished(automaton, plain) if after else 0
    if dfas:
        dfa = determinize_with_lookaheads(automaton, context, dfas, finished=finished, what=what)
    else:
        dfa = _determinize(automaton, context, plain, finished=finished, what=what)
    if context.newline is not None:
        dfa = _resolve_final_newline(dfa)
    return minimize(dfa)


def _obligation(lookahead: Lookahead, dialect: Dialect, what: str) -> DFA:
    """The automaton of the texts before which a lookahead holds."""
    dfa = _compile(lookahead.body, dialect, before=False, after=True, what=what)
    return dfa if lookahead.positive else complement(dfa)


def _determinize(
    automaton: PositionAutomaton, context: Context, plain: list[int], *, finished: int, what: str
) -> DFA:
    """The subset construction: a state is the set of positions that the text may have reached.

    ``plain[p]`` are the positions that follow p on no condition; from one of ``finished`` every
    text is accepted.
    """
    conditional = sum(1 << p for p, edges in enumerate(automaton.follow) if edges.keys() - {0})
    tail = 1 << len(plain) - 1  # the last position: anything after the match
    members = context.members
    work = 0

    def row_of(mask: int) -> Iterator[int | None]:
        nonlocal work
        work += mask.bit_count()
        if work > MAX_WORK:
            raise too_large(what)
        reached = WORD
        for position in bits_of(mask & ~WORD):
            reached |= plain[position]
        if not mask & conditional:
            targets = [reached & inside for inside in members]
        else:
            edges = context.edges(mask & conditional)
            targets = []
            for cls, inside in enumerate(members):
                found = reached
                for condition, positions in edges.items():
                    if context.holds(condition, mask, cls):
                        found |= positions
                targets.append(found & inside)
        return (
            (tail if target & finished else target) if target > WORD else None for target in targets
        )

    def label_of(mask: int) -> int:
        for condition, positions in automaton.accept.items():
            if mask & positions and context.holds_at_end(condition, mask):
                return ACCEPT
        return 0

    return explore(context.alphabet, START, row_of, label_of, what=what)


def _finished(automaton: PositionAutomaton, plain: list[int]) -> int:
    """The positions of a search from which every text is accepted: the match is complete."""
    tail = 1 << len(plain) - 1
    accepting = automaton.accept.get(0, 0)
    return sum(1 << p for p, after in enumerate(plain) if after & tail and accepting >> p & 1)


def _resolve_final_newline(dfa: DFA) -> DFA:
    """Read the one line end for both of its symbols.

    A state is a state of ``dfa`` and whether the text may end here, which after a line end is
    decided by where the final line end would have led.
    """
    size = dfa.size - 1
    final = dfa.alphabet.class_of(FINAL_NEWLINE)
    sets = [
        tuple((low, min(high, size - 1)) for low, high in part if low < size)
        for part in class_intervals(dfa)
    ]
    alphabet, _ = alphabet_of(size, [((NEWLINE, NEWLINE),), *sets])
    columns = [dfa.alphabet.class_of(symbol) for symbol in alphabet.representatives]
    newline = alphabet.class_of(NEWLINE)

    def row_of(key: tuple[int, int]) -> Iterator[tuple[int, int] | None]:
        row = dfa.table[key[0]]
        for cls, old in enumerate(columns):
            target = row[old]
            label = dfa.labels[row[final] if cls == newline else target]
            yield (target, label) if target or label else None

    start = (dfa.start, dfa.labels[dfa.start])
    return explore(alphabet, start, row_of, lambda key: key[1])
