"""refllm, greedy: ``python -m engines.decode_refllm DIRECTORY``."""

from __future__ import annotations

import sys

from engines.decoding import Tokens, serve
from refllm.api import load
from refllm.cli.main import keep_freed_memory

keep_freed_memory()  # as the commands do
model = load(sys.argv[1], backend="numpy")


def generate(prompts: Tokens, new: int) -> Tokens:
    return model.generate_batch(prompts, new, ignore_eos=True)


if __name__ == "__main__":
    serve(generate)
