"""The records of context-free productions, as rules become them and as an automaton reads them.

| symbol               | what it derives                                                       |
|----------------------|-----------------------------------------------------------------------|
| ``Terminal``         | what its DFA over bytes accepts: never the empty text, never nothing  |
| str, int             | a rule by its name, a part of a rule by a number                      |
| ``Counted``          | ``minimum`` to ``maximum`` items; its productions are made when they  |
|                      | are needed, so that a count of a million costs nothing                |
| ``Climb``            | the rest of a left-recursive symbol (``left_recursion``)              |
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from refllm.decode.grammar.automaton import Terminal


@dataclass(frozen=True)
class Counted:
    """``minimum`` to ``maximum`` (None: any number) times ``item``."""

    item: Symbol
    minimum: int
    maximum: int | None


@dataclass(frozen=True)
class Climb:
    """What follows a ``corner`` so that both together are a ``goal``."""

    goal: Key
    corner: Key


Nonterminal: TypeAlias = str | int
Symbol: TypeAlias = Nonterminal | Terminal | Counted  # of the productions of rules
Key: TypeAlias = Nonterminal | Counted | Climb  # what has productions in a table
Part: TypeAlias = Key | Terminal


@dataclass
class Productions:
    """``of[A]`` are the productions of A, each a sequence of at most two symbols."""

    start: Nonterminal
    of: dict[Nonterminal, list[tuple[Symbol, ...]]] = field(default_factory=dict)


class Following(NamedTuple):
    """A symbol after the first one of a production; ``optional``: it may be empty."""

    symbol: Part
    optional: bool


class Production(NamedTuple):
    """A production without the empty text: ``first`` is not empty, then comes ``following``."""

    first: Part
    following: tuple[Following, ...] = ()


Table: TypeAlias = dict[Key, list[Production]]


def first_symbols(productions: Iterable[Production]) -> list[Key]:
    """The symbols that productions begin with, terminals left out."""
    return [each.first for each in productions if not isinstance(each.first, Terminal)]


def counted_production(symbol: Counted) -> Production:
    """One item, then the others: ``x{m,n}`` → x ``x{m-1,n-1}``. The item is not empty."""
    item, minimum, maximum = symbol.item, symbol.minimum, symbol.maximum
    if maximum == 1:
        return Production(item)
    less = None if maximum is None else maximum - 1
    others = Counted(item, max(minimum - 1, 1), less)
    return Production(item, (Following(others, minimum <= 1),))


def with_counted(table: Table) -> Table:
    """The table with the productions of each ``Counted`` that a production names."""
    named: list[Part] = []
    for productions in table.values():
        for first, following in productions:
            named += [first, *(each.symbol for each in following)]
    added: Table = {}
    for symbol in named:
        while isinstance(symbol, Counted) and symbol not in table and symbol not in added:
            added[symbol] = [counted_production(symbol)]
            symbol = symbol.item
    return table | added
