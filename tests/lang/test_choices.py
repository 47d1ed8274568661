"""The three rules of ``select``, by hand and against their definitions."""

from __future__ import annotations

from math import fsum

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.lang.choices import RULES, decide

logprobs = st.lists(st.lists(st.floats(-20, 0), min_size=1, max_size=5), min_size=1, max_size=6)


def naive_greedy(table: list[list[float]]) -> int:
    """Rows padded with their means, compared as tuples: the first of the largest."""
    longest = max(map(len, table))
    rows = [tuple(row + [fsum(row) / len(row)] * (longest - len(row))) for row in table]
    return rows.index(max(rows))


@given(table=logprobs)
def test_the_greedy_rule_is_the_lexicographic_order_of_padded_rows(table):
    names = [str(i) for i in range(len(table))]
    assert decide(names, "greedy_token_selection", table).index == naive_greedy(table)


@given(table=logprobs)
def test_the_mean_decides_and_of_equal_choices_the_first_wins(table):
    names = [str(i) for i in range(len(table))]
    found = decide(names, "token_length_normalized", table)
    means = [fsum(row) / len(row) for row in table]
    assert found.scores == tuple(means)
    assert (found.choice, found.index) == (names[means.index(max(means))], means.index(max(means)))
    assert found.logprobs == tuple(map(tuple, table))


@given(table=logprobs)
def test_a_text_that_adds_nothing_leaves_all_choices_equal(table):
    names = [str(i) for i in range(len(table))]
    found = decide(names, "unconditional_likelihood_normalized", table, table)
    assert found.index == 0
    assert set(found.scores) == {0.0}


def test_the_rules_differ_where_they_should():
    """A sure ending, a likely beginning, and a choice that is likely anyway."""
    table = [[-3.0, -0.1, -0.1], [-1.0, -4.0], [-1.5]]
    alone = [[0.0, -9.0, -9.0], [0.0, -4.0], [0.0]]
    chosen = {rule: decide(["a", "b", "c"], rule, table, alone).choice for rule in RULES}
    assert chosen == {
        "token_length_normalized": "a",
        "greedy_token_selection": "b",
        "unconditional_likelihood_normalized": "a",
    }
    assert decide(["b", "c"], "token_length_normalized", table[1:]).choice == "c"


def test_the_third_rule_needs_the_choices_alone():
    with pytest.raises(AssertionError, match="without the text"):
        decide(["a"], "unconditional_likelihood_normalized", [[-1.0]])


def test_a_choice_that_has_ended_counts_on_with_its_mean_not_its_last_token():
    assert RULES["greedy_token_selection"]([[-1.0, -3.0, -2.5], [-1.0, -3.0]], None) == [2.0, 3.0]
