"""Random JSON Schemas and instances that are likely to meet: few keys, few values.

Schemas of all keywords, of draft 2020-12 unless a dialect is asked for. Numbers and patterns are
those that ``jsonschema`` judges alike: no float steps, no lookaround, ASCII.
"""

from hypothesis import strategies as st

KEYS = ["a", "b", "ab", "c"]
TEXTS = ["", "a", "b", "ab", "ba", "aab", 'é"\\']
NUMBERS = [0, 1, 2, 3, -1, 10, 0.5, 1.0, -2.5, 1e15, 1e-7]
PATTERNS = ["^a", "b$", "^a*$", "[^a]", "^.{2}$", "a|c"]
TYPES = ["null", "boolean", "integer", "number", "string", "array", "object"]

scalars = st.sampled_from([None, True, False, *NUMBERS, *TEXTS])


def values(depth=3):
    """A JSON value of at most ``depth`` levels."""
    if depth == 0:
        return scalars
    inside = values(depth - 1)
    return st.one_of(
        scalars,
        st.lists(inside, max_size=3),
        st.dictionaries(st.sampled_from(KEYS), inside, max_size=3),
    )


def _few(elements, most=3):
    return st.lists(elements, min_size=1, max_size=most)


def _members(names, schemas):
    return st.dictionaries(st.sampled_from(names), schemas, max_size=3)


def keyword_groups(inside):
    """Strategies of a few keywords each, as dictionaries; ``inside`` are schemas."""
    counts = st.integers(0, 3)
    bounds = st.sampled_from(NUMBERS)
    keys = st.lists(st.sampled_from(KEYS), max_size=2, unique=True)
    return [
        st.fixed_dictionaries({"type": st.sampled_from(TYPES)}),
        st.fixed_dictionaries({"type": st.lists(st.sampled_from(TYPES), min_size=1, unique=True)}),
        st.fixed_dictionaries({"const": values(2)}),
        st.fixed_dictionaries({"enum": _few(values(1), 4)}),
        st.fixed_dictionaries({"minimum": bounds}, optional={"maximum": bounds}),
        st.fixed_dictionaries({"exclusiveMaximum": bounds}, optional={"minimum": bounds}),
        st.fixed_dictionaries({"multipleOf": st.sampled_from([1, 2, 3, 0.5])}),
        st.fixed_dictionaries({"minLength": counts}, optional={"maxLength": counts}),
        st.fixed_dictionaries({"pattern": st.sampled_from(PATTERNS)}),
        st.fixed_dictionaries({"items": inside}, optional={"prefixItems": _few(inside, 2)}),
        st.fixed_dictionaries({"prefixItems": _few(inside, 2)}, optional={"minItems": counts}),
        st.fixed_dictionaries({"uniqueItems": st.just(True)}, optional={"items": inside}),
        st.fixed_dictionaries(
            {"contains": inside}, optional={"minContains": counts, "maxContains": counts}
        ),
        st.fixed_dictionaries({"minItems": counts}, optional={"maxItems": counts}),
        st.fixed_dictionaries(
            {"properties": _members(KEYS, inside)},
            optional={"required": keys, "additionalProperties": inside},
        ),
        st.fixed_dictionaries(
            {"patternProperties": _members(PATTERNS, inside)},
            optional={"additionalProperties": inside, "properties": _members(KEYS, inside)},
        ),
        st.fixed_dictionaries({"required": keys}),
        st.fixed_dictionaries({"propertyNames": inside}),
        st.fixed_dictionaries({"minProperties": counts}, optional={"maxProperties": counts}),
        st.fixed_dictionaries({"dependentRequired": st.dictionaries(st.sampled_from(KEYS), keys)}),
        st.fixed_dictionaries({"dependentSchemas": _members(KEYS, inside)}),
        st.fixed_dictionaries({"allOf": _few(inside, 2)}),
        st.fixed_dictionaries({"anyOf": _few(inside, 2)}),
        st.fixed_dictionaries({"oneOf": _few(inside, 3)}),
        st.fixed_dictionaries({"not": inside}),
        st.fixed_dictionaries({"if": inside}, optional={"then": inside, "else": inside}),
        st.fixed_dictionaries({"unevaluatedProperties": inside}),
        st.fixed_dictionaries({"unevaluatedItems": inside}),
        st.fixed_dictionaries({"$ref": st.sampled_from(["#/$defs/x", "#/$defs/y"])}),
    ]


def schemas(depth=2):
    """A schema of at most ``depth`` levels of schemas."""
    plain = st.one_of(st.booleans(), st.just({}))
    if depth == 0:
        simple = keyword_groups(plain)[:9]
        return st.one_of(plain, *simple)
    groups = st.one_of(keyword_groups(schemas(depth - 1)))
    return st.lists(groups, min_size=1, max_size=3).map(_merged)


def _merged(groups):
    merged = {}
    for group in groups:
        merged.update(group)
    return merged


def documents(depth=2):
    """A schema with definitions for its references, which may be recursive."""
    return st.builds(_with_definitions, schemas(depth), schemas(1), schemas(1))


def _with_definitions(root, x, y):
    """References from ``x`` and ``y`` go to parts of the value alone: no circles."""
    return {**root, "$defs": {"x": _guarded(x), "y": _guarded(y)}}


def _guarded(schema):
    """The schema with its references one level deeper, in arrays and objects."""
    if not isinstance(schema, dict) or "$ref" not in schema:
        return schema if "$ref" not in str(schema) else {"items": schema}
    rest = {key: value for key, value in schema.items() if key != "$ref"}
    return {"items": {"$ref": schema["$ref"]}, "properties": {"a": rest}}


OLD = {
    "draft-04": "http://json-schema.org/draft-04/schema#",
    "draft-06": "http://json-schema.org/draft-06/schema#",
    "draft-07": "http://json-schema.org/draft-07/schema#",
    "2019-09": "https://json-schema.org/draft/2019-09/schema",
}


def old_documents(dialect):
    """A schema of an older dialect, with its old spellings and with keywords it does not have."""
    leaves = st.sampled_from([{}, {"not": {}}])
    if dialect != "draft-04":
        leaves = st.booleans() | leaves
    inside = st.one_of(leaves, *keyword_groups(leaves)[:5])
    groups = [*keyword_groups(inside), *_old_groups(inside, dialect)]
    schemas = st.lists(st.one_of(groups), min_size=1, max_size=4).map(_merged)
    return st.builds(_of_dialect, schemas, inside, inside, st.just(dialect))


def _old_groups(inside, dialect):
    keys = st.lists(st.sampled_from(KEYS), min_size=1, max_size=2, unique=True)
    groups = [
        st.fixed_dictionaries({"items": _few(inside, 2)}, optional={"additionalItems": inside}),
        st.fixed_dictionaries({"additionalItems": inside}),
        st.fixed_dictionaries(
            {"dependencies": st.dictionaries(st.sampled_from(KEYS), keys | inside, max_size=2)}
        ),
    ]
    if dialect == "draft-04":
        bounds = {"minimum": st.sampled_from(NUMBERS), "maximum": st.sampled_from(NUMBERS)}
        exclusive = {"exclusiveMinimum": st.booleans(), "exclusiveMaximum": st.booleans()}
        groups.append(st.fixed_dictionaries({}, optional={**bounds, **exclusive}))
        groups.append(st.just({"type": "integer"}))
    return groups


def _of_dialect(root, x, y, dialect):
    """A document of a dialect; what would be malformed in it is left out."""
    root = {**root, "$schema": OLD[dialect], "$defs": {"x": x, "y": y}}
    if dialect == "draft-04":
        for keyword in ("exclusiveMinimum", "exclusiveMaximum"):
            if not isinstance(root.get(keyword, False), bool):
                del root[keyword]
    return root
