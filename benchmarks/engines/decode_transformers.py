"""transformers' ``generate``, greedy: ``python -m engines.decode_transformers DIRECTORY
dynamic|static``.

As fast as the library's own settings make it without a compiler: float32,
scaled-dot-product attention, inference mode, no padding (all prompts are equally long), no
end token to look for. ``dynamic`` grows the cache with each token, ``static`` preallocates
it.

Left out: ``torch.compile``, IPEX and other plug-ins.
"""

from __future__ import annotations

import sys
import warnings

import torch
import transformers

from engines.decoding import Tokens, serve

warnings.filterwarnings("ignore")
transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
torch.set_num_interop_threads(1)
path, cache = sys.argv[1:3]
model = transformers.AutoModelForCausalLM.from_pretrained(
    path, dtype=torch.float32, attn_implementation="sdpa"
).eval()
model.generation_config.eos_token_id = None
model.generation_config.pad_token_id = 0
model.generation_config.disable_compile = True  # the static cache would compile on its own


def generate(prompts: Tokens, new: int) -> Tokens:
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            use_cache=True,
            cache_implementation="static" if cache == "static" else None,
        )
    tokens: Tokens = out[:, ids.shape[1] :].tolist()
    return tokens


if __name__ == "__main__":
    serve(generate)
