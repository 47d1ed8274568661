"""Regular expressions within rules: their trees as trees of rules.

So a regular expression is no closed box: what stands beside it can join it in one DFA, and if its
own would be too large, it can be taken apart as rules can.

Left out: a regular expression with assertions (``^ $ \\b``) or lookaheads stays whole. These see
the text that the expression itself matches and nothing around it, as ``re.fullmatch`` has it.
"""

from __future__ import annotations

from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.patterns.regex_syntax import parse
from refllm.decode.grammar.patterns.regex_tree import Choice, Node, Repeat, Sequence, Symbols
from refllm.decode.grammar.rule_grammars.rules import (
    Alternatives,
    Characters,
    Concatenation,
    Expression,
    Pattern,
    Position,
    Repetition,
)


def pattern_source(pattern: Pattern) -> str:
    """The regular expression with its flags in it."""
    return f"(?{pattern.flags}:{pattern.source})" if pattern.flags else pattern.source


def at(position: Position, error: GrammarError) -> GrammarError:
    """The error, with the place in the grammar."""
    return GrammarError(f"the grammar's {position}: {error}")


def with_pattern_trees(node: Expression) -> Expression:
    """The tree with the trees of its regular expressions in their place, except for those with
    assertions, which mean something else within a longer text.
    """
    match node:
        case Pattern():
            try:
                tree = parse(pattern_source(node), "python")
            except GrammarError as error:
                raise at(node.position, error) from None
            return node if _asserts(tree) else _expression(tree)
        case Concatenation(items):
            return Concatenation(tuple(map(with_pattern_trees, items)))
        case Alternatives(options):
            return Alternatives(tuple(map(with_pattern_trees, options)))
        case Repetition(item, minimum, maximum):
            return Repetition(with_pattern_trees(item), minimum, maximum)
    return node


def _asserts(tree: Node) -> bool:
    """Whether a regular expression has an assertion or a lookahead."""
    match tree:
        case Sequence(parts) | Choice(parts):
            return any(map(_asserts, parts))
        case Repeat(body):
            return _asserts(body)
    return not isinstance(tree, Symbols)


def _expression(tree: Node) -> Expression:
    """The tree of a regular expression without assertions as one of rules."""
    match tree:
        case Symbols(members):
            return Characters(members)
        case Sequence(parts):
            return Concatenation(tuple(map(_expression, parts)))
        case Choice(parts):
            return Alternatives(tuple(map(_expression, parts)))
        case Repeat(body, minimum, maximum):
            return Repetition(_expression(body), minimum, maximum)
    raise TypeError(f"{tree} is an assertion")
