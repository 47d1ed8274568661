"""Atoms of schemas read one value at a time, and a document of named schemas to test them with."""

from __future__ import annotations

import re

from naive_schemas import VALUES, evaluate, fits, frozen, is_number, types_of

from refllm.decode.grammar.json_schema.array_rules import NEVER, Item, Items, Matches, Unique
from refllm.decode.grammar.json_schema.formulas import And, Count, Or
from refllm.decode.grammar.json_schema.number_rules import Integer, Multiple, Range, Values
from refllm.decode.grammar.json_schema.object_rules import Member, Members, Required
from refllm.decode.grammar.json_schema.schema_algebra import SchemaAlgebra
from refllm.decode.grammar.json_schema.schema_documents import SchemaDocument
from refllm.decode.grammar.json_schema.string_rules import Pattern, Words

OF_KIND = {
    "string": [each for each in VALUES if isinstance(each, str)],
    "number": [*filter(is_number, VALUES), -1, 3, 4.5, 0.0, -0.5, 7, 1e300],
    "array": [each for each in VALUES if isinstance(each, list)],
    "object": [each for each in VALUES if isinstance(each, dict)],
}
DEFINITIONS = {
    "one": {"const": 1},
    "text": {"type": "string"},
    "a": {"const": "a"},
    "some": {"enum": [True, "a", "ab"]},
    "names": {"minLength": 2},
}


def small_document() -> tuple[SchemaAlgebra, list]:
    """An algebra over ``DEFINITIONS``, and the locations of these schemas."""
    document = SchemaDocument(
        {"$defs": DEFINITIONS, "allOf": [{"$ref": f"#/$defs/{n}"} for n in DEFINITIONS]}
    )
    targets = [document.resolve(each)["$ref"] for each in document.resolve(document.root)["allOf"]]
    return SchemaAlgebra(document), targets


def holds(algebra: SchemaAlgebra, formula, value) -> bool:
    """Whether a value fits a formula of atoms."""

    def signed(schema, inside) -> bool:
        location, sign = schema
        if location == NEVER[0]:
            return not sign
        return fits(algebra.documents, location, inside) == sign

    def has(keys, key) -> bool:
        found = key in keys.names
        for base in keys.bases:
            found |= bool(re.search(base, key)) if isinstance(base, str) else signed(base, key)
        return found != keys.negated

    match formula:
        case And(parts):
            return all(holds(algebra, part, value) for part in parts)
        case Or(parts):
            return any(holds(algebra, part, value) for part in parts)
        case Count(low, high):
            return low <= len(value) <= (len(value) if high is None else high)
        case Words(words, positive):
            return (value in words) == positive
        case Pattern(pattern, positive):
            return (re.search(pattern, value) is not None) == positive
        case Integer(draft4, positive):
            return ("integer" in types_of(value, exact=draft4)) == positive
        case Multiple(divisor, positive):
            return (value % divisor == 0) == positive
        case Values(values, positive):
            return (value in values) == positive
        case Range(low, high, low_open, high_open):
            above = low is None or (value > low if low_open else value >= low)
            return above and (high is None or (value < high if high_open else value <= high))
        case Items(start, schema):
            return all(signed(schema, each) for each in value[start:])
        case Item(index, schema):
            return index >= len(value) or signed(schema, value[index])
        case Matches(start, schema, low, high):
            count = sum(signed(schema, each) for each in value[start:])
            return low <= count <= (count if high is None else high)
        case Unique(positive):
            return (len(set(map(frozen, value))) == len(value)) == positive
        case Required(key):
            return key in value
        case Members(keys, schema):
            return all(signed(schema, each) for key, each in value.items() if has(keys, key))
        case Member(keys, schema):
            return any(signed(schema, each) for key, each in value.items() if has(keys, key))
    raise TypeError(formula)


def fitting(algebra: SchemaAlgebra, conjunction, kind: str) -> list:
    """The values of a kind that fit all atoms of a conjunction (None: no value)."""
    if conjunction is None:
        return []
    return [v for v in OF_KIND[kind] if all(holds(algebra, atom, v) for atom in conjunction)]


__all__ = ["OF_KIND", "evaluate", "fitting", "holds", "small_document"]
