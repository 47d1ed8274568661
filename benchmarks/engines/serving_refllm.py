"""refllm's serving engine, greedy: ``python -m engines.serving_refllm DIRECTORY``.

Every request of a call is submitted at once; the engine is a new one each time, so no
prefix is cached from before.
"""

from __future__ import annotations

import sys

from engines.decoding import Tokens, serve
from refllm.api import load
from refllm.cli.main import keep_freed_memory
from refllm.serve.engine import Engine
from refllm.serve.request import Request

keep_freed_memory()  # as the commands do
model = load(sys.argv[1], backend="numpy")


def generate(prompts: Tokens, new: int) -> Tokens:
    blocks = sum(-(-(len(prompt) + new) // 16) for prompt in prompts)
    engine = Engine(model, num_blocks=blocks, max_sequences=len(prompts))
    names = [engine.submit(Request(prompt, new, ignore_eos=True)) for prompt in prompts]
    results = engine.run()
    return [results[name].tokens for name in names]


if __name__ == "__main__":
    serve(generate)
