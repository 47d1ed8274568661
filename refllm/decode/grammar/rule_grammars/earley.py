"""Earley's recogniser over characters: the simple definition of which texts a grammar has.

The nodes of the rules' trees are the nonterminals and terminals; no automaton, no transformation
of the grammar. Left recursion, ambiguity and empty texts need no care of the user. It is the
naive twin of ``context_free``, and is compared with it on all short texts.

The chart has a set of items for each place of the text. The item (A → α . β, k) in the set of
place i says: after k an A may stand, and α matches the text from k to i.

| step     | β                                          | what is added                           |
|----------|--------------------------------------------|-----------------------------------------|
| predict  | begins with B                              | (B → . γ, i) to set i, for each γ       |
| scan     | begins with a terminal that matches i to j | the item, its dot moved, to set j       |
| complete | is empty                                   | all items of set k that await an A,     |
|          |                                            | their dots moved, to set i              |

An A that was completed at the place where it began (an empty text) is remembered, for the items
that await it only later.

Sources: Earley, "An Efficient Context-Free Parsing Algorithm" (CACM 13, 1970); empty texts as in
Aycock and Horspool, "Practical Earley Parsing" (The Computer Journal 45, 2002).

Left out: parse trees, and the speed of a lexer: a regular expression is tried at every place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

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
)

Nodes = tuple[Expression, ...]


class Item(NamedTuple):
    """``node`` began at ``begin``; what it derives still lacks the nodes ``awaited``."""

    node: Expression
    awaited: Nodes
    begin: int


def recognizes(grammar: RuleSet, text: str) -> bool:
    """Whether ``text`` is one of the texts of the grammar.

    >>> from refllm.decode.grammar.rule_grammars.gbnf import parse_gbnf
    >>> sums = parse_gbnf('root ::= root "+" root | [0-9]+')
    >>> recognizes(sums, "1+23+4"), recognizes(sums, "1+")
    (True, False)
    """
    start = grammar.rules[grammar.start].body
    chart: list[set[Item]] = [set() for _ in range(len(text) + 1)]
    chart[0] = {Item(start, production, 0) for production in productions(grammar, start)}
    for place, items in enumerate(chart):
        pending = list(items)
        empty: set[Expression] = set()  # nodes that are complete where they began, at ``place``
        while pending:
            item = pending.pop()
            for end, following in _steps(grammar, text, chart, empty, item, place):
                if following not in chart[end]:
                    chart[end].add(following)
                    if end == place:
                        pending.append(following)
    return any(item.node == start and not item.awaited and item.begin == 0 for item in chart[-1])


def _steps(
    grammar: RuleSet,
    text: str,
    chart: list[set[Item]],
    empty: set[Expression],
    item: Item,
    place: int,
) -> Iterator[tuple[int, Item]]:
    """The items that follow from one item, each with the place whose set it belongs to."""
    if not item.awaited:  # complete
        if item.begin == place:
            empty.add(item.node)
        for waiting in tuple(chart[item.begin]):
            if waiting.awaited and waiting.awaited[0] == item.node:
                yield place, waiting._replace(awaited=waiting.awaited[1:])
        return
    node = item.awaited[0]
    after = item._replace(awaited=item.awaited[1:])
    if isinstance(node, Literal | Characters | Pattern):  # scan
        for end in ends(node, text, place):
            yield end, after
        return
    for production in productions(grammar, node):  # predict
        yield place, Item(node, production, place)
    if node in empty:
        yield place, after


def productions(grammar: RuleSet, node: Expression) -> list[Nodes]:
    """The sequences of nodes that a node stands for: ``node → production`` for each."""
    match node:
        case Reference(name):
            return [(grammar.rules[name].body,)]
        case Concatenation(items):
            return [items]
        case Alternatives(options):
            return [(option,) for option in options]
        case Repetition(item, minimum, maximum):
            if maximum == 0:
                return [()]
            less = None if maximum is None else maximum - 1
            more: Nodes = (item, Repetition(item, max(minimum - 1, 0), less))
            return [more] if minimum else [(), more]
    return [(node,)]


def ends(terminal: Expression, text: str, begin: int) -> list[int]:
    """Where a text of the terminal may end that begins at ``begin``."""
    match terminal:
        case Literal(wanted, ignore_case):
            found = text[begin : begin + len(wanted)]
            flags = re.IGNORECASE if ignore_case else 0
            same = re.fullmatch(re.escape(wanted), found, flags) is not None
            return [begin + len(wanted)] if same else []
        case Characters(members):
            code = ord(text[begin]) if begin < len(text) else -1
            return [begin + 1] if any(low <= code <= high for low, high in members) else []
        case Pattern(source, flags):
            pattern = re.compile(f"(?{flags}:{source})" if flags else source)
            lengths = range(begin, len(text) + 1)
            return [end for end in lengths if pattern.fullmatch(text[begin:end])]
    raise TypeError(f"{terminal} is not a terminal")
