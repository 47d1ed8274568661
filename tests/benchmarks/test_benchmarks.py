"""The benchmarks run, record what they measured on, and end with an error where engines compute
different things.

No test looks at a speed: a benchmark runs at its smallest size, and its record must follow the
schema.
"""

from __future__ import annotations

import gzip
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from conftest import ROOT, oracle
from refllm.api import load

BENCHMARKS = ROOT / "benchmarks"
COMMITTED = sorted((BENCHMARKS / "results").glob("*.json"))
ENVIRONMENT = {
    "cpu",
    "cores",
    "memory_gib",
    "system",
    "libc",
    "python",
    "blas",
    "versions",
    "threads",
    "load_before",
    "load_after",
    "quiet",
    "date",
}
TINY = {
    "kivi": ["--contexts", "160", "--bits", "2", "3", "--steps", "2", "--rounds", "1"],
    "stored": ["--layers", "1", "--width", "256", "--rounds", "1"],
    "layout": ["--rows", "1", "2", "--rounds", "1"],
    "step": ["--batch", "1", "2", "--prompt", "3", "--new", "4", "--rounds", "1"],
    "decode": [
        "--batch",
        "1",
        "2",
        "--prompt",
        "3",
        "--new",
        "4",
        "--rounds",
        "2",
        "--seconds",
        "0",
        "--engines",
    ],
    "serving": [
        *[
            "--batch",
            "1",
            "2",
            "--prompt",
            "3",
            "--new",
            "4",
            "--rounds",
            "1",
            "--seconds",
            "0",
            "--running",
            "8",
        ],
        "--engines",
    ],
    "quantize": [
        "--size",
        "64",
        "--group",
        "32",
        "--layers",
        "2",
        "--gptq-layers",
        "1",
        "--tokens",
        "128",
        "--small",
        "--rounds",
        "1",
        "--threads",
        "1",
    ],
    "real": [
        *["--batch", "1", "2", "--prompt", "3", "--new", "4", "--prefill", "5", "--steps", "1"],
        *["2", "--context", "3", "--repeats", "1", "--rounds", "2", "--seconds", "0"],
        *["--threads", "1", "2", "--engines"],
    ],
    "grammar": [
        *["--rounds", "2", "--every", "1", "--processes", "2", "--models", "stdlib"],
        *["--engines", "refllm"],
    ],
    "training": [
        "--batch",
        "2",
        "--length",
        "8",
        "--steps",
        "1",
        "--layers",
        "1",
        "--rounds",
        "2",
        "--engines",
    ],
}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import a benchmark's module by name, as its program finds it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint for the tests that must not depend on the bundled one."""
    path = tmp_path_factory.mktemp("benchmark") / "random"
    code = "import sys, pathlib, common; common.random_checkpoint(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(path)], cwd=BENCHMARKS, check=True)
    return path


def run(name: str, folder: Path, *more: str) -> tuple[dict[str, Any], str]:
    """Run a benchmark as a user does, at its smallest; returns the record and what was
    printed.
    """
    output = folder / f"{name}.json"
    command = [
        sys.executable,
        str(BENCHMARKS / f"{name}.py"),
        *TINY[name],
        *more,
        "--output",
        str(output),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text()), done.stdout


def check_record(record: dict[str, Any], name: str) -> None:
    """The schema that figures and readers rely on."""
    assert (record["format"], record["benchmark"], record["kind"]) == (1, name, "B")
    about = record["environment"]
    assert set(about) == ENVIRONMENT
    assert about["cpu"]
    assert about["versions"]["refllm"]
    assert about["versions"]["numpy"]
    assert about["threads"]
    assert all(count >= 1 for count in about["threads"].values())
    assert record["settings"]["rounds"] >= 1
    assert record["results"]
    for spread in spreads(record["results"]):
        assert 0 < spread["low"] <= spread["median"] <= spread["high"]


def spreads(tree: Any) -> list[dict[str, float]]:
    """Every {median, low, high} in the results."""
    if isinstance(tree, dict):
        found = [tree] if "median" in tree else []
        return found + [s for value in tree.values() for s in spreads(value)]
    return [s for value in tree for s in spreads(value)] if isinstance(tree, list) else []


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_results_state_machine_and_versions(path: Path) -> None:
    record = json.loads(path.read_text())
    # of another machine, or with other settings, a record of its own
    name = path.stem.partition("_")[0]
    check_record(record, name)
    if name in ("decode", "serving", "training"):  # measured against PyTorch
        assert record["environment"]["versions"]["torch"]
        assert not {"transformers", "torch"} & set(record["skipped"])


def test_layout_compares_every_layout_at_every_row_count(tmp_path: Path) -> None:
    record, printed = run("layout", tmp_path)
    check_record(record, "layout")
    assert [(r["m"], r["n"], r["rows"]) for r in record["results"]] == [
        (m, n, rows) for m, n in ((4096, 256), (768, 256), (256, 768)) for rows in (1, 2)
    ]
    for row in record["results"]:
        assert set(row["layouts_us"]) == {"Blocks", "Tiles", "OneBlock"}
        assert row["chosen"] in row["layouts_us"]
    assert "plain / chosen" in printed


def test_a_quantised_cache_is_timed_beside_a_full_one(tmp_path: Path) -> None:
    record, printed = run("kivi", tmp_path)
    check_record(record, "kivi")
    assert [(r["context"], r["bits"]) for r in record["results"]] == [(160, 2), (160, 3)]
    for r in record["results"]:
        assert r["bytes"] < r["full_bytes"] == 160 * 4 * 2 * 2 * 64 * 4
        assert 0 < r["ratio"]["low"] <= r["ratio"]["median"] <= r["ratio"]["high"]
    assert "KIVI / full" in printed


def test_grammar_counts_schemas_and_times_masks(tmp_path: Path) -> None:
    cases = [
        ("right", {"type": "integer"}, [(5, True), ("5", False)]),
        ("wrong", {"type": "null"}, [(0, True), (None, False)]),  # marked wrongly on purpose
        ("rejected", {"type": "string", "pattern": "("}, [("(", True)]),
    ]
    data = tmp_path / "schemas.jsonl.gz"
    with gzip.open(data, "wt") as file:
        for family, schema, instances in cases:
            tests = [{"data": data, "valid": valid} for data, valid in instances]
            print(json.dumps({"family": family, "schema": schema, "tests": tests}), file=file)
    record, printed = run("grammar", tmp_path, "--data", str(data))
    check_record(record, "grammar")
    assert record["settings"]["instances"] == 5
    assert record["results"]["judged"]["refllm"] == {
        "compiled": 2,
        "right": 1,
        "valid_rejected": 1,
        "invalid_accepted": 1,
        "crashed": 0,
        "right_of_family": {"rejected": [0, 1], "right": [1, 1], "wrong": [0, 1]},
    }
    (row,) = record["results"]["timed"]
    assert row["vocabulary"] == 4096
    assert set(row["microseconds"]["refllm"]) == {
        f"{what}_p{p}" for what in ("compile", "first", "again") for p in (50, 99)
    }
    assert "share right" in printed


def test_a_large_model_is_loaded_in_its_bytes(tmp_path: Path) -> None:
    record, printed = run("stored", tmp_path)
    check_record(record, "stored")
    (found,) = record["results"]
    parameters = found["parameters"]
    assert parameters == 8016 * 256 * 2 + 256 * (2 * 256 + 2 * 128 + 3 * 896) + 3 * 256
    assert 4 * parameters < 8 * found["file_bytes"] < 8 * parameters
    assert found["peak_bytes"] > found["file_bytes"]
    assert found["storage"].startswith("weights stored as ")
    assert found["in_float"].startswith("float32 weights, decoded from ")
    assert "reading its bytes" in printed


def test_parts_of_a_step_sum_to_the_step(tmp_path: Path, checkpoint: Path) -> None:
    record, _ = run("step", tmp_path, "--model", str(checkpoint))
    check_record(record, "step")
    for row in record["results"]:
        parts = row["parts_us"]
        assert list(parts) == ["products", "attention", "elementwise", "choosing", "rest"]
        # every clock was reached
        assert all(value > 0 for name, value in parts.items() if name != "rest")
        # more, where watching took longer than the step itself
        assert sum(parts.values()) >= row["whole_us"] - 1
        assert row["floor_us"] > 0


def test_decode_measures_every_round_of_every_batch(tmp_path: Path, checkpoint: Path) -> None:
    record, printed = run("decode", tmp_path, "refllm", "--model", str(checkpoint))
    check_record(record, "decode")
    assert [row["batch"] for row in record["results"]] == [1, 2]
    for clock in ("wall", "processor"):
        assert {batch: len(of["refllm"]) for batch, of in record["rates"][clock].items()} == {
            "1": 2,
            "2": 2,
        }
    assert str(checkpoint) in printed


def test_real_measures_decoding_prefill_steps_and_bandwidth(
    tmp_path: Path, checkpoint: Path
) -> None:
    record, printed = run("real", tmp_path, "refllm", "--model", str(checkpoint))
    check_record(record, "real")
    rated = [row for row in record["results"] if row["what"] != "steps"]
    assert [(row["threads"], row["what"]) for row in rated] == [
        (threads, what) for threads in (1, 2) for what in ("batch 1", "batch 2", "prefill")
    ]
    assert all(set(row["tokens_per_second"]) == {"refllm"} for row in rated)
    assert rated[0]["targets"] == {"transformers": 2.0, "llama.cpp, F32": 0.9}
    stepped = [row for row in record["results"] if row["what"] == "steps"]
    assert [(row["threads"], row["engine"]) for row in stepped] == [(1, "refllm"), (2, "refllm")]
    for row in stepped:
        assert set(row["milliseconds"]) == set(row["to_one"]) == {"1", "2"}
        assert row["to_one"]["1"]["median"] == 1
        assert row["bandwidth_ratio"]["median"] > 0
    for threads in (1, 2):
        assert record["engines"][f"refllm, threads {threads}"]["threads"] == threads
        assert record["agreement"][f"{threads} threads"]["refllm"]["equal"] == 3
        for values in record["rounds"][str(threads)].values():
            assert len(values["refllm"]) == 2
    assert "relative to one" in printed


def test_a_family_of_kernels_that_is_missing_is_recorded_as_not_run(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module("real")
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    monkeypatch.setattr(real, "family", lambda core_type: "Haswell")
    engines, missing = real.engines_here(["families"])
    assert set(engines) == {"refllm"}
    assert set(missing) == {"refllm, SkylakeX kernels"}
    monkeypatch.setattr(real, "family", lambda core_type: core_type or "SkylakeX")
    monkeypatch.setattr(real, "fast_kernels", lambda cpuinfo: None)
    engines, missing = real.engines_here(["families"])
    assert engines["refllm, Haswell kernels"].kernels == "Haswell"
    assert engines["refllm"].kernels is None  # OpenBLAS's own choice
    assert missing == {}


@pytest.mark.parametrize(
    ("name", "margin", "void"),
    [
        ("transformers", 3e-4, False),
        ("transformers", 5e-4, True),
        ("llama.cpp, F32", 5e-4, False),
        ("llama.cpp, F32", 7e-3, True),
        ("llama.cpp, Q4_1", 5.0, False),  # it rounds activations: counted, not required
    ],
)
def test_texts_on_the_real_model_part_at_near_ties_only(
    module: Any, name: str, margin: float, void: bool
) -> None:
    real = module("real")
    engines = {"refllm": scripted([[1, 2]]), name: scripted([[1, 0]])}
    model = model_with([10.0, 0.0, 10.0 - margin])
    if void:
        with pytest.raises(SystemExit, match="parts from refllm at token 1"):
            real.agreement(engines, model, [[5]], 2)
        return
    found = real.agreement(engines, model, [[5]], 2)[name]
    assert (found["equal"], found["of"]) == (0, 2)
    assert found["parted"][0] == {"token": 1, "margin": pytest.approx(margin)}


def test_serving_measures_engine_control_plane_and_books(tmp_path: Path, checkpoint: Path) -> None:
    record, printed = run("serving", tmp_path, "engine", "static", "--model", str(checkpoint))
    check_record(record, "serving")
    results = record["results"]
    assert [(row["batch"], list(row["ratio"])) for row in results["throughput"]] == [
        (1, ["static"]),
        (2, ["static"]),
    ]
    assert all(0 < share["median"] < 1 for share in results["control_plane_share"].values())
    assert results["books"]["running"] == 8
    assert "A plan for 8 running requests" in printed


def test_training_reports_every_turn_and_its_page_faults(tmp_path: Path) -> None:
    record, _ = run("training", tmp_path, "refllm")
    check_record(record, "training")
    turns = record["rounds"]["refllm"]
    assert len(turns) == 2
    assert all(
        turn["page_faults"] >= 0 and turn["rate"] > 0 and np.isfinite(turn["loss"])
        for turn in turns
    )


def test_quantize_times_every_stage_and_projects_what_it_did_not_do(tmp_path: Path) -> None:
    record, printed = run("quantize", tmp_path)
    check_record(record, "quantize")
    layer, rtn, *models = record["results"]
    assert (layer["part"], rtn["part"]) == ("layer", "rtn")
    assert set(layer["seconds"]) == {"refllm", "torch"} - set(record["skipped"])
    assert [(m["method"], m["layers"], m["projected"]) for m in models] == [
        ("rtn", 2, True),
        ("gptq", 1, True),
    ]
    for row in models:
        assert sum(row["shares"].values()) == pytest.approx(1)
        text = {"Hessian", "factor"}
        reached = {name for name, share in row["shares"].items() if share > 0}
        assert reached >= {"reading", "rounding", "errors of the report", "layer files", "writing"}
        assert bool(reached & text) == (row["method"] == "gptq")
        writing = row["shares"]["writing"] * row["seconds"]
        whole = writing + (row["seconds"] - writing) * 16 / row["layers"]
        assert row["minutes_of_16_layers"] == pytest.approx(whole / 60)
        assert row["bits_per_weight"] == pytest.approx(4.5)  # 4 + 16/32
    assert "projected" in printed


@pytest.mark.parametrize("other", [1.03, 0.97])
def test_losses_of_two_quantisers_that_part_end_the_benchmark(module: Any, other: float) -> None:
    quantize = module("quantize")
    quantize.check([1.0, 1.01])
    with pytest.raises(SystemExit, match="the comparison is void"):
        quantize.check([1.0, other])


@pytest.mark.oracle
def test_decode_against_transformers(tmp_path: Path, checkpoint: Path) -> None:
    oracle("transformers")
    engines = ("refllm", "transformers", "transformers, static cache")
    record, _ = run("decode", tmp_path, *engines, "--model", str(checkpoint))
    check_record(record, "decode")
    for row in record["results"]:
        assert set(row["ratio"]) == set(engines[1:])
        assert row["ratio_to_peer"] == row["ratio"][row["peer"]]
        for name in engines:
            agreement = record["agreement"][str(row["batch"])][name]
            assert agreement["equal"] + len(agreement["near_ties"]) == row["batch"]


@pytest.mark.oracle
def test_real_against_transformers(tmp_path: Path, checkpoint: Path) -> None:
    oracle("transformers")
    # exits with an error if the tokens part
    record, _ = run(
        "real", tmp_path, *("refllm", "transformers", "--model", str(checkpoint), "--threads", "1")
    )
    check_record(record, "real")
    for row in record["results"]:
        if row["what"] != "steps":
            assert row["ratio"]["transformers"]["median"] > 0


@pytest.mark.oracle
def test_training_against_torch_starts_from_the_same_loss(tmp_path: Path) -> None:
    oracle("torch")
    oracle("transformers")
    # exits with an error if the losses part
    record, _ = run("training", tmp_path, "refllm", "torch")
    check_record(record, "training")
    assert record["results"][0]["ratio_to_torch"]["median"] > 0


@pytest.mark.llamacpp
def test_decode_against_llamacpp(tmp_path: Path, checkpoint: Path) -> None:
    install = "pip install llama-cpp-python gguf"
    oracle("llama_cpp", install)
    oracle("gguf", install)
    # exits if the tokens part
    record, _ = run("decode", tmp_path, "refllm", "llama.cpp", "--model", str(checkpoint))
    check_record(record, "decode")
    assert all(row["ratio"]["llama.cpp"]["median"] > 0 for row in record["results"])


@pytest.mark.llamacpp
def test_serving_against_llamacpp(tmp_path: Path, checkpoint: Path, module: Any) -> None:
    install = "pip install llama-cpp-python gguf"
    oracle("llama_cpp", install)
    oracle("gguf", install)
    # exits if the tokens part
    record, _ = run("serving", tmp_path, "engine", "llama.cpp", "--model", str(checkpoint))
    check_record(record, "serving")
    assert all(row["ratio"]["llama.cpp"]["median"] > 0 for row in record["results"]["throughput"])


@pytest.mark.llamacpp
@pytest.mark.parametrize(("slots", "budget"), [(None, 2048), (2, 2048), (2, 7), (3, 4), (1, 2048)])
def test_a_request_that_waits_for_a_slot_of_llamacpp_gets_the_tokens_that_it_gets_alone(
    tmp_path: Path, checkpoint: Path, module: Any, slots: int | None, budget: int
) -> None:
    install = "pip install llama-cpp-python gguf"
    oracle("llama_cpp", install)
    oracle("gguf", install)
    llamacpp = module("engines.serving_llamacpp")
    llamacpp.write_gguf(str(checkpoint), tmp_path / "model.gguf")
    server = llamacpp.Server(tmp_path / "model.gguf")
    model = load(str(checkpoint))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 512, length).tolist() for length in (5, 17, 3, 40, 9)]
    expected = [list(model.generate(prompt, 6, ignore_eos=True)) for prompt in prompts]
    assert server.generate(prompts, 6, slots, budget) == expected


def test_a_missing_program_is_named_with_its_install_line(
    module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = module("decode")
    missing = decode.Engine(
        "decode_refllm", (), ("no_such_package",), "pip install no-such-package"
    )
    monkeypatch.setitem(decode.ENGINES, "absent", missing)
    workers, skipped = decode.start(["absent"], Path("nowhere"), None)
    assert workers == {}
    assert skipped == {"absent": "pip install no-such-package"}


# --- the comparison is void if the engines compute different things -----------------------


def scripted(tokens: list[list[int]]) -> SimpleNamespace:
    """An engine that always gives the same tokens."""
    return SimpleNamespace(ask=lambda **request: {"tokens": tokens})


def model_with(logits: list[float]) -> SimpleNamespace:
    return SimpleNamespace(logits=lambda tokens: np.array([logits]))


OPTIONS = SimpleNamespace(batch=[1], new=2)


def test_equal_tokens_agree(module: Any) -> None:
    engines = {"refllm": scripted([[1, 2]]), "other": scripted([[1, 2]])}
    out = module("decode").agreement(engines, model_with([0.0]), [[5]], OPTIONS)
    assert out["1"]["other"] == {"equal": 1, "near_ties": []}


def test_engines_may_part_at_a_near_tie(module: Any) -> None:
    engines = {"refllm": scripted([[1, 2]]), "other": scripted([[1, 0]])}
    out = module("decode").agreement(engines, model_with([10.0, 0.0, 10.0 + 3e-4]), [[5]], OPTIONS)
    assert out["1"]["other"]["equal"] == 0
    assert out["1"]["other"]["near_ties"] == [{"token": 1, "margin": pytest.approx(3e-4)}]


@pytest.mark.parametrize("margin", [5e-4, -5e-4])
def test_engines_that_part_by_a_clear_margin_end_the_benchmark(module: Any, margin: float) -> None:
    engines = {"refllm": scripted([[1, 2]]), "other": scripted([[1, 0]])}
    with pytest.raises(SystemExit, match="other parts from refllm at token 1"):
        module("decode").agreement(engines, model_with([10.0, 0.0, 10.0 + margin]), [[5]], OPTIONS)


def test_an_engine_that_stops_early_ends_the_benchmark(module: Any) -> None:
    engines = {"refllm": scripted([[1, 2]]), "other": scripted([[1]])}
    with pytest.raises(SystemExit, match="gave 1 tokens where 2 were expected"):
        module("decode").agreement(engines, model_with([0.0]), [[5]], OPTIONS)


@pytest.mark.parametrize(("second", "turn"), [(5.001, 0), (5.1, 1)])
def test_losses_that_part_end_the_benchmark(module: Any, second: float, turn: int) -> None:
    training = module("training")
    training.check([5.0, 5.0004], 0)
    training.check([5.0, 5.04], 1)
    with pytest.raises(SystemExit, match="losses part"):
        training.check([5.0, second], turn)


def test_layouts_that_disagree_end_the_benchmark(module: Any) -> None:
    layout = module("layout")
    plain = np.full((2, 64), 3.0, np.float32)
    layout.check(plain, plain * (1 + 1e-7))
    with pytest.raises(SystemExit, match="disagree"):
        layout.check(plain, plain * (1 + 1e-4))


# --- the shared parts ---------------------------------------------------------------------


def test_a_ratio_is_formed_within_a_round(module: Any) -> None:
    # The machine slows tenfold in the second round: a ratio of medians would see 2.2, the
    # rounds see 2, 2 and 4.
    ratio = module("common").ratios([200.0, 20.0, 440.0], [100.0, 10.0, 110.0])
    assert ratio == {"median": 2.0, "low": 2.0, "high": 4.0}


def engine(
    folder: Path, name: str, code: str, common: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """A worker that runs ``code``, written into a package ``engines`` of its own."""
    (folder / "engines").mkdir()
    (folder / "engines" / f"{name}.py").write_text(
        f"from common import Channel\nchannel = Channel()\n{code}"
    )
    (folder / "common.py").write_text((BENCHMARKS / "common.py").read_text())
    monkeypatch.setattr(common, "HERE", folder)
    return common.Worker(name, (), threads=1)


def test_what_a_library_prints_does_not_reach_the_pipe(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "print('noise')\nchannel.send(name='loud')\nwhile (r := channel.receive()) is not "
        "None:\n    print('more noise')\n    channel.send(double=2 * r['x'])\n"
    )
    worker = engine(tmp_path, "loud", code, module("common"), monkeypatch)
    assert worker.about == {"name": "loud"}
    assert [worker.ask(x=x)["double"] for x in (1, 21)] == [2, 42]
    worker.close()
    assert worker.process.returncode == 0


def test_an_engine_that_dies_is_an_error_and_no_hang(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = module("common")
    code = "channel.send()\nchannel.receive()\nraise SystemExit(3)\n"
    worker = engine(tmp_path, "mortal", code, common, monkeypatch)
    with pytest.raises(common.EngineError, match="mortal ended with status 3"):
        worker.ask(x=1)
    worker.close()


def test_an_engine_computes_with_the_threads_it_was_given(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    code = (
        "import os\nchannel.send(**{k: os.environ[k] for k in "
        "('OPENBLAS_NUM_THREADS', 'OMP_NUM_THREADS', 'MKL_NUM_THREADS')})\n"
    )
    worker = engine(tmp_path, "counting", code, module("common"), monkeypatch)
    assert worker.about == {
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    worker.close()
