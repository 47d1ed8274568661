"""Productions in which every text begins at once: no empty texts, no useless symbols, no left
recursion. Each step keeps the language exactly.

**Empty texts.** A' derives the texts of A except the empty one. In A → X Y, either X' comes first,
or X derives the empty text and Y' comes first. What follows the first symbol may stay as it is: it
is marked *optional* if it may be empty, so that no production has to be written twice.

**Useless symbols.** A production with a symbol that derives no text at all is dropped. So every
state of the automaton can be completed.

**Left recursion** is taken out in ``left_recursion``.

| symbol | name                       | what it derives                              |
|--------|----------------------------|----------------------------------------------|
| A      | the keys of ``Productions`` | all texts                                   |
| A'     | the keys of ``Table``      | the texts that are not empty                 |

Source: Hopcroft and Ullman, "Introduction to Automata Theory, Languages, and Computation" (1979),
§4.4.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from refllm.decode.grammar.automaton import Terminal
from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.rule_grammars.left_recursion import without_left_recursion
from refllm.decode.grammar.rule_grammars.productions import (
    Climb,
    Counted,
    Following,
    Key,
    Nonterminal,
    Part,
    Production,
    Productions,
    Symbol,
    Table,
    counted_production,
    first_symbols,
    with_counted,
)
from refllm.decode.grammar.rule_grammars.rule_checks import Vertex, components


@dataclass(frozen=True)
class NormalForm:
    """``table[A]`` are the productions of A'; ``start`` is optional if there is an empty text.
    ``useless`` are the rules that derive no text.
    """

    start: Following
    table: Table
    ranks: dict[Key, int]
    useless: tuple[str, ...] = ()

    def productions(self, symbol: Key) -> list[Production]:
        """What a symbol derives; the counts of a ``Counted`` go down by one."""
        found = self.table.get(symbol)
        if found is not None:
            return found
        assert isinstance(symbol, Counted)
        return [counted_production(symbol)]

    def rank(self, symbol: Part) -> int:
        """A number that is larger than those of all symbols a text of this one begins with."""
        if isinstance(symbol, Terminal):
            return 0
        found = self.ranks.get(symbol)
        if found is not None:
            return found
        assert isinstance(symbol, Counted)
        return self.rank(symbol.item) + 1


def normal_form(grammar: Productions) -> NormalForm:
    """The normal form of productions.

    Raises
    ------
    GrammarError
        "unsatisfiable" if no text can be derived; or if left recursion goes through too many rules.
    """
    empty = nullable(grammar)
    table: Table = {
        symbol: _without_empty(sequences, empty) for symbol, sequences in grammar.of.items()
    }
    start = Following(grammar.start, grammar.start in empty)
    table = _productive(with_counted(table))
    rules = [symbol for symbol in grammar.of if isinstance(symbol, str)]
    useless = tuple(rule for rule in rules if rule not in table and rule not in empty)
    if grammar.start not in table:
        if start.optional:
            return NormalForm(start, {grammar.start: []}, {grammar.start: 0}, useless)
        raise GrammarError(
            f"the grammar is unsatisfiable: its rule {grammar.start!r} derives no text, since "
            "every derivation goes on forever or needs a character of an empty set"
        )
    table = _productive(with_counted(without_left_recursion(table, grammar.start)))
    return NormalForm(start, table, _ranks(table), useless)


def _ranks(table: Table) -> dict[Key, int]:
    """Ranks of the symbols, those first that a text may begin with."""
    ranks: dict[Key, int] = {}
    for component in components(table, lambda symbol: first_symbols(table[symbol])):
        assert len(component) == 1, "left recursion is left"
        firsts = first_symbols(table[component[0]])
        ranks[component[0]] = 1 + max((ranks[first] for first in firsts), default=0)
    return ranks


# --- empty texts ------------------------------------------------------------------------------


def nullable(grammar: Productions) -> set[Nonterminal]:
    """The symbols that derive the empty text."""

    def needed(sequence: Iterable[Symbol]) -> list[Nonterminal] | None:
        """What must derive the empty text so that the sequence does; None: it cannot."""
        found = []
        for symbol in sequence:
            inner = symbol
            while isinstance(inner, Counted) and inner.minimum > 0:
                inner = inner.item
            if isinstance(inner, Terminal):
                return None
            if not isinstance(inner, Counted):
                found.append(inner)
        return found

    clauses = []
    for symbol, sequences in grammar.of.items():
        for sequence in sequences:
            premises = needed(sequence)
            if premises is not None:
                clauses.append((symbol, premises))
    return _consequences(clauses)


def _without_empty(
    sequences: Iterable[tuple[Symbol, ...]], empty: set[Nonterminal]
) -> list[Production]:
    """Productions of the texts of the sequences that are not empty."""
    found = []
    for sequence in sequences:
        parts = [_canonical(symbol, empty) for symbol in sequence]
        for number, (symbol, optional) in enumerate(parts):
            found.append(Production(symbol, tuple(parts[number + 1 :])))
            if not optional:
                break
    return list(dict.fromkeys(found))


def _canonical(symbol: Symbol, empty: set[Nonterminal]) -> Following:
    """The symbol with whether it may be empty; of a ``Counted``, the form that is not empty."""
    if isinstance(symbol, Terminal):
        return Following(symbol, False)
    if not isinstance(symbol, Counted):
        return Following(symbol, symbol in empty)
    item, optional = _canonical(symbol.item, empty)
    assert not isinstance(item, Climb)
    minimum = 0 if optional else symbol.minimum  # items that are empty need not be there
    return Following(Counted(item, max(minimum, 1), symbol.maximum), minimum == 0)


# --- useless symbols --------------------------------------------------------------------------


def _productive(table: Table) -> Table:
    """The table without productions of which no text comes, and without what may only be empty."""

    def needed(production: Production) -> list[Key]:
        required = [each.symbol for each in production.following if not each.optional]
        found: list[Key] = []
        for symbol in (production.first, *required):
            while isinstance(symbol, Counted):
                symbol = symbol.item
            if not isinstance(symbol, Terminal):
                found.append(symbol)
        return found

    clauses = [(symbol, needed(each)) for symbol, of in table.items() for each in of]
    found = _consequences(clauses)

    def exists(symbol: Part) -> bool:
        while isinstance(symbol, Counted):
            symbol = symbol.item
        return isinstance(symbol, Terminal) or symbol in found

    return {
        symbol: list(
            dict.fromkeys(
                Production(each.first, tuple(f for f in each.following if exists(f.symbol)))
                for each in of
                if all(premise in found for premise in needed(each))
            )
        )
        for symbol, of in table.items()
        if exists(symbol)
    }


def _consequences(clauses: Iterable[tuple[Vertex, Iterable[Vertex]]]) -> set[Vertex]:
    """The conclusions of Horn clauses (conclusion, premises): the least set that holds them all."""
    missing: list[int] = []
    conclusions: list[Vertex] = []
    waiting: dict[Vertex, list[int]] = {}
    pending: list[Vertex] = []
    for number, (conclusion, premises) in enumerate(clauses):
        distinct = set(premises)
        missing.append(len(distinct))
        conclusions.append(conclusion)
        for premise in distinct:
            waiting.setdefault(premise, []).append(number)
        if not distinct:
            pending.append(conclusion)
    found: set[Vertex] = set()
    while pending:
        fact = pending.pop()
        if fact in found:
            continue
        found.add(fact)
        for number in waiting.get(fact, ()):
            missing[number] -= 1
            if not missing[number]:
                pending.append(conclusions[number])
    return found
