"""The tour's last stop: a real pretrained chat model, where it is installed.

Left out: everything else that can be measured with it (``notebooks/``, ``benchmarks/``).
"""

from __future__ import annotations

import time

from refllm.api import load
from refllm.checkpoints.sources import SMOLLM2, locate
from refllm.checkpoints.tensor_files import CheckpointError
from refllm.measure.latency import Stopwatch
from refllm.terminal import printable
from refllm.tour.context import Tour

QUESTIONS = ("What is the capital of France?", "And of Germany?")
ANSWER_TOKENS = 60


def chat(tour: Tour) -> None:
    """Ask SmolLM2 two questions; where it is not installed, say how to."""
    try:
        locate(SMOLLM2)
    except CheckpointError:
        tour.say(
            "So far the model was small enough to come along. `make chat` downloads a real one, "
            "SmolLM2-135M-Instruct (93 MB), and opens a chat with it."
        )
        return
    began = time.perf_counter()
    model = load(SMOLLM2, tour.backend)
    seconds = time.perf_counter() - began
    tour.say(
        f"SmolLM2-135M-Instruct, {model.config.num_parameters:,} parameters, loaded in "
        f"{seconds:.1f} s: {model.storage}."
    )
    conversation = model.conversation()
    for question in QUESTIONS:
        watch = Stopwatch()
        tour.out.print(f"\n> {question}", style="dim")
        for piece in conversation.say(question, ANSWER_TOKENS, on_token=watch.tick):
            tour.out.print(printable(piece), end="", soft_wrap=True)
        tour.say()
        tour.say(
            f"{conversation.computed} tokens read in {watch.ttft:.2f} s"
            + (f" ({conversation.reused} were in the cache)" if conversation.reused else "")
            + f", then {watch.tokens_per_second:,.0f} tokens/s on one thread."
        )
    tour.say("\n`refllm chat` goes on with it.")
