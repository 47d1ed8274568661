"""What the rules alone tell, before any automaton is built: missing names, rules that
no text needs, and the order in which rules can be worked on.

Sources: Hopcroft and Ullman, "Introduction to Automata Theory, Languages, and Computation" (1979),
§4.4 (useless symbols); Tarjan, "Depth-first search and linear graph algorithms" (SIAM J. Comput. 1,
1972), without recursion, since rules may refer to each other in chains of any length.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.rule_grammars.rules import RuleSet, missing_start, references
from refllm.errors import did_you_mean

Vertex = TypeVar("Vertex", bound=Hashable)


def check_references(grammar: RuleSet) -> None:
    """Raise ``GrammarError`` for the first reference to a rule that is not defined."""
    if grammar.start not in grammar.rules:
        raise missing_start(grammar.start, grammar.rules)
    for rule in grammar.rules.values():
        for reference in references(rule.body):
            if reference.name not in grammar.rules:
                near = did_you_mean(reference.name, grammar.rules)
                raise GrammarError(
                    f"the grammar's {reference.position}: the rule {reference.name!r} is not "
                    f"defined{near}"
                )


def reachable(grammar: RuleSet) -> list[str]:
    """The rules that texts can be derived with, the start first."""
    found = {grammar.start: None}
    pending = [grammar.start]
    while pending:
        for reference in references(grammar.rules[pending.pop()].body):
            if reference.name not in found:
                found[reference.name] = None
                pending.append(reference.name)
    return list(found)


def components(
    vertices: Iterable[Vertex], successors: Callable[[Vertex], Iterable[Vertex]]
) -> list[list[Vertex]]:
    """The strongly connected components of a graph, each after all that it leads to.

    >>> components("abc", {"a": "bc", "b": "a", "c": ""}.__getitem__)
    [['c'], ['b', 'a']]
    """
    number: dict[Vertex, int] = {}  # in the order of discovery
    lowest: dict[Vertex, int] = {}  # the lowest number that is reachable and still open
    opened: list[Vertex] = []
    closed: set[Vertex] = set()
    found: list[list[Vertex]] = []
    for root in vertices:
        if root in number:
            continue
        path = [(root, iter(successors(root)))]
        number[root] = lowest[root] = len(number)
        opened.append(root)
        while path:
            vertex, following = path[-1]
            target = next(following, None)
            if target is None:
                path.pop()
                if path:
                    above = path[-1][0]
                    lowest[above] = min(lowest[above], lowest[vertex])
                if lowest[vertex] == number[vertex]:
                    component: list[Vertex] = []
                    while not component or component[-1] != vertex:
                        component.append(opened.pop())
                    closed.update(component)
                    found.append(component)
            elif target not in number:
                number[target] = lowest[target] = len(number)
                opened.append(target)
                path.append((target, iter(successors(target))))
            elif target not in closed:
                lowest[vertex] = min(lowest[vertex], number[target])
    return found
