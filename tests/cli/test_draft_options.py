"""``refllm generate --draft``: the same text, statistics, colours on a terminal and nothing
but text elsewhere.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from refllm.checkpoints.writer import save
from refllm.cli import app
from refllm.cli.draft_options import DraftDisplay, drafter_from_options
from refllm.decode.speculative.loop import SpeculativeStep
from refllm.decode.speculative.model_drafter import ModelDrafter
from refllm.decode.speculative.ngram_drafter import NGramDrafter
from refllm.decode.speculative.tree_drafter import TreeDrafter
from tiny_models import byte_tokenizer, tiny_config, tiny_params

RED = "\x1b[31m\x1b[9m"
GREEN = "\x1b[32m"
OFF = "\x1b[0m"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    config = tiny_config(max_position_embeddings=256, eos_token_ids=())
    save(path, config, tiny_params(config, 0, "float32"), byte_tokenizer(), dtype="float32")
    return path


def run(*arguments: str):
    return CliRunner().invoke(app, ["generate", *arguments])


def test_the_text_is_the_same_with_a_draft_model_and_with_ngrams(directory):
    common = ["x = x = x", "-m", str(directory), "-n", "40"]
    plain = run(*common)
    for draft, more in (
        (str(directory), []),
        ("ngram", []),
        (str(directory), ["--tree"]),
        (f"ngram, {directory}", []),
    ):
        drafted = run(*common, "--draft", draft, "--gamma", "3", *more)
        assert drafted.exit_code == 0, drafted.output
        assert drafted.stdout == plain.stdout
        assert re.search(
            r"\d+ of \d+ drafted tokens accepted \(\d+%; \d+% of those that were verified\)",
            drafted.stderr,
        )
        assert "tokens per target step" in drafted.stderr
        assert "\x1b" not in drafted.stdout
    assert "accepted" not in plain.stderr


def test_bad_settings_are_one_sentence(directory):
    model = ["x", "-m", str(directory)]
    for arguments, message in (
        (["--gamma", "3"], "add --draft"),
        (["--draft", "nobody"], "neither a folder nor a bundled model"),
        (["--draft", "ngram", "--gamma", "0"], "gamma"),
        (["--draft", "stdlib-draft"], "vocabulary"),
        (["--draft", "ngram,stdlib-draft", "--tree"], "vocabulary"),
        (["--tree"], "name the model with --draft"),
        (["--draft", "ngram", "--tree"], "ngram is none"),
        (["--draft", "ngram,"], "separated by commas"),
    ):
        result = run(*model, *arguments)
        assert result.exit_code == 2
        assert message in result.output
    assert isinstance(drafter_from_options("ngram", None, False, "numpy"), NGramDrafter)
    drafter = drafter_from_options(str(directory), 3, False, "numpy")
    assert isinstance(drafter, ModelDrafter)
    assert drafter.gamma == 3
    both = drafter_from_options(f"ngram,{directory}", None, True, "numpy")
    assert [type(one) for one in both.drafters] == [NGramDrafter, TreeDrafter]
    assert both.gamma == 8


def test_accepted_tokens_are_green_and_rejected_ones_red_and_struck_through():
    tokenizer = byte_tokenizer()
    ids = {c: tokenizer.encode(c)[0] for c in "abxyz"}
    display = DraftDisplay(tokenizer)
    for step in (
        SpeculativeStep([], 0, ids["a"]),
        SpeculativeStep([ids["b"], ids["x"]], 1, ids["y"]),
        SpeculativeStep([ids["z"]], 1, ids["a"]),
    ):
        display.record(step)
    # the stream holds characters back and gives them later, in pieces of its own
    text = "".join(display.coloured(iter(["ab", "", "yz"])))
    assert text == f"a{GREEN}b{OFF}{RED}x{OFF}y{GREEN}z{OFF}"
    assert (display.stats.proposed, display.stats.accepted, display.stats.emitted) == (3, 2, 5)


def test_a_character_of_several_tokens_is_one_character():
    tokenizer = byte_tokenizer()
    first, second = tokenizer.encode("é")
    display = DraftDisplay(tokenizer)
    display.record(SpeculativeStep([first], 1, second))
    assert "".join(display.coloured(iter(["é"]))) == "é"
