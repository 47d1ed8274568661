"""``refllm generate``: the new text alone on stdout, options passed on, smaller KV caches."""

from __future__ import annotations

import json
import shlex
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from command_line import TEXT, as_lines, run, save_tiny_model, write_text
from refllm.api import Model, load
from refllm.cli.generate import read_prompt
from refllm.cli.options import unescape
from refllm.corpus import Document
from refllm.decode.sampling_params import SamplingParams
from refllm.kv.kivi import Kivi
from refllm.kv.kivi_attend import KiviAttend
from refllm.kv.sparse import h2o, recent_only, snapkv, streaming, tova
from refllm.measure.comparison import compare
from refllm.measure.memory import human


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "code.py")


def test_generate_prints_only_what_is_new(model, text_file):
    expected = as_lines(load(model, "numpy").generate("def f", 20))
    result = run("generate", "def f", "--model", model, "--max-tokens", "20")
    assert result.stdout == expected
    assert "6 + 20 tokens, the first after" in result.stderr
    assert "tokens/s" in result.stderr
    assert run("generate", "-", "--model", model, "-n", "20", stdin="def f").stdout == expected
    short = text_file.with_name("prompt")
    short.write_text("def f")
    assert run("generate", "--prompt-file", short, "--model", model, "-n", "20").stdout == expected


def test_generate_takes_another_tokenizer(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "m")
    (tmp_path / "named").mkdir()
    shutil.move(folder / "tokenizer.json", tmp_path / "named")
    lost = run("generate", "def f", "--model", folder)
    assert lost.exit_code == 2
    assert "has no tokenizer that refllm reads" in lost.stderr
    assert "--tokenizer DIR" in lost.stderr
    found = run(
        "generate", "def f", "--model", folder, "--tokenizer", tmp_path / "named", "-n", "9"
    )
    assert found.stdout == as_lines(load(model, "numpy").generate("def f", 9))


def test_generate_passes_every_sampling_option_on(model):
    sampling = SamplingParams(0.9, 30, 0.95, 0.001, 1.2)
    expected = "".join(
        load(model, "numpy").stream("x", 30, sampling=sampling, rng=5, ignore_eos=True)
    )
    options = shlex.split(
        "-t 0.9 --top-k 30 --top-p 0.95 --min-p 0.001 --repetition-penalty 1.2 --seed 5 "
        "--ignore-eos"
    )
    result = run("generate", "x", "--model", model, "-n", "30", *options)
    assert result.stdout == as_lines(expected)
    assert "seed 5" in result.stderr
    stop = expected[4:6]
    cut = run(
        "generate", "x", "--model", model, "-n", "30", *options, "--stop", "\0", "--stop", stop
    )
    assert cut.stdout == as_lines(expected[: expected.index(stop)])


@given(text=st.text("ab\n\t\r\0\\\x7f\u4f60", max_size=8))
def test_round_trip_a_stop_string_may_be_typed_with_escapes(text):
    assert unescape(text.encode("unicode_escape").decode()) == text
    assert unescape(text.replace("\\", "\\\\")) == text


def test_a_stop_string_with_an_escape_stops_at_the_character(model):
    options = ("--model", model, "-n", "60", "-t", "1", "--seed", "3", "--ignore-eos")
    whole = run("generate", "x", *options).stdout
    stop = next(c for c in whole[4:] if 32 < ord(c) < 0x10000)
    cut = run("generate", "x", *options, "--stop", f"\\u{ord(stop):04x}").stdout
    assert cut == as_lines(whole[: whole.index(stop)])


def test_what_is_piped_ends_with_one_newline(model, monkeypatch):
    for text, printed in (("a", "a\n"), ("a\n", "a\n"), ("a\n\n", "a\n\n"), ("", "")):
        pieces = list(text)
        monkeypatch.setattr(Model, "stream", lambda *a, pieces=pieces, **k: iter(pieces))
        assert run("generate", "x", "--model", model).stdout == printed


def test_a_random_seed_is_printed_so_that_the_text_can_be_reproduced(model):
    first = run("generate", "x", "--model", model, "-n", "20", "-t", "1")
    seed = first.stderr.rsplit("seed ", 1)[1].strip()
    assert (
        run("generate", "x", "--model", model, "-n", "20", "-t", "1", "--seed", seed).stdout
        == first.stdout
    )


def test_the_default_length_fits_the_context(model):
    # 61 of 64 positions are taken
    assert run("generate", "x" * 60, "--model", model).exit_code == 0


def test_a_prompt_has_one_source(tmp_path):
    assert read_prompt("x", None) == "x"
    (tmp_path / "p").write_text("y")
    assert read_prompt(None, tmp_path / "p") == "y"
    with pytest.raises(ValueError, match="one prompt"):
        read_prompt(None, None)


def test_kv_bits_generates_and_evaluates_with_the_kivi_cache_of_the_options(model, text_file):
    """The model's heads have 4 channels: groups of 4, and R = 8 is the least that fills
    words of 4-bit codes.
    """
    few = ("--kv-bits", "4", "--kv-group", "4", "--kv-residual", "8")
    kivi = Kivi(4, 4, 4, 8)
    loaded = load(model, "numpy")
    result = run(
        "generate", "def f(x): return x", "--model", model, "-n", "20", "--ignore-eos", *few
    )
    plain = run("generate", "def f(x): return x", "--model", model, "-n", "20", "--ignore-eos")
    assert result.stdout == as_lines(
        loaded.generate("def f(x): return x", 20, ignore_eos=True, cache=kivi)
    )
    assert "in 4-bit codes except for the newest tokens, at most 8" in result.stderr
    # 18 + 1 + 20 tokens, the last never read
    assert human(kivi.nbytes(loaded.config, 38, full=32)) in result.stderr
    assert "cache:" not in plain.stderr

    document = [Document("code.py", TEXT)]
    rng = np.random.default_rng(0)
    memory = partial(KiviAttend, kivi=kivi)
    expected = compare(
        loaded, loaded, document, rng=rng, window=64, stride=32, max_tokens=300, attend=memory
    )
    options = ("eval", "--model", model, "--text", text_file, "--max-tokens", "300", *few)
    facts = json.loads(run(*options, "--reference", model, "--json").stdout)
    assert facts["against"]["KL"]["mean"] == expected.kl.mean > 0
    assert facts["kv cache"] == {"key_bits": 4, "value_bits": 4, "group": 4, "residual": 8}
    alone = run(*options)
    assert "keys and values in 4 bits, 4 per scale, the newest 8 in full" in alone.stdout
    assert f"{expected.model.bits_per_byte:.3f}" in alone.stdout
    assert "nothing was quantised: the newest 64 tokens" in run(*options[:-1], "64").stderr
    assert "nothing was quantised" not in alone.stderr
    short = run("generate", "x", "--model", model, "-n", "3", "--ignore-eos", *few)
    assert "nothing quantised: 4 tokens fit into the full-precision window of 8" in short.stderr
    assert "cache:" not in run("generate", "x", "--model", model, "-n", "0", *few).stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kv-group", "8"], "add --kv-bits"),
        (["--kv-bits", "2"], "a head of 4 channels does not divide into groups of 32; 4 would fit"),
        (
            ["--kv-bits", "2", "--kv-group", "3"],
            "a head of 4 channels does not divide into groups of 3; 2 would fit",
        ),
        (["--kv-bits", "2", "--kv-residual", "40"], "residual 40 is no multiple of group 32"),
        (["--kv-bits", "9"], "--kv-bits"),
    ],
)
def test_cache_options_that_do_not_fit_are_rejected(model, options, message):
    for command in (["generate", "x"], ["eval"]):
        result = run(*command, "--model", model, *options)
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.split())
    tree = run("generate", "x", "--model", model, "--kv-bits", "4", "--draft", model, "--tree")
    assert tree.exit_code == 2
    assert "--tree needs a cache that keeps everything" in tree.stderr


def test_kv_keep_generates_with_the_sparse_policy_of_the_options(model):
    loaded = load(model, "numpy")  # 23 tokens
    text = "def f(x): return x + 1"
    for name, policy, held in (
        ("h2o", h2o(12), 12),
        ("tova", tova(12), 12),
        ("streaming", streaming(12), 12),
        ("recent", recent_only(12), 12),
    ):
        got = run(
            "generate",
            text,
            "--model",
            model,
            "-n",
            "20",
            "--ignore-eos",
            "--kv-keep",
            "12",
            "--kv-policy",
            name,
        )
        assert got.stdout == as_lines(loaded.generate(text, 20, ignore_eos=True, cache=policy))
        assert f"{held} of 42 tokens per key head" in got.stderr
    got = run("generate", text * 2, "--model", model, "-n", "3", "--ignore-eos", "--kv-keep", "40")
    assert got.stdout == as_lines(loaded.generate(text * 2, 3, ignore_eos=True, cache=snapkv(40)))
    assert "42 of 47 tokens per key head" in got.stderr
    for options, message in (
        (
            ["--kv-keep", "16"],
            "16 tokens do not hold the first 0 and the newest 32; raise the budget to 32",
        ),
        (["--kv-policy", "h2o"], "say how many with --kv-keep"),
        (["--kv-keep", "16", "--kv-policy", "luck"], "choose one of snapkv, h2o, tova"),
        (["--kv-keep", "16", "--kv-policy", "h2o", "--kv-bits", "4"], "choose one"),
        (["--kv-keep", "16", "--kv-policy", "h2o", "--draft", model, "--tree"], "keeps everything"),
    ):
        rejected = run("generate", "x", "--model", model, *options)
        assert rejected.exit_code == 2
        assert message in " ".join(rejected.stderr.split())


@pytest.mark.parametrize("command", ["generate", "eval"])
def test_weights_says_what_becomes_of_quantised_weights(command, tmp_path, monkeypatch):
    import refllm.api

    seen = []
    load = refllm.api.load

    def spy(*args: Any, **options: Any) -> Any:
        seen.append(options["weights"])
        return load(*args, **options)

    monkeypatch.setattr(refllm.api, "load", spy)
    given = ["x", "-n", "1"] if command == "generate" else ["--max-tokens", "8"]
    for weights in ("auto", "float", "stored"):
        assert run(command, *given, "--model", "stdlib-draft", "--weights", weights).exit_code == 0
    assert seen == ["auto", "float", "stored"]
    result = run(command, *given, "--weights", "int4")
    assert result.exit_code == 2
    assert "weights is one of auto, float, stored, got 'int4'" in result.stderr


@pytest.mark.parametrize("keep", ["1", "3", "256"])
def test_two_ways_to_a_smaller_cache_exclude_each_other_whatever_their_sizes(model, keep):
    result = run("generate", "x", "--model", model, "--kv-bits", "4", "--kv-keep", keep)
    assert result.exit_code == 2
    assert "some of them in full: choose one" in result.stderr
