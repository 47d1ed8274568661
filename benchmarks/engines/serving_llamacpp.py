"""llama.cpp's continuous batching, greedy, float32: ``python -m engines.serving_llamacpp
DIRECTORY``.

The loop of llama.cpp's server over its C interface: sequences are slots; in every step each
sequence that answers brings its last token, the others what of their prompts still fits
into the batch; who ends gives his slot, and its keys and values, to the next in the queue.
The network and its cache are those of ``decode_llamacpp``.

Left out: prompts that share a prefix, a cache that is shifted or defragmented, sampling
other than greedy.
"""

from __future__ import annotations

import sys
import tempfile
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_cpp

from engines.decode_llamacpp import Engine, put, write_gguf
from engines.decoding import Tokens, serve

BUDGET = 2048  # tokens per step, as in refllm's engine and llama.cpp's server


@dataclass
class Sequence:
    """A request in its slot: its tokens, how many are computed, and its output."""

    request: int
    tokens: list[int]
    computed: int = 0
    output: list[int] = field(default_factory=list)


class Server(Engine):
    """Serves all requests of a call; at most ``slots`` of them at a time (None: all)."""

    def generate(
        self, prompts: Tokens, new: int, slots: int | None = None, budget: int = BUDGET
    ) -> Tokens:
        count = min(slots or len(prompts), len(prompts))
        context = self.context(count, max(len(prompt) for prompt in prompts) + new)
        memory = llama_cpp.llama_get_memory(context)
        llama_cpp.llama_memory_clear(memory, True)
        batch = llama_cpp.llama_batch_init(budget, 0, 1)
        waiting = deque(Sequence(i, list(prompt)) for i, prompt in enumerate(prompts))
        running: dict[int, Sequence] = {}
        answers: Tokens = [[] for _ in prompts]
        while waiting or running:
            for slot in range(count):
                if waiting and slot not in running:
                    running[slot] = waiting.popleft()
            for slot in self.step(context, batch, running, budget):
                running[slot].output.append(running[slot].tokens[-1])
                if len(running[slot].output) == new:
                    llama_cpp.llama_memory_seq_rm(memory, slot, -1, -1)
                    ended = running.pop(slot)
                    answers[ended.request] = ended.output
        llama_cpp.llama_batch_free(batch)
        return answers

    def step(
        self, context: Any, batch: Any, running: dict[int, Sequence], budget: int
    ) -> list[int]:
        """One batch, those who answer first; returns the slots of those who got a token,
        their last one now.
        """
        batch.n_tokens = 0
        sampled = []
        for slot, sequence in sorted(
            running.items(), key=lambda one: len(one[1].tokens) - one[1].computed > 1
        ):
            first = sequence.computed
            tokens = sequence.tokens[first : first + budget - batch.n_tokens]
            if not tokens:
                continue
            sequence.computed += len(tokens)
            samples = sequence.computed == len(sequence.tokens)
            put(batch, slot, first, tokens, samples)
            if samples:
                sampled.append(slot)
        best = self.decode(context, batch, len(sampled))
        for slot, token in zip(sampled, best, strict=True):
            running[slot].tokens.append(token)
        return sampled


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        write_gguf(sys.argv[1], file)
        serve(Server(file).generate)
