"""Compiled grammars on the bundled model: generated, streamed, drafted for, jumped over and served,
every text is one of its grammar.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from command_line import run
from refllm.api import Model, load
from refllm.decode.grammar import Grammar, compile
from refllm.decode.grammar.rule_grammars.shipped import shipped
from refllm.decode.speculative.model_drafter import ModelDrafter
from refllm.decode.speculative.ngram_drafter import NGramDrafter
from refllm.decode.speculative.tree_drafter import TreeDrafter
from refllm.serve.engine import Engine
from refllm.serve.request import Request

MODEL: Model = load("stdlib-draft", backend="numpy")
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "kind": {"enum": ["method", "function"]},
        "lines": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "kind", "lines"],
    "additionalProperties": False,
}
DESCRIPTIONS: dict[str, dict[str, Any]] = {
    "regex": {"regex": r"[a-z_]{2,6}\((self(, [a-z]){0,3})?\):"},
    "choices": {"choices": ["return self", "return None", "raise", "naïve – ü"]},
    "ebnf": {"ebnf": 'root ::= "[" item ("," item)? "]"\nitem ::= [a-z] [a-z]? | root'},
    "schema": {"json_schema": SCHEMA, "whitespace": "compact"},
}
GRAMMARS = {name: compile(tokenizer=MODEL.tokenizer, **d) for name, d in DESCRIPTIONS.items()}
PROMPT = "class Stack:\n    def "


def is_legal(name: str, text: str) -> bool:
    """By another way than the grammar's own automaton, where there is one."""
    if name == "regex":
        return re.fullmatch(DESCRIPTIONS["regex"]["regex"], text) is not None
    if name == "choices":
        return text in DESCRIPTIONS["choices"]["choices"]
    if name == "schema":
        found = json.loads(text)
        return (
            sorted(found) == ["kind", "lines", "name"]
            and len(found["name"]) <= 6
            and found["kind"] in ("method", "function")
            and type(found["lines"]) in (int, float)  # 14.0 is an integer, too
            and found["lines"] in range(100)
        )
    return GRAMMARS[name].matches(text)


@pytest.mark.theorem(
    "Whatever the temperature and the drafter, with jumps and without, the text of a finished "
    "constrained output is legal, and one that max_tokens cuts off is the beginning of a legal one",
    source="by other judges: re, json, a list",
)
@settings(max_examples=12)
@given(
    name=st.sampled_from(sorted(GRAMMARS)),
    seed=st.integers(0, 10_000),
    temperature=st.sampled_from([0.0, 1.0, 3.0]),
    draft=st.sampled_from([None, "n-gram", "model", "tree"]),
    jump=st.booleans(),
    most=st.sampled_from([3, 80]),
)
def test_texts_are_legal_however_they_are_generated(name, seed, temperature, draft, jump, most):
    drafter: Any = None
    if draft == "n-gram":
        drafter = NGramDrafter(4, shortest=1)
    elif draft is not None:
        drafter = (ModelDrafter if draft == "model" else TreeDrafter)(MODEL, 3)
    grammar = GRAMMARS[name]
    found = MODEL.generate(
        PROMPT,
        most,
        grammar=grammar,
        temperature=temperature,
        rng=seed,
        drafter=drafter,
        jump_forward=jump,
        details=True,
    )
    state: Any = grammar.start
    for token in found.tokens:
        state = grammar.advance(state, token)
    if found.finish_reason == "stop":
        assert is_legal(name, found.text), found.text
        assert grammar.accepting(state)
    else:
        assert found.finish_reason == "length"
        assert len(found.tokens) == most


def test_an_engine_serves_all_grammars_together():
    engine = Engine(MODEL, num_blocks=60, block_size=4, drafter=lambda: NGramDrafter(3, shortest=1))
    for i, (name, grammar) in enumerate(GRAMMARS.items()):
        for jump in (False, True):
            request = Request(
                PROMPT,
                70,
                (name, jump),
                grammar=grammar,
                jump_forward=jump,
                temperature=1.0,
                seed=i,
            )
            engine.submit(request)
    engine.submit(Request(PROMPT, 20, "free"))
    while engine.unfinished:
        engine.step()
        engine.check()
    assert engine.results["free"].text == MODEL.generate(PROMPT, 20)
    for name in GRAMMARS:
        for jump in (False, True):
            result = engine.results[name, jump]
            assert result.error is None
            assert result.finish_reason in ("stop", "length")
            assert result.finish_reason == "length" or is_legal(name, result.text)
    assert engine.results["schema", True].jumped_tokens > 0


def test_greedy_text_does_not_depend_on_the_drafter():
    for name, grammar in GRAMMARS.items():
        plain = MODEL.generate(PROMPT, 50, grammar=grammar)
        assert MODEL.generate(PROMPT, 50, grammar=grammar, drafter=ModelDrafter(MODEL, 3)) == plain
        assert MODEL.generate(PROMPT, 50, grammar=grammar, drafter=NGramDrafter(4)) == plain, name


def test_a_grammar_serves_many_requests_and_threads_of_its_own():
    """States are values: two generations in turn do not disturb each other."""
    grammar = GRAMMARS["schema"]
    alone = [
        MODEL.generate(PROMPT, 40, grammar=grammar, temperature=1.0, rng=seed) for seed in range(2)
    ]
    streams = [
        MODEL.stream(PROMPT, 40, grammar=grammar, temperature=1.0, rng=seed) for seed in range(2)
    ]
    pieces: list[list[str]] = [[], []]
    running = {0, 1}
    while running:
        for i in list(running):
            piece = next(streams[i], None)
            if piece is None:
                running.remove(i)
            else:
                pieces[i].append(piece)
    assert ["".join(some) for some in pieces] == alone


def test_the_command_line_compiles_what_it_is_given(tmp_path):
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    (tmp_path / "list.gbnf").write_text(DESCRIPTIONS["ebnf"]["ebnf"])
    given = {
        "regex": ["--regex", DESCRIPTIONS["regex"]["regex"]],
        "choices": ["--choices", "return self,return None", "--choices", "raise"],
        "schema": ["--json-schema", tmp_path / "schema.json", "--jump-forward"],
        "ebnf": ["--grammar", tmp_path / "list.gbnf", "-t", "1", "--seed", "1"],
    }
    for name, options in given.items():
        result = run("generate", PROMPT, "--model", "stdlib-draft", "-n", "90", *options)
        assert result.exit_code == 0, result.stderr
        assert is_legal(name, result.stdout.removesuffix("\n")), result.stdout
        assert "cut off" not in result.stderr
    result = run(
        "generate", PROMPT, "--model", "stdlib-draft", "-n", "60", "-t", "1", "--seed", "1",
        "--grammar", "arithmetic",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    arithmetic = compile(ebnf=shipped("arithmetic"), tokenizer=MODEL.tokenizer)
    state = arithmetic.read(arithmetic.start, result.stdout.removesuffix("\n").encode())
    assert state is not None
    cut = run("generate", PROMPT, "--model", "stdlib-draft", "-n", "1", *given["regex"])
    assert "cut off by --max-tokens 1: the text is not yet one of the grammar" in cut.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--regex", "(a"], "regular expression"),
        (["--regex", "a(?=b)$^c"], "unsatisfiable"),
        (["--json-schema", "{folder}/false.json"], "unsatisfiable"),
        (["--grammar", "jsn"], "by name: choose one of arithmetic, chess, json"),
        (["--grammar", "{folder}/broken.gbnf"], "the rule 'missing' is not defined"),
    ],
)
def test_a_grammar_that_cannot_be_compiled_is_one_sentence(options, message, tmp_path):
    (tmp_path / "false.json").write_text('{"type": "string", "minLength": 3, "maxLength": 2}')
    (tmp_path / "broken.gbnf").write_text("root ::= missing")
    given = [option.replace("{folder}", str(tmp_path)) for option in options]
    result = run("generate", "x", "--model", "stdlib-draft", *given)
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", " ")
    assert not result.stdout


@pytest.mark.real
def test_a_real_chat_model_answers_in_json():
    """And jumping saves forward passes."""
    model = load("smollm2")
    grammar = compile(
        json_schema=SCHEMA, tokenizer=model.tokenizer, order="schema", whitespace="compact"
    )
    messages = [{"role": "user", "content": "Describe Python's list.append as JSON."}]
    ids = model.chat_tokenizer.encode(messages, add_generation_prompt=True)
    found = model.generate(ids, 60, grammar=grammar, details=True)
    assert found.finish_reason == "stop"
    assert is_legal("schema", found.text)
    jumped = model.generate(ids, 60, grammar=grammar, details=True, jump_forward=True)
    assert is_legal("schema", jumped.text)
    assert jumped.jumped_tokens > len(jumped.tokens) / 3


def test_the_masks_of_a_model_with_more_tokens_than_the_tokenizer():
    """The rows of the embedding beyond the vocabulary are never legal."""
    assert isinstance(GRAMMARS["choices"], Grammar)
    mask = GRAMMARS["choices"].mask(GRAMMARS["choices"].start)
    assert len(mask) == MODEL.config.vocab_size
