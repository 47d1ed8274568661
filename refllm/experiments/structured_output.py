"""Structured output on the pretrained model: real JSON Schemas with and without a grammar.

Sources: JSONSchemaBench (Geng et al. 2025) for the schemas; Zheng et al. 2024 (SGLang), §4, for
jump-forward decoding.

    python -m refllm.experiments.structured_output PATH/schemas.jsonl.gz

| counted                     | meaning                                                        |
|-----------------------------|----------------------------------------------------------------|
| ``valid``                   | outputs that ``jsonschema`` accepts, formats included          |
| ``unfinished``              | cut off by ``max_tokens``: a model of this size may write a    |
|                             | string without end                                             |
| ``jumped``                  | tokens that ``jump_forward`` appended: a forward pass saved by |
|                             | each                                                           |

The schemas are those of the file (lines of JSON with ``schema`` and ``name``) that compile, are
satisfied by an object or array, and whose text has at most ``SCHEMA_TOKENS`` tokens: evenly spaced
ones of them. The prompt is the schema and an instruction, sampling greedy. Without a grammar, the
first JSON value in the answer is judged, so that words around it count for nothing.

The second part of the record is one short output, step by step: how many tokens were legal.

Left out: whether the values make sense.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from refllm.api import Model, load
from refllm.array_types import Json
from refllm.backend import to_numpy
from refllm.decode import grammar as grammars
from refllm.errors import InputError
from refllm.measure.plotting import FULL, NEAREST, TECHNIQUE, new_figure, styled
from refllm.measure.records import Record, Values, write
from refllm.serve.engine import Engine
from refllm.serve.request import Request

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMMAND = "python -m refllm.experiments.structured_output PATH/schemas.jsonl.gz"
RECORD = Path("figures/data/structured_output.json")
SCHEMA_TOKENS = 350
MAX_TOKENS = 192
BLOCKS = 3072  # of 16 tokens: all prompts stay in the prefix cache
WALKED = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Berlin", "Paris", "Rome"]},
        "population": {"type": "integer", "minimum": 1},
        "capital": {"type": "boolean"},
    },
    "required": ["city", "population", "capital"],
    "additionalProperties": False,
}


def read_schemas(path: Path, model: Model, count: int) -> list[tuple[str, Json]]:
    """(name, schema) of ``count`` evenly spaced schemas that are short, compile, and describe an
    object or array.
    """
    short: list[tuple[str, Json]] = []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            schema = row["schema"]
            if not isinstance(schema, dict) or schema.get("type") not in ("object", "array"):
                continue
            if len(model.tokenizer.encode(json.dumps(schema))) <= SCHEMA_TOKENS:
                short.append((row["name"], schema))
    found = []
    for name, schema in short[:: max(1, len(short) // (2 * count))]:
        try:
            grammars.compile(json_schema=schema, tokenizer=model.tokenizer)
        except InputError as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        found.append((name, schema))
        if len(found) == count:
            break
    return found


def prompt_of(schema: Json) -> list[dict[str, str]]:
    """The messages that ask for a value."""
    text = json.dumps(schema, ensure_ascii=False)
    return [
        {
            "role": "user",
            "content": "Answer with one short JSON value that this JSON Schema accepts, and "
            f"nothing else.\n{text}",
        }
    ]


def run(engine: Engine, schemas: Sequence[tuple[str, Json]], way: str) -> Json:
    """All schemas through the engine in one way: ``"none"``, ``"default"`` or ``"compact"``
    whitespace, with ``" + jump"`` to append what is forced. The ways share their prompts, which
    the engine's prefix cache keeps.
    """
    whitespace, _, jump = way.partition(" + ")
    jumped = engine.jumped_tokens
    for i, (_, schema) in enumerate(schemas):
        options: Json = {}
        if way != "none":
            options["grammar"] = grammars.compile(
                json_schema=schema,
                tokenizer=engine.model.tokenizer,
                whitespace=whitespace,  # type: ignore[arg-type]  # one of the two
            )
            options["jump_forward"] = bool(jump)
        engine.submit(Request(prompt_of(schema), MAX_TOKENS, request_id=i, **options))
    outputs = engine.run()
    valid = 0
    unfinished = 0
    tokens = 0
    for i, (_, schema) in enumerate(schemas):
        output = outputs[i]
        tokens += output.generated_tokens
        cut = output.finish_reason == "length"
        unfinished += cut
        valid += is_valid(output.text, schema, whole=way != "none")
    return {
        "way": way,
        "schemas": len(schemas),
        "valid": valid,
        "unfinished": unfinished,
        "tokens": tokens,
        "jumped": engine.jumped_tokens - jumped,
    }


def is_valid(text: str, schema: Json, *, whole: bool) -> bool:
    """Whether ``jsonschema`` accepts the text, or the first JSON value in it."""
    value = first_value(text, whole=whole)
    if value is None:
        return False
    from jsonschema import FormatChecker, validators

    kind = validators.validator_for(schema)
    return bool(kind(schema, format_checker=FormatChecker()).is_valid(value[0]))


def first_value(text: str, *, whole: bool) -> tuple[object] | None:
    """The value of a whole text, or of the first object or array in it; None if there is none.

    >>> first_value('Here it is: {"a": 1} as asked', whole=False)
    ({'a': 1},)
    """
    decoder = json.JSONDecoder()
    starts = [0] if whole else [i for i, c in enumerate(text) if c in "{["]
    for start in starts:
        try:
            value, end = decoder.raw_decode(text, start)
        except json.JSONDecodeError:
            continue
        if not whole or end == len(text):
            return (value,)
    return None


def walk(model: Model) -> Iterator[Json]:
    """Each token of one constrained output: its text, how many tokens were legal before it, and
    the mass that the model gave to them.
    """
    grammar = grammars.compile(json_schema=WALKED, tokenizer=model.tokenizer)
    ids = model.chat_tokenizer.encode(prompt_of(WALKED), add_generation_prompt=True)
    state = grammar.start
    while True:
        z = np.asarray(to_numpy(model.logits(ids))[-1], np.float64)
        p: np.ndarray = np.exp(z - z.max())
        p /= p.sum()
        mask = grammar.mask(state)
        token = int(np.argmax(np.where(mask, p, -1.0)))
        ended = token in grammar.end_tokens
        yield {
            "token": "end" if ended else model.tokenizer.decode([token]),
            "legal": int(mask.sum()),
            "mass": float(p[mask].sum()),
        }
        if ended:
            return
        state = grammar.advance(state, token)
        ids = [*ids, token]


@styled
def draw(values: Values) -> Figure:
    """How many tokens are legal before each token of one output, and valid outputs by way."""
    figure = new_figure(height=5.0)
    upper, lower = figure.subplots(2, 1, height_ratios=[1.5, 1])
    steps = values["walk"]
    places = range(len(steps))
    upper.bar(places, [step["legal"] for step in steps], color=TECHNIQUE)
    labels = [step["token"].replace(" ", "␣").replace("\n", "⏎") for step in steps]
    upper.set_xticks(list(places), labels, rotation=90, fontsize=7.5)
    upper.set(yscale="log", ylabel="legal tokens (log)", xlim=(-0.7, len(steps) - 0.3))
    vocabulary = values["vocabulary"]
    upper.set_ylim(1, 2 * vocabulary)
    upper.axhline(vocabulary, color=FULL, ls=":")
    upper.set_title(f"How many of {vocabulary:,} tokens may follow, step by step")
    rows = values["rows"]
    names = ["no grammar" if row["way"] == "none" else row["way"] for row in rows]
    total = [row["schemas"] for row in rows]
    valid = [100 * row["valid"] / n for row, n in zip(rows, total, strict=True)]
    cut = [100 * row["unfinished"] / n for row, n in zip(rows, total, strict=True)]
    lower.barh(names, valid, color=TECHNIQUE, label="valid")
    lower.barh(names, cut, left=valid, color=NEAREST, label="cut off by max_tokens")
    lower.invert_yaxis()
    lower.set(xlabel="% of the schemas", xlim=(0, 100))
    lower.set_title(f"Answers to {total[0]} real schemas")
    lower.legend(fontsize=8, loc="upper right")
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the record."""
    parser = argparse.ArgumentParser(description="real schemas on the pretrained model")
    parser.add_argument("schemas", type=Path)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--output", type=Path, default=RECORD)
    chosen = parser.parse_args(arguments)
    model = load(chosen.model)
    steps = list(walk(model))
    print(json.dumps(steps), file=sys.stderr)
    schemas = read_schemas(chosen.schemas, model, chosen.count)
    engine = Engine(model, num_blocks=BLOCKS, max_sequences=16)
    rows = []
    for way in ("none", "default", "default + jump", "compact", "compact + jump"):
        rows.append(run(engine, schemas, way))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        values = {"vocabulary": model.config.vocab_size, "walk": steps, "rows": rows}
        write(chosen.output, Record(COMMAND, "A", "none", values))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
