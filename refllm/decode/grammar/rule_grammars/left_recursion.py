r"""Left recursion taken out of productions: the left-corner transform.

A pushdown automaton reads from left to right: to derive A it replaces A by a production, again
and again, until a terminal comes first. That ends only if no A begins with itself.

X is a *left corner* of Z if a production Z → X β exists. The symbols of one cycle of left corners
are left-recursive: A ⇒ X β ⇒ ... ⇒ A γ. For each A of a cycle C that texts are derived from,

    A          → Y β climb(A, X)    for X in C with a production X → Y β whose Y is not in C
    climb(A, X) → β climb(A, Z)     for Z in C with a production Z → X β

and climb(A, A) may be empty. The first reads the lower left end of the derivation, the others its
left edge, upwards to A. Where the β of Z → X β may be empty, an X is a Z as well.

Productions are without empty texts (``productions``), so hidden left recursion, A → B A γ with a B
that may be empty, is in the open here.

| symbol      | name          | what it derives                                        |
|-------------|---------------|--------------------------------------------------------|
| C           | ``cycle``     |                                                        |
| climb(A, X) | ``Climb``     | what follows an X so that both together are an A       |

Sources: Rosenkrantz and Lewis, "Deterministic left corner parsing" (1970); for left-recursive
symbols only, Johnson and Roark, "Compact non-left-recursive grammars using the selective
left-corner transform and factoring" (COLING 2000).
"""

from __future__ import annotations

from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.rule_grammars.productions import (
    Climb,
    Counted,
    Following,
    Key,
    Part,
    Production,
    Table,
    first_symbols,
)
from refllm.decode.grammar.rule_grammars.rule_checks import components

MAX_CLIMBS = 100_000


def without_left_recursion(table: Table, start: Key) -> Table:
    """A table of the same texts of ``start`` in which no symbol begins with itself.

    Raises
    ------
    GrammarError
        if the result would have more than ``MAX_CLIMBS`` symbols climb(A, X).
    """
    result = dict(table)
    climbs = 0
    for component in components(table, lambda symbol: first_symbols(table[symbol])):
        if len(component) == 1 and component[0] not in first_symbols(table[component[0]]):
            continue
        goals = _goals(table, set(component), start)
        climbs += len(goals) * len(component)
        if climbs > MAX_CLIMBS:
            raise GrammarError(
                f"the left recursion of the grammar goes through too many rules "
                f"({len(component):,} begin with each other): let fewer begin with themselves"
            )
        cycle = _Cycle(table, component)
        for symbol in component:
            del result[symbol]
        for goal in goals:
            result |= cycle.productions_of(goal)
    return result


def _goals(table: Table, cycle: set[Key], start: Key) -> set[Key]:
    """The symbols of a cycle that are derived from elsewhere, not only as a left corner of it."""
    found: set[Part] = {each for each in cycle if each == start or isinstance(each, Counted)}
    for symbol, productions in table.items():
        if isinstance(symbol, Counted):  # x{m,n} goes on with x{m-1,n-1}, outside of the cycle
            found.add(symbol.item)
        for first, following in productions:
            if symbol not in cycle:
                found.add(first)
            found.update(each.symbol for each in following)
    return {symbol for symbol in cycle if symbol in found}


class _Cycle:
    """The left edges of one cycle of left corners."""

    def __init__(self, table: Table, members: list[Key]) -> None:
        self.members = members
        # per X each Z → X β, with its β, and each Y β, for X → Y β with Y outside of the cycle
        self.parents: dict[Part, list[tuple[Key, tuple[Following, ...]]]] = {
            each: [] for each in members
        }
        self.seeds: dict[Key, list[Production]] = {each: [] for each in members}
        for symbol in members:
            for production in table[symbol]:
                if production.first in self.parents:
                    self.parents[production.first].append((symbol, production.following))
                else:
                    self.seeds[symbol].append(production)
        self.complete_as = {each: self._complete_as(each) for each in members}

    def _complete_as(self, corner: Key) -> list[Key]:
        """The symbols that a ``corner`` may be by itself: Z, for Z → corner, and so on."""
        found = {corner: None}
        pending = [corner]
        while pending:
            for symbol, following in self.parents[pending.pop()]:
                if symbol not in found and all(each.optional for each in following):
                    found[symbol] = None
                    pending.append(symbol)
        return list(found)

    def productions_of(self, goal: Key) -> Table:
        """The productions of a goal and of what climbs up to it."""

        def climb(corner: Key) -> Following:
            return Following(Climb(goal, corner), goal in self.complete_as[corner])

        result: Table = {
            goal: [
                Production(first, (*following, climb(symbol)))
                for symbol, productions in self.seeds.items()
                for first, following in productions
            ]
        }
        for corner in self.members:
            upwards = [
                Production(each.symbol, (climb(symbol),))
                for complete in self.complete_as[corner]
                for symbol, following in self.parents[complete]
                for each in following  # one or none: productions have at most two symbols
            ]
            result[Climb(goal, corner)] = list(dict.fromkeys(upwards))
        return result
