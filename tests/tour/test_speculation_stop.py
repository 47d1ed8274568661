"""The tour's stop for speculation: the rows of its table, and a model for which nobody can
draft but n-grams.
"""

from __future__ import annotations

import io

from rich.console import Console

from refllm.decode.speculative.cascade import Cascade
from refllm.decode.speculative.loop import SpeculativeStep
from refllm.decode.speculative.model_drafter import ModelDrafter
from refllm.decode.speculative.ngram_drafter import NGramDrafter
from refllm.decode.speculative.tree_drafter import TreeDrafter
from refllm.tour import speculation
from tiny_models import tiny_model


def test_a_row_counts_steps_and_drafts():
    steps = [SpeculativeStep([], 0, 1), SpeculativeStep([2, 3], 1, 4), SpeculativeStep([5], 1, 6)]
    assert speculation.row(steps, [1, 2, 4, 5, 6]) == ("3", "1.67", "2 of 3")


def test_a_model_of_another_vocabulary_gets_ngrams_alone(monkeypatch):
    monkeypatch.setattr(speculation, "NEW", 12)
    monkeypatch.setattr(speculation, "PROMPT", 24)
    model = tiny_model()
    out = Console(file=io.StringIO(), width=10_000)
    assert [type(d) for d in speculation.drafters(model, "stdlib-draft", "numpy").values()] == [
        NGramDrafter
    ]
    assert [type(d) for d in speculation.drafters(model, "no such model", "numpy").values()] == [
        NGramDrafter
    ]
    said: list[str] = []
    speculation.visit(model, "stdlib-draft", "numpy", said.append, out)
    text = out.file.getvalue()
    assert "the same" in text
    assert "n-grams of the text, 8 a step" in text
    assert any("24 tokens of held-out code, 12 more" in line for line in said)


def test_the_bundled_models_draft_for_each_other():
    from refllm.api import load

    found = speculation.drafters(load("stdlib"), "stdlib-draft", "numpy")
    assert [type(d) for d in found.values()] == [ModelDrafter, TreeDrafter, Cascade, NGramDrafter]
