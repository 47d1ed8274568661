"""The README's code prints what the README says, and its numbers are those of the recorded
data.
"""

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

import refllm
from refllm.cli import app
from refllm.kv.kivi import Kivi

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


@pytest.mark.parametrize("name", ["stdlib", "stdlib-draft"])
def test_the_models_have_the_figures_of_their_cards(name: str):
    row = next(line for line in README.splitlines() if line.startswith(f"| [`{name}`]"))
    record = card(name)
    assert f"{record['parameters']:,}" in row
    assert f"{record['measured']['bits per byte']:.3f}" in row
    assert f"{record['training']['tokens'] / 1e6:.1f} M tokens" in row


def test_the_speeds_are_the_recorded_ones():
    for name, machine in (("decode", ""), ("decode_avx2", "AVX2, ")):
        recorded = json.loads(
            (ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8")
        )
        assert len(recorded["results"]) == 3
        for row in recorded["results"]:
            figures = row["ratio_to_peer"]
            line = next(
                x for x in README.splitlines() if x.startswith(f"| {machine}{row['batch']} |")
            )
            assert f"{figures['median']:.1f}×" in line
            assert f"{row['tokens_per_second']['refllm']['median']:,.0f}" in line
    training = json.loads(
        (ROOT / "benchmarks" / "results" / "training.json").read_text(encoding="utf-8")
    )
    assert (
        f"{training['results'][0]['ratio_to_torch']['median']:.1f}× the tokens/s of PyTorch"
        in README
    )


def test_the_share_of_products_is_the_recorded_one():
    rows = json.loads((ROOT / "benchmarks" / "results" / "step.json").read_text("utf-8"))["results"]
    share = {
        row["batch"]: round(100 * row["parts_us"]["products"] / row["whole_us"]) for row in rows
    }
    assert stated(r"products take (\d+) % of its time there, and (\d+) % with 32 sequences") == [
        share[1],
        share[32],
    ]


def test_the_costs_of_quantisation_are_the_recorded_ones():
    """KL at 8, 4, 3 and 2 bits in groups of 128, a mean over the calibration seeds, and
    bits per byte at 4 bits.
    """
    rows = json.loads((ROOT / "figures/data/quantization.json").read_text("utf-8"))["values"][
        "rows"
    ]
    for name, method in (("round to nearest", "rtn"), ("AWQ", "awq"), ("GPTQ", "gptq")):
        line = next(x for x in README.splitlines() if x.startswith(f"| {name} |"))
        *stated, bits_per_byte = (float(cell) for cell in line.split("|")[2:-1])
        cells = [
            [r for r in rows if (r["method"], r["bits"], r["group"]) == (method, b, 128)]
            for b in (8, 4, 3, 2)
        ]
        for value, cell in zip(stated, cells, strict=True):
            assert value == pytest.approx(np.mean([r["kl"][0] for r in cell]), rel=0.04)
        assert bits_per_byte == pytest.approx(
            np.mean([r["bits per byte"] for r in cells[1]]), abs=5.1e-4
        )


def test_the_command_that_quantises_prints_what_stands_below_it(tmp_path):
    command, output = re.search(
        r"```text\n\$ refllm (quantize .*?)\n…\n(.*?)```", README, re.S
    ).groups()
    arguments = command.replace("stdlib-w4", "w4").split()
    with contextlib.chdir(tmp_path):
        printed = (
            CliRunner().invoke(app, arguments, catch_exceptions=False).output.splitlines()[-3:]
        )
    lines = output.splitlines()
    assert printed[:2] == lines[:2]
    # the text is that of this Python
    if platform.python_version() == card("stdlib")["made with"]["python"]:
        (*numbers, _), (*given, _) = (
            re.findall(r"\d[\d,.]*\d", line) for line in (printed[2], lines[2])
        )
        assert [float(n.replace(",", "")) for n in numbers] == pytest.approx(
            [float(n.replace(",", "")) for n in given], abs=2e-3
        )


def stated(pattern: str) -> list[float]:
    """The numbers of a sentence, which may run over several lines."""
    found = re.search(pattern, " ".join(README.split()))
    assert found, f"the README no longer says: {pattern}"
    return [float(number) for number in found.groups()]


def values(name: str) -> dict:
    return json.loads((ROOT / "figures" / "data" / f"{name}.json").read_text("utf-8"))["values"]


def test_the_24_times_are_taken_apart_as_recorded():
    padding, whole, batch = stated(
        r"padding makes ([\d.]+)× of the ([\d.]+)× measured here, .* batch ([\d.]+)×"
    )
    factors = {
        name: np.median(rounds)
        for name, rounds in values("unpadding")["factors"]["processor"].items()
    }
    assert [padding, whole, batch] == [
        round(float(factors[k]), 1) for k in ("padding", "all three", "batch")
    ]
    assert "gathering through tables costs a tenth" in " ".join(README.split())
    assert 0.85 < factors["kernel"] < 0.95


def test_the_engine_against_other_programs_is_as_recorded():
    results = json.loads((ROOT / "benchmarks" / "results" / "serving.json").read_text("utf-8"))[
        "results"
    ]
    *stated_ratios, share = stated(
        r"engine writes ([\d.]+)× and ([\d.]+)× the tokens of `transformers` and "
        r"([\d.]+)× and ([\d.]+)× those of llama.cpp's slots in float32; "
        r"what is not the network takes ([\d.]+) % of its step"
    )
    ratios = [row["ratio"] for row in results["throughput"]]
    theirs = [
        min(v["median"] for k, v in row.items() if k.startswith("transformers")) for row in ratios
    ]
    assert stated_ratios == pytest.approx(
        [*theirs, *(row["llama.cpp"]["median"] for row in ratios)], abs=0.06
    )
    assert share == pytest.approx(
        100 * max(x["median"] for x in results["control_plane_share"].values()), abs=0.06
    )


def test_what_outliers_cost_and_what_smoothing_leaves_are_the_recorded_ones():
    loss, left = stated(
        r"they cost W8A8 (\d+) % in bits per byte, and SmoothQuant brings that down to ([\d.]+) %"
    )
    assert values("smoothquant")["factor"] == stated(r"exact rescaling of (\d+)×")[0]
    rows = [
        r
        for r in values("smoothquant")["rows"]
        if (r["outliers"], r["level"], r["keep"]) == ("norms", "O1", [])
    ]
    cost = {row["alpha"]: 100 * (row["bits per byte"] / row["full precision"] - 1) for row in rows}
    assert loss == round(cost[None])
    assert left == round(cost[0.5], 2)


def test_what_speculation_buys_is_what_was_recorded():
    def best(record: dict, task: str, drafter: str) -> float:
        rows = [r for r in record["results"] if (r["task"], r["drafter"]) == (task, drafter)]
        return round(max(r["speedup"]["median"] for r in rows), 2)

    records = [
        json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text("utf-8"))
        for name in ("speculative", "speculative_haswell")
    ]
    here = stated(
        r"code ([\d.]+)× as fast as plain decoding in chains and ([\d.]+)× in trees, "
        r"n-grams alone ([\d.]+)×, and ([\d.]+)× where n-grams are asked first, else a tree; "
        r"n-grams write copied text ([\d.]+)× as fast"
    )
    there = stated(
        r"the draft gains less: ([\d.]+)× in chains, ([\d.]+)× in trees, and copies ([\d.]+)×"
    )
    asked = [
        ("code", "model"),
        ("code", "tree"),
        ("code", "n-gram"),
        ("code", "n-gram, tree"),
        ("copy", "n-gram"),
    ]
    assert here == [best(records[0], *case) for case in asked]
    assert there == [best(records[1], *case) for case in (asked[0], asked[1], asked[4])]
    assert there[0] < here[0]
    assert "Haswell" in records[1]["environment"]["blas"]
    batches = [row for row in records[0]["batches"] if row["batch"] > 1]
    assert stated(r"drafts make one sequence ([\d.]+)× as fast") == [
        round(records[0]["batches"][0]["adaptive"]["median"], 2)
    ]
    for name, digits, pattern in (
        ("fixed", 1, r"γ = 3 always takes ([\d.]+) to ([\d.]+) times as long"),
        (
            "adaptive",
            2,
            r"hardly made in batches of 2 to 32, which take ([\d.]+) to ([\d.]+) times as long",
        ),
    ):
        times = [1 / row[name]["median"] for row in batches]
        assert stated(pattern) == [round(min(times), digits), round(max(times), digits)]


def test_the_cost_of_a_quantised_cache_is_that_of_its_record():
    values = json.loads((ROOT / "figures/data/kv_quantization.json").read_text(encoding="utf-8"))[
        "values"
    ]
    text = " ".join(
        README[
            README.index("## A smaller cache") : README.index("## Serving and speculation")
        ].split()
    )
    kl = {
        (r["network"], r["choice"], r["bits"]): r["kl"][0]
        for r in values["rows"]
        if r["residual"] == 128
    }
    assert (
        f"that costs KL {kl['as it is', 'KIVI', 2]:.3f} at 2 bits and "
        f"{kl['as it is', 'KIVI', 4]:.4f} at 4" in text
    )
    assert f"with keys by token, {kl['as it is', 'keys by token', 2]:.3f} at 2 bits" in text
    assert (
        f"keys by token cost {kl['planted', 'keys by token', 2]:.2f}, and KIVI's what they "
        "cost before" in text
    )
    assert kl["planted", "KIVI", 2] == pytest.approx(kl["as it is", "KIVI", 2], rel=1e-3)
    assert f"two pairs of channels made {values['factor']:g} times as large" in text
    assert len(values["pairs"]) == 2
    share = dict(zip(values["lengths"], values["memory"]["2 bits"], strict=True))
    assert (
        f"{100 * share[4096]:.0f} % of float16's bytes at 4,096 tokens, "
        f"{100 * share[128]:.0f} % at 128" in text
    )
    assert f"{Kivi(2, 2).bits_per_value():g} bits per value with 2-bit codes" in text

    steps = json.loads((ROOT / "benchmarks/results/kivi.json").read_text(encoding="utf-8"))[
        "results"
    ]
    ratio = next(r["ratio"]["median"] for r in steps if (r["context"], r["bits"]) == (1024, 2))
    assert f"a step behind 1,024 tokens takes {ratio:.1f} times as long in 2 bits" in text

    rows = json.loads((ROOT / "figures/data/kv_sparsity.json").read_text(encoding="utf-8"))[
        "values"
    ]["rows"]
    cost = {(r["task"], r["policy"], r["budget"]): r["kl"][0] for r in rows}
    near = [cost["as it comes", name, 256] for name in ("newest only", "H2O", "at random")]
    assert (
        "the newest 256 tokens cost KL {:.3f}, H2O's choice {:.3f}, and as many at random "
        "{:.3f}".format(*near)
        in text
    )
    far = [
        cost["a far copy", name, 512]
        for name in ("newest only", "H2O", "TOVA", "at random", "SnapKV")
    ]
    held = next(
        r["held"]
        for r in rows
        if (r["task"], r["policy"], r["budget"]) == ("a far copy", "SnapKV", 512)
    )
    assert (
        "512 tokens cost {:.3f} if they are the newest, {:.3f} by H2O, {:.3f} by TOVA, {:.3f} at "
        "random; SnapKV, which holds {:.0f} there, {:.3f}".format(*far[:4], held, far[4])
    ) in text
