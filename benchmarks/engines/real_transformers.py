"""transformers' ``generate``, greedy, float32: ``python -m engines.real_transformers MODEL``, a
GGUF file, which it dequantises, or a directory.

As ``decode_transformers``; of the two caches each shape of a batch uses the one that is faster
in a first trial.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from pathlib import Path

import torch
import transformers

from engines.decoding import Tokens, serve

warnings.filterwarnings("ignore")
transformers.logging.set_verbosity_error()
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
torch.set_num_interop_threads(1)
path = Path(sys.argv[1])
options = {"gguf_file": path.name} if path.is_file() else {}
model = transformers.AutoModelForCausalLM.from_pretrained(
    path.parent if path.is_file() else path,
    dtype=torch.float32,
    attn_implementation="sdpa",
    **options,
).eval()
model.generation_config.eos_token_id = None
model.generation_config.pad_token_id = 0
model.generation_config.disable_compile = True  # the static cache would compile on its own
CACHES = (None, "static")  # None: the cache grows with each token
fastest: dict[tuple[int, int, int], str | None] = {}  # by sequences, prompt and new tokens


def generate(prompts: Tokens, new: int) -> Tokens:
    shape = (len(prompts), len(prompts[0]), new)
    if shape not in fastest:
        times = {}
        for cache in CACHES:
            _generate(prompts, 1, cache)
            began = time.perf_counter()
            _generate(prompts, new, cache)
            times[cache] = time.perf_counter() - began
        fastest[shape] = min(times, key=lambda cache: times[cache])
    return _generate(prompts, new, fastest[shape])


def _generate(prompts: Tokens, new: int, cache: str | None) -> Tokens:
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            use_cache=True,
            cache_implementation=cache,
        )
    tokens: Tokens = out[:, ids.shape[1] :].tolist()
    return tokens


if __name__ == "__main__":
    serve(generate, threads=torch.get_num_threads())
