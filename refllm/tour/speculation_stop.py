"""Speculation on the tour: the same text with and without drafts, how many steps it took,
and how long.

Left out: sampling (notebook 14), ratios to be relied upon (``benchmarks/speculative.py``).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from refllm.api import Model, load
from refllm.corpus import held_out_documents
from refllm.decode.generate import generate_tokens
from refllm.decode.sampling_params import GREEDY
from refllm.decode.speculative.cascade import Cascade
from refllm.decode.speculative.interface import Drafter, check_vocabulary
from refllm.decode.speculative.loop import SpeculativeStep, speculate
from refllm.decode.speculative.model_drafter import ModelDrafter
from refllm.decode.speculative.ngram_drafter import NGramDrafter
from refllm.decode.speculative.tree_drafter import TreeDrafter
from refllm.terminal import table

if TYPE_CHECKING:
    from rich.console import Console

PROMPT = 160  # tokens
NEW = 96
GAMMA = {"model": 3, "n-grams": 8}


def visit(model: Model, draft: str, backend: str, say: Callable[[str], Any], out: Console) -> None:
    """Write from a piece of held-out code, plainly and with each drafter, and say what
    differed: not the text.
    """
    text = "".join(d.text for d in held_out_documents())
    prompt = model.tokenizer.encode(text[: 8 * PROMPT])[:PROMPT]
    began = time.perf_counter()
    plain = [
        t for (t,) in generate_tokens(model.weights, model.config, [prompt], NEW, GREEDY, _rng())
    ]
    seconds = time.perf_counter() - began
    made = table(
        "who guesses",
        "steps",
        "tokens a step",
        "accepted of guessed",
        "ms",
        "times as fast",
        "the text",
    )
    made.add_row("nobody", f"{NEW}", "1.00", "", f"{1e3 * seconds:.0f}", "1.00", "")
    for name, drafter in drafters(model, draft, backend).items():
        began = time.perf_counter()
        steps = list(speculate(model.weights, model.config, prompt, NEW, GREEDY, _rng(), drafter))
        spent = time.perf_counter() - began
        same = [t for step in steps for t in step.tokens] == plain
        made.add_row(
            name,
            *row(steps, plain),
            f"{1e3 * spent:.0f}",
            f"{seconds / spent:.2f}",
            "the same" if same else "parts at a near tie",
        )
    out.print(made)
    say("")
    say(
        f"{PROMPT} tokens of held-out code, {NEW} more, greedy. A guess stays if it is the token that the model would "
        "have chosen: the text is the same, however bad the guesses are. One step checks them all."
    )
    say(
        "What that buys depends on how easily the text is guessed and on what a step of several tokens costs: on a GPU "
        "at batch 1 hardly more than one of a single token, on a processor or in a full batch more, and it may lose."
    )


def row(steps: list[SpeculativeStep], plain: list[int]) -> tuple[str, str, str]:
    """Steps, tokens a step, accepted of guessed; the prefill's token took no step."""
    accepted = sum(s.accepted for s in steps[1:])
    guessed = sum(len(s.drafts) for s in steps[1:])
    return f"{len(steps)}", f"{len(plain) / len(steps):.2f}", f"{accepted} of {guessed}"


def drafters(model: Model, draft: str, backend: str) -> dict[str, Drafter]:
    """A small model, as a chain and as a tree, if there is one of this vocabulary; n-grams;
    and both in turn.
    """
    chain = GAMMA["model"]
    ngrams = NGramDrafter(GAMMA["n-grams"])
    found: dict[str, Drafter] = {}
    try:
        small = load(draft, backend)
        check_vocabulary(model, small)
        found[f"{draft}, {chain} a step"] = ModelDrafter(small, chain)
        found[f"{draft}, trees of {chain}"] = TreeDrafter(small, chain)
        found["n-grams, else such a tree"] = Cascade(NGramDrafter(chain), TreeDrafter(small, chain))
    except ValueError:  # it is not there, or speaks another vocabulary
        pass
    found[f"n-grams of the text, {GAMMA['n-grams']} a step"] = ngrams
    return found


def _rng() -> np.random.Generator:
    return np.random.default_rng(0)
