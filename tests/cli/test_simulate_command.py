"""``refllm simulate``: what it prints, what it writes, what it rejects."""

from __future__ import annotations

import json
import shlex

import pytest
from typer.testing import CliRunner

from refllm.cli import app
from refllm.cli.simulate import _digits
from refllm.measure.records import read
from refllm.simulate.timeline import COLUMNS

SMALL = "simulate --requests 12 --slots 3000"


def run(line):
    return CliRunner().invoke(app, shlex.split(line))


def test_results_are_called_projected_and_depend_on_the_seed_alone():
    first = run(SMALL)
    second = run(SMALL)
    assert first.exit_code == 0, first.output
    assert "12 requests, projected by the roofline for H200 SXM, bf16 dense" in first.stdout
    assert "TTFT" in first.stdout
    assert first.stdout == second.stdout != run(SMALL + " --seed 1").stdout


@pytest.mark.parametrize(
    "more",
    [
        "",
        "--policy static",
        "--policy orca-pow2 --slots 8192",
        "--policy priority --preempt swap",
        "--rate 5",
        "--traffic chat --prefix-cache hash",
        "--traffic tree --prefix-cache radix --policy lpm",
        "--model llama-70b",
        "--traffic azure-code --slots 40000",
        "--model stdlib",
    ],
)
def test_json_has_the_results_and_every_request_is_served(more):
    result = run(f"{SMALL} {more} --json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["completed"] == facts["requests"] >= 12
    assert facts["times"]["ttft"]["mean"] <= facts["times"]["e2el"]["mean"] <= facts["duration"]
    assert (facts["hit rate"] > 0.3) == ("prefix-cache" in more)


def test_limits_cost_goodput():
    free, tight = (
        json.loads(run(f"{SMALL} --json {limits}").stdout) for limits in ("", "--ttft 12")
    )
    assert (
        free["goodput"]
        == free["request_throughput"]
        == tight["request_throughput"]
        > tight["goodput"]
    )


def test_a_trace_is_a_record_of_every_step(tmp_path):
    path = tmp_path / "run.json"
    result = run(
        "simulate --traffic chat --requests 4 --slots 900 --prefix-cache radix --trace "
        f"{path} --json"
    )
    assert result.exit_code == 0, result.output
    record = read(path)
    steps = json.loads(result.stdout)["steps"]
    assert record.kind == "C"
    occupancy = record.values["occupancy"]
    blocks = record.values["blocks"]
    assert all(len(occupancy[name]) == steps for name in COLUMNS)
    assert len(blocks["owners"]) == min(200, steps)
    assert all(len(row) == 900 // 16 for row in blocks["owners"])

    def tokens(nodes):
        return sum(node["tokens"] + tokens(node["children"]) for node in nodes)

    # the system prompt, once, and what followed it
    assert tokens(record.values["tree"]) > 160


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--device tpu", "unknown device 'tpu'; choose one of h200, a100, here"),
        ("--device here", "say how many tokens fit with --slots"),
        ("--traffic nobody", "unknown traffic 'nobody'"),
        ("--policy best", "unknown policy 'best'"),
        ("--prefix-cache trie", "unknown prefix cache 'trie'"),
        ("--preempt kill", "unknown preemption mode 'kill'"),
        ("--preempt swap --prefix-cache hash", "without a prefix cache"),
        ("--policy static --prefix-cache hash", "it can share no prefixes"),
        ("--slots 7", "hold no block of 16"),
        ("--slots 64", "and the pool has 64"),
        ("--slots 99999999999999999999999", "take fewer slots or larger blocks"),
        ("--traffic rag --rate 3", "come together"),
        ("--model llama-70b --device a100", "too little for"),
        ("--model NOWHERE", "neither a folder nor a bundled model"),
        ("--rate 0", "arrivals need a rate"),
        ("--requests 0", "requests"),
        ("--backend torch", "unknown backend"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(line, message):
    result = run(f"simulate {line}")
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert message in result.stderr.splitlines()[-1]


def test_small_times_keep_two_digits():
    assert [_digits(ms) for ms in (1234.5678, 0.1, 0.01234, 0.0)] == [
        "1,234.57",
        "0.10",
        "0.012",
        "0",
    ]
