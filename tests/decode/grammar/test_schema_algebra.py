"""The algebra of schemas against validation as the specification describes it."""

from __future__ import annotations

import pytest
from hypothesis import given, reject
from naive_schemas import VALUES, fits, node_accepts, schemas

from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.schema_algebra import SchemaAlgebra
from refllm.decode.grammar.schema_documents import SchemaDocument


def accepted(schema: object, values=VALUES) -> list:
    """The values that fit the shapes of a schema."""
    document = SchemaDocument(schema)
    algebra = SchemaAlgebra(document)
    start = algebra.start(document.root)
    return [value for value in values if node_accepts(algebra, start, value)]


def valid(schema: object, values=VALUES) -> list:
    """The values that are valid by definition."""
    document = SchemaDocument(schema)
    return [value for value in values if fits(document, document.root, value)]


@given(schemas())
@pytest.mark.theorem(
    "A value fits the shapes of a schema exactly where it is valid.",
    source="JSON Schema 2020-12, core and validation",
)
def test_shapes_accept_exactly_the_valid_values(schema) -> None:
    try:
        found = accepted(schema)
    except GrammarError as error:
        if error.keyword != "uniqueItems":
            raise
        reject()
    assert found == valid(schema)
