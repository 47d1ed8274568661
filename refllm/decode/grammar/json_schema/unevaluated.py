"""``unevaluatedProperties`` and ``unevaluatedItems``: what they ask, beside what is evaluated.

While a schema with one of them is expanded, each conjunction carries ``Evaluation`` atoms: which
keys and items the schemas evaluate that hold in it (JSON Schema core 2020-12, section 11). The
functions here turn these atoms into the one atom that the keyword asks for.

Left out: which conjunctions there are (``schema_expansion.py``).
"""

from __future__ import annotations

from collections.abc import Iterable

from refllm.decode.grammar.json_schema.array_rules import EvaluatedItems, Items
from refllm.decode.grammar.json_schema.formulas import Atom, Conjunction
from refllm.decode.grammar.json_schema.key_sets import ALL_KEYS, union
from refllm.decode.grammar.json_schema.keyword_formulas import Derived
from refllm.decode.grammar.json_schema.object_rules import EvaluatedKeys, Members
from refllm.decode.grammar.json_schema.shapes import Location

KEYWORDS = {"object": "unevaluatedProperties", "array": "unevaluatedItems"}
# What the keywords themselves evaluate: everything.
EVALUATED: dict[str, Atom] = {"object": EvaluatedKeys(ALL_KEYS), "array": EvaluatedItems(None)}


def other_members(evaluated: Iterable[Atom], schema: Location) -> Conjunction:
    """The values of keys that are not evaluated fit ``schema``."""
    keys = union(atom.keys for atom in evaluated if isinstance(atom, EvaluatedKeys))
    return frozenset({Members(keys.complement(), (schema, True))})


def other_items(evaluated: Iterable[Atom], schema: Location) -> Conjunction:
    """The items that are not evaluated fit ``schema``.

    Items that ``contains`` has matched are evaluated: items fit ``schema`` or match.
    """
    noted = [atom for atom in evaluated if isinstance(atom, EvaluatedItems)]
    counts = [atom.count for atom in noted if atom.count is not None]
    if len(counts) < len(noted):
        return frozenset()
    matching = sorted({atom.matching for atom in noted if atom.matching is not None}, key=repr)
    if matching:
        parts = (schema, *matching)
        schema = Derived(("anyOf", parts), {"anyOf": parts}, schema)
    return frozenset({Items(max(counts, default=0), (schema, True))})
