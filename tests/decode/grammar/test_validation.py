"""The definition of "a value fits a schema", compared with the reference implementation."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from maskbench import data_folder, sample, suite
from naive_schemas import VALUES
from naive_schemas import fits as fits_naively
from naive_schemas import schemas as small_schemas
from schema_strategies import OLD, documents, old_documents, values

from refllm.decode.grammar.errors import GrammarError
from refllm.decode.grammar.json_schema.schema_documents import SchemaDocument
from refllm.decode.grammar.json_schema.validation import fits

FOLDER = data_folder()
needs_data = pytest.mark.skipif(
    FOLDER is None, reason="needs the schemas: set REFLLM_SHARED_DATA to their folder"
)


@given(small_schemas())
def test_two_definitions_agree(schema):
    document = SchemaDocument(schema)
    for value in VALUES[::3]:
        assert fits(schema, value) == fits_naively(document, document.root, value), value


@pytest.mark.oracle
@given(documents(), st.lists(values(), min_size=5, max_size=20))
def test_the_definition_agrees_with_jsonschema(schema, instances):
    jsonschema = pytest.importorskip("jsonschema", reason="pip install 'jsonschema[format]'")
    validator = jsonschema.Draft202012Validator(schema)
    assert [fits(schema, each) for each in instances] == [*map(validator.is_valid, instances)]


@pytest.mark.oracle
@pytest.mark.parametrize("dialect", OLD)
@given(st.data())
def test_the_definition_agrees_with_jsonschema_on_old_dialects(dialect, data):
    jsonschema = pytest.importorskip("jsonschema", reason="pip install 'jsonschema[format]'")
    schema = data.draw(old_documents(dialect))
    instances = data.draw(st.lists(values(), min_size=5, max_size=20))
    validator = jsonschema.validators.validator_for(schema)(schema)
    assert [fits(schema, each) for each in instances] == [*map(validator.is_valid, instances)]


def judged_wrongly(cases, *, assert_formats):
    """The names of the cases that the definition does not judge as they are marked."""
    for case in cases:
        for data, valid in case.instances:
            try:
                wrong = fits(case.schema, data, assert_formats=assert_formats) != valid
            except GrammarError:  # rejected by name
                break
            if wrong:
                yield case.name
                break


@needs_data
def test_every_group_of_the_official_suite_is_right_or_rejected_by_name():
    assert list(judged_wrongly(suite(FOLDER), assert_formats=False)) == []


@needs_data
def test_instances_of_real_schemas_are_judged_as_they_are_marked():
    cases = [case for case in sample(FOLDER) if '"format"' not in json.dumps(case.schema)]
    assert len(cases) > 1000
    assert list(judged_wrongly(cases[::10], assert_formats=True)) == []


def test_true_is_not_one_and_one_is_an_integer_in_any_spelling():
    assert not fits({"const": 1}, True)
    assert not fits({"enum": [False]}, 0)
    assert not fits({"type": "integer"}, True)
    assert fits({"type": "integer"}, 1.0)
    assert not fits({"$schema": "http://json-schema.org/draft-04/schema#", "type": "integer"}, 1.0)
    assert fits({"const": {"a": [1]}}, {"a": [1.0]})


def test_multiples_are_exact_in_decimals():
    assert fits({"multipleOf": 0.01}, 0.07)
    assert not fits({"multipleOf": 0.01}, 0.075)
