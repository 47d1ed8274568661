"""The README's code prints what the README says, and its numbers are made of the records."""

from __future__ import annotations

import contextlib
import io
import json
import platform
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import readme
import readme_blocks
import refllm
from command_line import run
from refllm.cli import app

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODELS = ROOT / "refllm" / "models"


def card(name: str) -> dict:
    return json.loads((MODELS / name / "card.json").read_text(encoding="utf-8"))


def test_the_code_prints_what_stands_below_it():
    """Text is compared where rounding cannot change it; the last line where the standard
    library is the same one.
    """
    code, output = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", README, re.S).groups()
    prompt, count = re.search(r'generate\("(.*?)", (\d+)\)', code).groups()
    prompt = prompt.encode().decode("unicode_escape")
    model = refllm.load("stdlib")
    begin = model.tokenizer.encode(prompt, special=True)
    written = model.generate(begin, int(count))
    z = np.sort(model.logits(begin + written)[len(begin) - 1 : -1], axis=-1)
    # greedy text is the same on every machine if its closest decision is far above float32
    # rounding (about 2e-5)
    assert float(np.min(z[:, -1] - z[:, -2])) > 1e-3, (
        "choose a prompt whose greedy continuation is decided clearly"
    )

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    lines = printed.getvalue().splitlines()
    stated = output.splitlines()
    if platform.python_version() != card("stdlib")["made with"]["python"]:
        lines = lines[:-1]
        stated = stated[:-1]
    assert lines == stated


def test_the_further_examples_print_what_stands_below_them():
    examples = re.findall(r"```python\n((?:(?!```).)*)```\n\n```text\n(.*?)```", README, re.S)
    assert len(examples) > 1
    for code, output in examples[1:]:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "README.md", "exec"), {})
        assert printed.getvalue() == output


def test_the_command_that_quantises_prints_what_stands_below_it(tmp_path):
    command, output = re.search(
        r"```text\n\$ refllm (quantize .*?)\n…\n(.*?)```", README, re.S
    ).groups()
    arguments = command.replace("stdlib-w4", "w4").split()
    lines = output.splitlines()
    with contextlib.chdir(tmp_path):
        shown = CliRunner().invoke(app, arguments, catch_exceptions=False).output
    printed = shown.splitlines()[-len(lines) :]
    assert printed[:2] == lines[:2]
    # the text is that of this Python
    if platform.python_version() == card("stdlib")["made with"]["python"]:
        bits, stated = (
            [float(number) for number in re.findall(r"\d\.\d+", text[2])]
            for text in (printed, lines)
        )
        assert len(bits) == 2
        assert bits == pytest.approx(stated, abs=2e-3)
        assert printed[3:] == lines[3:]


# --- numbers from records ----------------------------------------------------------------


def test_the_page_is_current():
    stale = "README.md is stale: run `make readme` and commit it"
    assert readme.written(README) == README, stale


def test_no_number_stands_outside_of_a_generated_block_without_a_reason():
    assert readme.problems(README) == []


def test_a_stale_block_is_made_again():
    begin = README.index("<!-- begin: speed -->")
    stale = README.replace(
        README[begin : README.index("<!-- end -->", begin)], "<!-- begin: speed -->\n"
    )
    assert stale != README
    assert readme.written(stale) == README


@pytest.mark.parametrize(
    ("sentence", "number"),
    [
        ("It takes 3 ms.", "3"),
        ("2.5× as fast", "2.5"),
        ("(17)", "17"),
        ("about 2·10⁻³ of it", "2·10⁻³"),
        ("20 % of it", "20"),
        ("all 1,024", "1,024"),
    ],
)
def test_a_number_without_a_record_is_found(sentence: str, number: str):
    (problem,) = readme.problems(f"{README}\n{sentence}\n")
    assert problem.startswith(f"a number without a record, {number}, in README.md")


@pytest.mark.parametrize(
    "sentence", ["FP8, W4A16 and H2O", "`12`", "[02](notebooks/02_x.ipynb)", "[a](b/5.json)"]
)
def test_names_code_and_links_are_no_numbers(sentence: str):
    assert readme.problems(f"{README}\n{sentence}\n") == []


def test_a_phrase_that_is_gone_is_named():
    without = README.replace("Python ≥ 3.11", "Python")
    assert readme.problems(without) == [
        "README.md no longer says 'Python ≥ 3.11': remove it from PHRASES"
    ]


def test_a_block_that_nothing_makes_and_a_block_that_is_missing_are_rejected():
    with pytest.raises(ValueError, match="README.md has the blocks"):
        readme.written(README + "<!-- begin: unknown -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="README.md has the blocks"):
        readme.written(README.replace("<!-- begin: models -->", ""))


def test_a_claim_that_the_records_do_not_bear_out_is_rejected(monkeypatch):
    record = readme_blocks.benchmark("decode")
    record["results"][0]["target"] = 1.0  # it is reached
    monkeypatch.setattr(readme_blocks, "benchmark", lambda name: record)
    with pytest.raises(ValueError, match="the targets are not reached"):
        readme_blocks.speed()


@pytest.mark.real
def test_the_chat_is_what_the_real_model_answers():
    """All but the times."""
    transcript = re.search(r"```console\n\$ refllm chat\n(.*?)```", README, re.S)[1]
    _, *turns = re.split(r"^> ", transcript, flags=re.M)
    asked = [turn.splitlines() for turn in turns]
    result = run("chat", stdin="".join(f"{question}\n" for question, *_ in asked))
    assert result.stdout.splitlines() == [answer for _, answer, _ in asked]
    counts = [re.findall(r"(?:read|wrote|context) [\d,]+", line) for *_, line in asked]
    found = [re.findall(r"(?:read|wrote|context) [\d,]+", x) for x in result.stderr.splitlines()]
    assert found == counts
