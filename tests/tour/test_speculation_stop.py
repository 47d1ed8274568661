"""The tour's stop for speculation: the rows of its table, and a model whose vocabulary no
draft model shares.
"""

from __future__ import annotations

import io
import re

from rich.console import Console

from refllm.decode.speculative.cascade import Cascade
from refllm.decode.speculative.loop import SpeculativeStep
from refllm.decode.speculative.model_drafter import ModelDrafter
from refllm.decode.speculative.ngram_drafter import NGramDrafter
from refllm.decode.speculative.tree_drafter import TreeDrafter
from refllm.tour import speculation_stop
from refllm.tour.context import Tour
from tiny_models import tiny_model


def test_a_row_counts_steps_and_drafts():
    steps = [SpeculativeStep([], 0, 1), SpeculativeStep([2, 3], 1, 4), SpeculativeStep([5], 1, 6)]
    assert speculation_stop.row(steps, [1, 2, 4, 5, 6]) == ("3", "1.67", "2/3")


def test_a_model_of_another_vocabulary_gets_ngrams_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(speculation_stop, "NEW_TOKENS", 12)
    monkeypatch.setattr(speculation_stop, "PROMPT_TOKENS", 24)
    model = tiny_model()
    out = Console(file=io.StringIO(), width=10_000)
    assert [
        type(d) for d in speculation_stop.drafters(model, "stdlib-draft", "numpy").values()
    ] == [NGramDrafter]
    assert [
        type(d) for d in speculation_stop.drafters(model, "no such model", "numpy").values()
    ] == [NGramDrafter]
    tour = Tour("tiny", "numpy", tmp_path, out)
    tour.__dict__["model"] = model
    speculation_stop.speculate(tour)
    text = out.file.getvalue()
    assert re.search(r"n-grams of 8 .* same$", text, flags=re.MULTILINE)
    assert "24 tokens of held-out code, 12 new ones" in text


def test_the_bundled_models_draft_for_each_other():
    from refllm.api import load

    found = speculation_stop.drafters(load("stdlib"), "stdlib-draft", "numpy")
    assert [type(d) for d in found.values()] == [ModelDrafter, TreeDrafter, Cascade, NGramDrafter]
