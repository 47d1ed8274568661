"""The static tree: dynamic programming against the naive twin and against every possible
tree.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.decode.speculative.tree import Tree
from refllm.decode.speculative.tree_shape import (
    best_tree,
    expected_path,
    most_likely,
    optimal_tree,
    rank_chances,
)
from strategies import seeds

EPS = float(np.finfo(np.float64).eps)


def chances(seed: int, ranks: int) -> list[float]:
    a = np.sort(np.random.default_rng(seed).dirichlet(np.ones(ranks + 1))[:ranks])[::-1]
    return [float(x) for x in a]


def every_tree(nodes: int):
    for parents in itertools.product(*(range(-1, i) for i in range(nodes))):
        yield Tree(parents)


@pytest.mark.theorem(
    "The recursion c(n, d) = 1 + max Σ a_k c(n_k, d − 1) finds a tree of the longest expected "
    "path; so does taking the likeliest node each time",
    source="Chen et al. 2024, section 3.1",
)
@given(seed=seeds, ranks=st.integers(1, 3), nodes=st.integers(0, 5), depth=st.integers(0, 4))
def test_both_find_the_best_of_all_trees(seed, ranks, nodes, depth):
    a = chances(seed, ranks)
    tree = optimal_tree(a, nodes, depth)
    naive = most_likely(a, nodes, depth)
    allowed = [
        t
        for n in range(nodes + 1)
        for t in every_tree(n)
        if max(t.depths) <= depth and max((len(c) for c in t.children), default=0) <= ranks
    ]
    best = max(expected_path(t, a) for t in allowed)
    for found in (tree, naive):
        assert len(found) <= nodes
        assert max(found.depths) <= depth
        assert abs(expected_path(found, a) - best) <= 64 * EPS


@given(seed=seeds, ranks=st.integers(1, 6), nodes=st.integers(0, 24), depth=st.integers(0, 6))
def test_the_recursion_equals_the_naive_twin(seed, ranks, nodes, depth):
    a = chances(seed, ranks)
    found = [expected_path(f(a, nodes, depth), a) for f in (optimal_tree, most_likely)]
    assert abs(found[0] - found[1]) <= 1e3 * EPS


def test_expected_path_by_hand():
    assert expected_path(Tree([-1, -1, 0]), [0.5, 0.25]) == 1 + 0.5 + 0.25 + 0.25
    assert expected_path(Tree.chain(3), [0.5]) == 1.875
    # a child of a rank that was not measured counts as 0
    assert expected_path(Tree([-1, -1]), [0.5]) == 1.5


@given(seed=seeds, draft=st.floats(0, 1), count=st.integers(1, 9))
def test_the_chosen_tree_is_the_fastest_and_none_where_all_lose(seed, draft, count):
    a = chances(seed, 3)
    cost = (1 + 0.3 * np.arange(count)).tolist()
    tree, gain = best_tree(a, cost, draft, 4)
    assert gain >= 1
    assert len(tree) < count
    assert (gain == 1) == (len(tree) == 0)
    if len(tree):
        assert gain == pytest.approx(
            expected_path(tree, a) / (cost[len(tree)] + max(tree.depths) * draft)
        )
    assert (
        best_tree(a, [1.0, 3.0], 0.0, 4)[1] == 1.0
    )  # a step of three times the cost never gains twice


def test_rank_chances_are_shares():
    assert rank_chances([5, 6, 7, 8], [[5, 1], [6, 1], [0, 7], [0, 1]]) == [0.5, 0.25]
    with pytest.raises(ValueError, match="ranking for each"):
        rank_chances([1], [])
    for bad, message in (
        ([], "probabilities"),
        ([0.6, 0.6], "probabilities"),
        ([0.1, 0.2], "falling order"),
    ):
        with pytest.raises(ValueError, match=message):
            optimal_tree(bad, 3, 2)
    with pytest.raises(ValueError, match="0 or more"):
        most_likely([0.5], -1, 2)
