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
from refllm.cli.draft_options import Speculation, draft_named
from refllm.decode.speculative.drafters import ModelDrafter, NGramDrafter
from refllm.decode.speculative.loop import Step
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
            r"\d+ of \d+ drafted tokens accepted \(\d+%; \d+% of those that were judged\)",
            drafted.stderr,
        )
        assert "tokens a step of the target" in drafted.stderr
        assert "\x1b" not in drafted.stdout
    assert "accepted" not in plain.stderr


def test_bad_settings_are_one_sentence(directory):
    model = ["x", "-m", str(directory)]
    for arguments, message in (
        (["--gamma", "3"], "say who drafts with --draft"),
        (["--draft", "nobody"], "neither a folder nor a bundled model"),
        (["--draft", "ngram", "--gamma", "0"], "gamma"),
        (["--draft", "stdlib-draft"], "vocabulary"),
        (["--draft", "ngram,stdlib-draft", "--tree"], "vocabulary"),
        (["--tree"], "say which with --draft"),
        (["--draft", "ngram", "--tree"], "n-grams are none"),
        (["--draft", "ngram,"], "with commas between them"),
    ):
        result = run(*model, *arguments)
        assert result.exit_code == 2
        assert message in result.output
    assert isinstance(draft_named("ngram", None, False, "numpy"), NGramDrafter)
    drafter = draft_named(str(directory), 3, False, "numpy")
    assert isinstance(drafter, ModelDrafter)
    assert drafter.gamma == 3
    both = draft_named(f"ngram,{directory}", None, True, "numpy")
    assert [type(one) for one in both.drafters] == [NGramDrafter, TreeDrafter]
    assert both.gamma == 8


def test_accepted_tokens_are_green_and_rejected_ones_red_and_struck_through():
    tokenizer = byte_tokenizer()
    ids = {c: tokenizer.encode(c)[0] for c in "abxyz"}
    shown = Speculation(None, tokenizer)
    for step in (
        Step([], 0, ids["a"]),
        Step([ids["b"], ids["x"]], 1, ids["y"]),
        Step([ids["z"]], 1, ids["a"]),
    ):
        shown.judged(step)
    # the stream holds characters back and gives them later, in pieces of its own
    text = "".join(shown.shown(iter(["ab", "", "yz"])))
    assert text == f"a{GREEN}b{OFF}{RED}x{OFF}y{GREEN}z{OFF}"
    assert (shown.stats.proposed, shown.stats.accepted, shown.stats.emitted) == (3, 2, 5)


def test_a_character_of_several_tokens_is_one_character():
    tokenizer = byte_tokenizer()
    first, second = tokenizer.encode("é")
    shown = Speculation(None, tokenizer)
    shown.judged(Step([first], 1, second))
    assert "".join(shown.shown(iter(["é"]))) == "é"
