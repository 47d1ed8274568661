"""Which rules are needed, and the components of their graph."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from refllm.decode.grammar.rule_grammars.ebnf import parse
from refllm.decode.grammar.rule_grammars.rule_checks import components, reachable

graphs = st.integers(1, 7).flatmap(
    lambda n: st.lists(st.lists(st.integers(0, n - 1), max_size=3), min_size=n, max_size=n)
)


def test_rules_that_no_text_needs_are_not_reachable():
    grammar = parse('root ::= a | "x"\nb ::= a b\na ::= (("x" c)?)\nc ::= root')
    assert set(reachable(grammar)) == {"root", "a", "c"}
    assert reachable(grammar)[0] == "root"


@given(graphs)
def test_oracle_components_are_classes_of_mutual_reachability(graph):
    vertices = range(len(graph))
    reach = [{v} for v in vertices]
    for _ in vertices:
        reach = [set().union({v}, *(reach[w] for w in graph[v])) for v in vertices]
    found = components(vertices, graph.__getitem__)
    assert sorted(v for component in found for v in component) == list(vertices)
    for number, component in enumerate(found):
        for v in component:
            assert {w for w in reach[v] if v in reach[w]} == set(component)
            later = {w for each in found[number + 1 :] for w in each}
            assert not reach[v] & later


def test_a_long_chain_needs_no_recursion():
    found = components(range(50_000), lambda v: [v + 1] if v < 49_999 else [0])
    assert len(found) == 1
