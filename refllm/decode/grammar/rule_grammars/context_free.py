"""Context-free grammars as frames of the pushdown automaton.

The stack holds symbols that are still to be derived, the next one on top. Where the terminal above
a frame has been read, the frame's symbol is *expanded*: its productions are followed by their
first symbols down to terminals, and what follows each first symbol is pushed.

An expansion meets each symbol once: symbols are worked on in the order of their ranks, those that
others begin with last, and if a symbol is met on several stacks, these are joined in one ``Fork``.
So it costs no more than the grammar is long, and has one thread for each terminal, however
ambiguous the grammar is.

| symbol of the table  | here                                                                  |
|----------------------|-----------------------------------------------------------------------|
| A' β γ               | a thread within a terminal that A' begins with, over the stack β γ    |
| a set of stacks      | ``Fork``                                                              |

Sources: Greibach normal form, where the stack of a parser holds what is predicted (Hopcroft and
Ullman, 1979, §4.6); joined stacks, Tomita's graph-structured stack (1986), here as far as one
expansion goes. The naive twin is ``earley``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop, heappush

from refllm.decode.grammar.automaton import Entry, Stack, State, Terminal, enter
from refllm.decode.grammar.rule_grammars.normal_form import NormalForm, normal_form
from refllm.decode.grammar.rule_grammars.productions import Following, Part
from refllm.decode.grammar.rule_grammars.regular_parts import productions_of
from refllm.decode.grammar.rule_grammars.rule_checks import reachable
from refllm.decode.grammar.rule_grammars.rules import RuleSet
from refllm.decode.grammar.stacks import Joinable, join


class ContextFree:
    """The automaton of a grammar; ``notes`` names the rules that no text is derived with."""

    def __init__(self, grammar: RuleSet) -> None:
        self.form: NormalForm = normal_form(productions_of(grammar))
        used = set(reachable(grammar))
        unused = [name for name in grammar.rules if name not in used]
        self.notes: tuple[str, ...] = (
            *(f"the rule {name!r} is never used" for name in unused),
            *(f"the rule {name!r} derives no text" for name in self.form.useless),
        )
        self._frames: dict[Following, Rest] = {}
        self._numbers: dict[Part, int] = {}

    def start(self) -> State | None:
        """The state before the first byte."""
        return enter(self.rest(self.form.start).resume(1, None, None))

    def rest(self, following: Following) -> Rest:
        """The one frame for a symbol that is to be derived."""
        return self._frames.setdefault(following, Rest(self, following))

    def expand(self, symbol: Part, below: Stack | None) -> Iterator[Entry]:
        """The terminals that a text of the symbol begins with, each on what is to follow it."""
        stacks: dict[Part, set[Stack | None]] = {symbol: {below}}
        terminals: list[Terminal] = []
        waiting = [(-self.form.rank(symbol), 0, symbol)]
        met = 0
        while waiting:
            _, _, symbol = heappop(waiting)
            if isinstance(symbol, Terminal):
                terminals.append(symbol)
                continue
            joined = join(stacks.pop(symbol))
            for first, following in self.form.productions(symbol):
                stack = joined
                for each in reversed(following):
                    stack = Stack(self.rest(each), stack)
                if first not in stacks:
                    stacks[first] = set()
                    met += 1
                    heappush(waiting, (-self.form.rank(first), met, first))
                stacks[first].add(stack)
        for terminal in terminals:
            yield terminal, join(stacks[terminal])


@dataclass(frozen=True, eq=False)
class Rest(Joinable):
    """A frame: a symbol that is to be derived. Compared by identity: a grammar has one of each."""

    grammar: ContextFree
    following: Following

    def resume(self, label_bits: int, text: bytes | None, below: Stack | None) -> Iterator[Entry]:
        """What the symbol begins with; if it may be empty, also what comes after it."""
        if self.following.optional:
            yield None, below
        yield from self.grammar.expand(self.following.symbol, below)

    def __repr__(self) -> str:
        return f"Rest({self.following.symbol!r}{'?' if self.following.optional else ''})"
