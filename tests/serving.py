"""What the tests of serving share: a model, and the output of each request when it is served
alone, without a cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from processing import processed
from refllm.api import Model
from refllm.decode import sampling
from refllm.decode.margin import margin
from refllm.serve.request import Request
from tiny_models import tiny_model

TOLERANCE = 1e-9  # of a logit: hundreds of times what float64 sums of these sizes can differ by


@cache
def served_model(vocab: int = 257, xp: Any = np) -> Model:
    """A random network in float64 whose end token comes now and then."""
    record = tiny_model(3, xp=xp, vocab_size=vocab, max_position_embeddings=96, eos_token_ids=(5,))
    return Model(record.config, record.weights, record.tokenizer)


@cache
def last_logits(tokens: tuple[int, ...], vocab: int = 257) -> np.ndarray:
    """z[V] after some tokens, by one full forward."""
    return np.asarray(served_model(vocab).logits(list(tokens))[-1])


def alone(request: Request, index: int = 0) -> tuple[list[int], float]:
    """The output of sequence ``index`` (end token included) and how near a logit came to
    changing a token of it.

    One token after the other, each from a full forward of all tokens.
    """
    rng = np.random.default_rng(request.seed if index == 0 else [request.seed, index])
    tokens = list(request.prompt)
    nearest = np.inf
    chosen = request.sampling
    params = chosen.temperature, chosen.top_k, chosen.top_p, chosen.min_p
    for _ in range(request.max_tokens):
        z = last_logits(tuple(tokens))[None]
        output = tokens[len(request.prompt) :]
        wanted = request.output
        masked = {5, *wanted.stop_token_ids}
        z = processed(z[0], chosen, request.prompt, output, wanted.min_tokens, masked)[None]
        u = rng.random(1)
        if chosen.temperature == 0:
            token = int(z.argmax())
        else:
            token = int(sampling.sample(sampling.process_logits(z, *params), u)[0])
        nearest = min(nearest, float(margin(z, u, *params)[0]))
        tokens.append(token)
        if token in ends_of(request):
            break
    return tokens[len(request.prompt) :], nearest


def without_end(tokens: Sequence[int], request: Request) -> list[int]:
    """The tokens as outputs have them: without the end or stop token, unless it stays."""
    ended = tokens and tokens[-1] in ends_of(request)
    kept = request.output.include_stop_str_in_output
    return list(tokens[:-1] if ended and not kept else tokens)


def ends_of(request: Request) -> set[int]:
    """The tokens that end an output of the request."""
    return {*request.output.stop_token_ids, *(() if request.ignore_eos else (5,))}
