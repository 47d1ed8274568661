"""Objects that can be completed, against all objects over a few keys."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.decode.grammar.automata.alphabet import CHARACTERS
from refllm.decode.grammar.automata.dfa_builders import anything, from_words
from refllm.decode.grammar.automata.dfa_operations import complement
from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.json_schema.object_inhabitation import (
    MOST_WITNESSES,
    completable,
    inhabited,
)
from refllm.decode.grammar.json_schema.shapes import KeyClass, ObjectShape, Witness
from refllm.decode.grammar.patterns.regex import from_pattern

KEYS = ["a", "b", "x", "y"]  # the last two are in a class


def words(*each: str):
    return from_words(dict.fromkeys(each, 1), size=CHARACTERS)


def node(*values: int):
    """A node is the set of its values here: few integers."""
    return frozenset((value, True) for value in values)


def join(*nodes):
    return frozenset.intersection(*nodes)


OTHERS = complement(words("x", "y"))
nodes = st.frozensets(st.sampled_from([1, 2, 3]), max_size=3).map(lambda values: node(*values))
key_languages = st.none() | st.lists(st.sampled_from(KEYS), min_size=1, unique=True).map(
    lambda keys: words(*keys)
)
shapes = st.builds(
    ObjectShape,
    named=st.fixed_dictionaries({"a": nodes, "b": nodes}),
    classes=nodes.map(lambda n: (KeyClass(words("x", "y"), n), KeyClass(OTHERS, node()))),
    required=st.frozensets(st.sampled_from(["a", "b"])),
    minimum=st.integers(0, 4),
    maximum=st.none() | st.integers(0, 4),
    witnesses=st.lists(st.builds(Witness, key_languages, nodes), max_size=3).map(tuple),
)


def objects(shape: ObjectShape):
    """All objects that fit the shape, witnesses left out."""
    choices = [
        [None, *(value for value, _ in shape.named.get(key, shape.classes[0].value))]
        for key in KEYS
    ]
    for values in product(*choices):
        found = {key: value for key, value in zip(KEYS, values, strict=True) if value is not None}
        highest = 4 if shape.maximum is None else shape.maximum
        if shape.required <= found.keys() and shape.minimum <= len(found) <= highest:
            yield found


def seen(witness: Witness, found: dict) -> bool:
    return any(
        (witness.keys is None or witness.keys.matches(key)) and (value, True) in witness.value
        for key, value in found.items()
    )


@given(shapes, st.frozensets(st.sampled_from(KEYS), max_size=2))
@pytest.mark.theorem(
    "An object shape over finitely many keys is inhabited, and a part of an object can be "
    "completed, exactly where enumeration finds an object.",
    source="definition",
)
def test_an_object_can_be_completed_exactly_where_one_is_found(shape, used) -> None:
    assert inhabited(shape, join, bool) == any(
        all(seen(witness, found) for witness in shape.witnesses) for found in objects(shape)
    )
    # keys written before can be no witness any more
    written = ObjectShape(
        {**shape.named, **dict.fromkeys(used & {"a", "b"}, node(1))},
        shape.classes,
        shape.required,
        shape.minimum,
        shape.maximum,
        shape.witnesses,
    )
    if used & {"x", "y"} and not shape.classes[0].value:
        return
    rests = [
        {key: value for key, value in found.items() if key not in used}
        for found in objects(written)
        if used <= found.keys()
    ]
    expected = any(all(seen(w, rest) for w in shape.witnesses) for rest in rests)
    assert completable(written, used, shape.witnesses, join, bool) == expected


def test_infinitely_many_keys_are_enough_for_any_minimum() -> None:
    anything_else = KeyClass(anything(CHARACTERS), node(1))
    assert inhabited(ObjectShape({}, (anything_else,), minimum=10**9), join, bool)
    few = KeyClass(from_pattern("^[a-c]$", search=True), node(1))
    none = KeyClass(complement(few.keys), node())
    for minimum, expected in ((3, True), (4, False)):
        shape = ObjectShape({}, (few, none), minimum=minimum)
        assert inhabited(shape, join, bool) == expected
    named = ObjectShape({"a": node()}, (few, none), minimum=3)
    assert not inhabited(named, join, bool), "a named key does not count in its class"


def test_a_class_with_many_keys_has_one_for_each_witness() -> None:
    anything_else = KeyClass(anything(CHARACTERS), node(1, 2, 3))
    apart = tuple(Witness(None, node(value)) for value in (1, 2, 3))
    assert inhabited(ObjectShape({}, (anything_else,), witnesses=apart), join, bool)
    assert inhabited(ObjectShape({}, (anything_else,), witnesses=apart, maximum=3), join, bool)
    assert not inhabited(ObjectShape({}, (anything_else,), witnesses=apart, maximum=2), join, bool)
    overlapping = (Witness(words("p", "q"), node(1, 2)), Witness(words("q", "r"), node(2, 3)))
    shape = ObjectShape({}, (anything_else,), witnesses=overlapping, maximum=1)
    assert inhabited(shape, join, bool), "q: 2 is both"


def test_too_many_witnesses_are_rejected_by_name() -> None:
    anything_else = KeyClass(anything(CHARACTERS), node(1))
    for count in (MOST_WITNESSES, MOST_WITNESSES + 1):
        witnesses = tuple(Witness(words(f"k{i}"), node(1)) for i in range(count))
        shape = ObjectShape({}, (anything_else,), witnesses=witnesses)
        if count == MOST_WITNESSES:
            assert inhabited(shape, join, bool)
        else:
            with pytest.raises(GrammarError, match="more than 6 keys") as raised:
                inhabited(shape, join, bool)
            assert raised.value.keyword == "not"


def test_a_key_that_is_written_is_no_witness_any_more() -> None:
    shape = ObjectShape({"a": node(1)}, (KeyClass(anything(CHARACTERS), node()),))
    witness = Witness(words("a"), node(1))
    assert completable(shape, frozenset(), [witness], join, bool)
    assert not completable(shape, frozenset({"a"}), [witness], join, bool)
