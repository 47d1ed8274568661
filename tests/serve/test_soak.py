"""A short run of ``tests/soak.py``, which ``make soak`` runs in full."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

import soak
from refllm.decode.constraint import ConstraintStates
from refllm.errors import InputError
from refllm.kv.block_pool import BlockPool
from refllm.serve.outputs import RequestOutput


@pytest.mark.theorem(
    "However requests are mixed, aborted and made to fail, each ends once, those that are "
    "compared get the outputs that they get alone, and every block is free at the end",
    source="tests/soak.py",
)
def test_conservation_a_short_soak(capsys):
    counts = soak.soak(250, sample=0.2, traced=False)
    seen: Counter[str] = Counter()
    for one in counts:
        assert one.submitted == 50
        seen += one.ended + one.errors + one.work
        seen["compared"] += one.compared
    for what in (
        "stop",
        "length",
        "abort",
        "callback",
        "logits",
        "preemptions",
        "cached",
        "copies",
        "grammar",
        "constrained",
        "jumped",
    ):
        assert seen[what] > 0, what
    assert seen["compared"] > 30
    assert capsys.readouterr().out.count("errors") == len(soak.ENGINES)


@pytest.mark.parametrize("fault", ["a leak", "a wrong token", "a lost request", "no mask"])
def test_the_soak_notices(monkeypatch, fault):
    if fault == "a leak":
        free = BlockPool.free
        monkeypatch.setattr(
            BlockPool, "free", lambda pool, block: None if block == 3 else free(pool, block)
        )
    elif fault == "a wrong token":
        take = soak.Soak.take

        def changed(one: soak.Soak, result: RequestOutput) -> None:
            if result.request.request_id in (7, 8, 9) and result.tokens:
                result.tokens[-1] ^= 1
            take(one, result)

        monkeypatch.setattr(soak.Soak, "take", changed)
    elif fault == "no mask":
        everything = lambda states, output: np.ones(states.vocabulary, bool)  # noqa: E731
        monkeypatch.setattr(ConstraintStates, "mask", everything)
    else:
        monkeypatch.setattr(soak.Engine, "abort", lambda engine, name: True)
    with pytest.raises((AssertionError, InputError)):
        soak.soak(150, sample=1.0, traced=False)
