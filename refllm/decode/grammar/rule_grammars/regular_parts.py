"""From rules to productions whose terminals are as large as they can be.

A part of the rules that does not refer to a recursive rule is regular, and one DFA can read it:
the string of a JSON grammar, a number, ``"," ws``. The largest such parts become terminals of the
pushdown automaton; only what is recursive is left to its stack.

Sizes are counted before anything is built: rules that refer to rules can grow exponentially. A
part whose automaton would be too large is taken apart, and its own parts become terminals: the
language stays the same, and the automaton only has more threads.

Left out: rules that are recursive and regular all the same (``a ::= "x" a | "y"``) stay rules.
"""

from __future__ import annotations

from typing import NamedTuple

from refllm.decode.grammar.automata.dfa import DFA
from refllm.decode.grammar.automata.dfa_operations import difference, literal
from refllm.decode.grammar.automata.utf8 import to_bytes
from refllm.decode.grammar.automaton import Terminal
from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.patterns.regex import compile_tree, from_pattern
from refllm.decode.grammar.patterns.regex_tree import Choice, Node, Repeat, Sequence, Symbols
from refllm.decode.grammar.patterns.unicode_classes import any_case, chars
from refllm.decode.grammar.rule_grammars.pattern_trees import at, pattern_source, with_pattern_trees
from refllm.decode.grammar.rule_grammars.productions import Counted, Productions, Symbol
from refllm.decode.grammar.rule_grammars.rule_checks import components, reachable
from refllm.decode.grammar.rule_grammars.rules import (
    Alternatives,
    Characters,
    Concatenation,
    Expression,
    Literal,
    Pattern,
    Reference,
    Repetition,
    RuleSet,
    children,
    references,
)

MAX_WEIGHT = 2_000  # nodes and positions of a part that may become one DFA
MAX_TREE_DEPTH = 100
MAX_PART_STATES = 5_000
MAX_STATES = 100_000  # of all parts
SMALL_WEIGHT = 20  # parts that are still built as one after MAX_FAILURES
MAX_FAILURES = 3
LONG = 500  # characters of a literal that become one terminal


class Regular(NamedTuple):
    """A part that is regular: its tree, and how large and deep that is, references expanded."""

    tree: Node
    weight: int
    depth: int


def productions_of(grammar: RuleSet) -> Productions:
    """The productions of the rules that texts can be derived with."""
    return _Lowering(grammar).result


class _Lowering:
    """Takes the trees of the rules apart, from whole rules down."""

    def __init__(self, grammar: RuleSet) -> None:
        names = reachable(grammar)
        self.bodies = {name: with_pattern_trees(grammar.rules[name].body) for name in names}
        self.regular: dict[str, Regular | None] = {}
        self.terminals: dict[Node | Pattern, Symbol | None] = {}  # None: too large
        self.failures = 0
        self.states = 0
        self.numbers = 0
        self.result = Productions(grammar.start)
        self._find_regular_rules(names)
        self.pending = [grammar.start]  # rules that stay rules
        while self.pending:
            name = self.pending.pop()
            if name not in self.result.of:
                self.result.of[name] = [(self.symbol(self.bodies[name]),)]

    def _find_regular_rules(self, names: list[str]) -> None:
        """Which rules are regular: those that refer to such rules only."""

        def targets(name: str) -> list[str]:
            return [reference.name for reference in references(self.bodies[name])]

        for component in components(names, targets):
            for name in component:  # names of a cycle are looked up before they are known
                self.regular[name] = self.regular_part(self.bodies[name])

    def regular_part(self, node: Expression) -> Regular | None:
        """The part as a regular expression; None if it is not regular, or too large."""
        match node:
            case Literal(text, ignore_case):
                if len(text) > LONG:
                    return None
                return Regular(_literal_tree(text, ignore_case), len(text), 2)
            case Characters(members):
                return Regular(Symbols(members), 1, 1)
            case Reference(name):
                return self.regular.get(name)
            case Concatenation(parts) | Alternatives(parts):
                return self._joined(parts, Sequence if isinstance(node, Concatenation) else Choice)
            case Repetition(item, minimum, maximum):
                part = self.regular_part(item)
                copies = max(minimum, 1) if maximum is None else maximum
                if part is None or part.weight * copies > MAX_WEIGHT:
                    return None
                repeated = Repeat(part.tree, minimum, maximum)
                return self._if_small(repeated, part.weight * copies + 1, part.depth + 1)
        return None

    def _joined(
        self, parts: tuple[Expression, ...], kind: type[Sequence | Choice]
    ) -> Regular | None:
        found = []
        for part in parts:
            regular = self.regular_part(part)
            if regular is None:
                return None
            found.append(regular)
        return self._join(found, kind)

    def _join(self, parts: list[Regular], kind: type[Sequence | Choice]) -> Regular | None:
        if len(parts) == 1:
            return parts[0]
        weight = 1 + sum(part.weight for part in parts)
        depth = 1 + max((part.depth for part in parts), default=0)
        return self._if_small(kind(tuple(part.tree for part in parts)), weight, depth)

    def _if_small(self, tree: Node, weight: int, depth: int) -> Regular | None:
        fits = weight <= MAX_WEIGHT and depth <= MAX_TREE_DEPTH
        return Regular(tree, weight, depth) if fits else None

    # --- symbols ------------------------------------------------------------------------------

    def symbol(self, node: Expression) -> Symbol:
        """A symbol that derives what the node does."""
        part = self.regular_part(node)
        if part is not None:
            terminal = self.terminal(part, always=isinstance(node, Literal | Characters))
            if terminal is not None:
                return terminal
        match node:
            case Literal(text, ignore_case):
                pieces = [text[at : at + LONG] for at in range(0, len(text), LONG)]
                return self.chain([self.symbol(Literal(piece, ignore_case)) for piece in pieces])
            case Pattern():
                return self.pattern(node)
            case Reference(name):
                self.pending.append(name)
                return name
            case Repetition(_, _, 0):
                return self.chain([])
            case Repetition(item, minimum, maximum):
                return Counted(self.symbol(item), minimum, maximum)
            case Concatenation():
                return self.chain(self.merged(_flat(node, Concatenation), Sequence))
            case Alternatives():
                return self.new(
                    [(each,) for each in self.merged(_flat(node, Alternatives), Choice)]
                )
        raise AssertionError(f"{node} is always a terminal")

    def merged(self, nodes: list[Expression], kind: type[Sequence | Choice]) -> list[Symbol]:
        """Symbols for the nodes; regular ones that stand together share one, if it is small."""
        symbols: list[Symbol] = []
        run: list[Expression] = []
        weight = 0

        def end_run() -> None:
            nonlocal weight
            found = self._joined(tuple(run), kind) if len(run) > 1 else None
            terminal = None if found is None else self.terminal(found)
            symbols.extend(map(self.symbol, run) if terminal is None else [terminal])
            run.clear()
            weight = 0

        for node in nodes:
            part = self.regular_part(node)
            if part is None:
                if kind is Sequence:
                    end_run()
                symbols.append(self.symbol(node))
                continue
            if weight + part.weight >= MAX_WEIGHT:
                end_run()
            run.append(node)
            weight += part.weight
        end_run()
        return symbols

    def chain(self, symbols: list[Symbol]) -> Symbol:
        """A symbol for the symbols one after the other."""
        if not symbols:
            return self.new([()])
        chained = symbols[-1]
        for symbol in reversed(symbols[:-1]):
            chained = self.new([(symbol, chained)])
        return chained

    def new(self, productions: list[tuple[Symbol, ...]]) -> int:
        """A new nonterminal with these productions."""
        self.numbers += 1
        self.result.of[self.numbers] = productions
        return self.numbers

    # --- terminals ----------------------------------------------------------------------------

    def terminal(self, part: Regular, *, always: bool = False) -> Symbol | None:
        """A symbol for one DFA; None if that is too large, and ``always`` is not set."""
        if self.terminals.get(part.tree) is not None:
            return self.terminals[part.tree]
        given_up = self.failures >= MAX_FAILURES and part.weight > SMALL_WEIGHT
        if always or not (given_up or part.tree in self.terminals):
            self.terminals[part.tree] = self._compiled(part.tree, always)
        return self.terminals.get(part.tree)

    def _compiled(self, tree: Node, always: bool) -> Symbol | None:
        try:
            dfa = compile_tree(tree, "python", search=False, what="a part of the grammar")
        except GrammarError:
            dfa = None
        if dfa is None or (dfa.states > MAX_PART_STATES and not always):
            self.failures += 1
            return None
        return self._symbol_of(dfa)

    def pattern(self, node: Pattern) -> Symbol:
        """A symbol for a regular expression with assertions, which sees its own text alone."""
        if node not in self.terminals:
            try:
                dfa = from_pattern(pattern_source(node), search=False, dialect="python")
            except GrammarError as error:
                raise at(node.position, error) from None
            self.terminals[node] = self._symbol_of(dfa)
        symbol = self.terminals[node]
        assert symbol is not None
        return symbol

    def _symbol_of(self, dfa: DFA) -> Symbol:
        """A symbol for the texts of a DFA over characters."""
        over_bytes = to_bytes(dfa)
        self.states += over_bytes.states
        if self.states > MAX_STATES:
            raise GrammarError(
                f"the regular parts of the grammar have more than {MAX_STATES:,} states together: "
                "use smaller repetition counts or fewer alternatives"
            )
        if not over_bytes.accepting(over_bytes.start):
            return self.new([]) if over_bytes.empty else Terminal(over_bytes)
        rest = difference(over_bytes, literal((), size=over_bytes.size))
        return self.new([()] if rest.empty else [(), (Terminal(rest),)])


def _literal_tree(text: str, ignore_case: bool) -> Node:
    letters = [chars(letter) for letter in text]
    sets = [any_case(letter) for letter in letters] if ignore_case else letters
    return Sequence(tuple(map(Symbols, sets)))


def _flat(
    node: Concatenation | Alternatives, kind: type[Concatenation | Alternatives]
) -> list[Expression]:
    """The children of a node, with those of children of the same kind in their place."""
    found: list[Expression] = []
    for child in children(node):
        found.extend(_flat(child, kind) if isinstance(child, kind) else [child])
    return found
