"""The tour's stop for speculative decoding: the same text with several drafters, how many
steps of the target it took, and how long.

Left out: sampling (notebook 14), reliable ratios (``benchmarks/speculative.py``).
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from refllm.api import Model, load
from refllm.corpus import held_out_documents
from refllm.decode.generate import generate_tokens
from refllm.decode.sampling_params import GREEDY
from refllm.decode.speculative import loop
from refllm.decode.speculative.cascade import Cascade
from refllm.decode.speculative.interface import Drafter, check_vocabulary
from refllm.decode.speculative.model_drafter import ModelDrafter
from refllm.decode.speculative.ngram_drafter import NGramDrafter
from refllm.decode.speculative.tree_drafter import TreeDrafter
from refllm.terminal import table
from refllm.tour.context import Tour

DRAFT_MODEL = "stdlib-draft"
PROMPT_TOKENS = 160
NEW_TOKENS = 96
MODEL_GAMMA = 3  # drafted tokens per step
NGRAM_GAMMA = 8


def speculate(tour: Tour) -> None:
    """Continue held-out code greedily, with and without drafters, and compare steps and time."""
    model = tour.model
    text = "".join(d.text for d in held_out_documents())
    prompt = model.tokenizer.encode(text[: 8 * PROMPT_TOKENS])[:PROMPT_TOKENS]
    began = time.perf_counter()
    steps = generate_tokens(
        model.weights, model.config, [prompt], NEW_TOKENS, GREEDY, np.random.default_rng(0)
    )
    plain = [token for (token,) in steps]
    seconds = time.perf_counter() - began
    made = table("drafter", "steps", "tokens/step", "accepted", "ms", "speedup", "output")
    made.add_row("none", f"{NEW_TOKENS}", "1.00", "", f"{1e3 * seconds:.0f}", "1.00", "")
    for name, drafter in drafters(model, DRAFT_MODEL, tour.backend).items():
        began = time.perf_counter()
        drafted = list(
            loop.speculate(
                model.weights,
                model.config,
                prompt,
                NEW_TOKENS,
                GREEDY,
                np.random.default_rng(0),
                drafter,
            )
        )
        spent = time.perf_counter() - began
        same = [token for step in drafted for token in step.tokens] == plain
        made.add_row(
            name,
            *row(drafted, plain),
            f"{1e3 * spent:.0f}",
            f"{seconds / spent:.2f}",
            "same" if same else "near tie",
        )
    tour.out.print(made)
    tour.say()
    tour.say(
        f"{PROMPT_TOKENS} tokens of held-out code, {NEW_TOKENS} new ones, greedy. One step "
        "verifies all drafted tokens: a token is accepted if the target would have chosen "
        "it, so the output is the same however bad the drafts are (except where two "
        "logits are equal up to float32 "
        'rounding: "near tie").'
    )
    tour.say(
        "The gain depends on how predictable the text is and on the cost of a step of "
        "several tokens: on a GPU at batch 1 hardly more than a step of one token, on a "
        "CPU or in a full batch more, and speculation may be slower."
    )


def row(steps: Sequence[loop.SpeculativeStep], plain: Sequence[int]) -> tuple[str, str, str]:
    """Steps, tokens per step, accepted drafts; the first step is the prefill and has none."""
    accepted = sum(s.accepted for s in steps[1:])
    drafted = sum(len(s.drafts) for s in steps[1:])
    return f"{len(steps)}", f"{len(plain) / len(steps):.2f}", f"{accepted}/{drafted}"


def drafters(model: Model, draft: str, backend: str) -> dict[str, Drafter]:
    """Drafters by name: the draft model with a chain and with a tree, if it exists and has
    this vocabulary; both kinds in turn; n-grams.
    """
    gamma = MODEL_GAMMA
    found: dict[str, Drafter] = {}
    try:
        small = load(draft, backend)
        check_vocabulary(model, small)
        found[f"{draft}, chain of {gamma}"] = ModelDrafter(small, gamma)
        found[f"{draft}, tree of {gamma}"] = TreeDrafter(small, gamma)
        found["n-grams, then the tree"] = Cascade(NGramDrafter(gamma), TreeDrafter(small, gamma))
    except ValueError:  # there is no such model, or it has another vocabulary
        pass
    found[f"n-grams of {NGRAM_GAMMA}"] = NGramDrafter(NGRAM_GAMMA)
    return found
