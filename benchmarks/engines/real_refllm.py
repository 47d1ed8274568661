"""refllm on a real model: ``python -m engines.real_refllm MODEL``. Besides ``generate`` it times
steps of n tokens, and a plain matrix-vector product over a matrix of the model's size.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np

from engines.decoding import Tokens, serve
from refllm.api import load
from refllm.cli.main import keep_freed_memory
from refllm.decode.fast.captured_step import make_decode_step
from refllm.kv.contiguous import ContiguousCache
from refllm.model.weight_layout import blas_threads, kernel_family

keep_freed_memory()  # as the commands do
model = load(sys.argv[1], backend="numpy", weights="float")
WIDTH = 576  # columns of the plain matrix: SmolLM2's width


def generate(prompts: Tokens, new: int) -> Tokens:
    return model.generate_batch(prompts, new, ignore_eos=True)


class Steps:
    """Steps of n new tokens of one sequence: what the verification of n − 1 drafts computes."""

    def __init__(self) -> None:
        self.step = make_decode_step(model.weights, model.config)

    def seconds(self, request: dict[str, Any]) -> dict[str, Any]:
        """{tokens, context, repeats} → the fastest of ``repeats`` steps: interruptions only add."""
        count = request["tokens"]
        context = request["context"]
        cache = ContiguousCache(model.config, 1, context + count, like=model.weights["norm"])
        rng = np.random.default_rng(0)
        for held in (cache.keys, cache.values):
            held[...] = rng.standard_normal(held.shape, dtype=np.float32)
        cache.lengths[0] = context
        tokens = rng.integers(0, model.config.vocab_size, count).tolist()
        times = []
        for _ in range(request["repeats"] + 1):  # the first one captures
            began = time.perf_counter()
            self.step(tokens, cache.positions([count]), cache.view([count]))
            times.append(time.perf_counter() - began)
        return {"seconds": min(times[1:])}


class PlainProduct:
    """W x and x W of one float32 matrix with as many elements as the model: the faster one."""

    def __init__(self) -> None:
        rows = -(-model.config.num_parameters // WIDTH)
        self.matrix = np.full((rows, WIDTH), 0.5, dtype=np.float32)  # [M, N]
        self.flat = self.matrix.reshape(WIDTH, rows)  # the same memory as [N, M]

    def seconds(self, request: dict[str, Any]) -> dict[str, Any]:
        """{repeats} → the fastest product, and the bytes that it reads."""
        x = np.ones(WIDTH, dtype=np.float32)
        times = []
        for _ in range(request["repeats"]):
            for product in (lambda: self.matrix @ x, lambda: x @ self.flat):
                began = time.perf_counter()
                product()
                times.append(time.perf_counter() - began)
        return {"seconds": min(times), "bytes": self.matrix.nbytes}


if __name__ == "__main__":
    serve(
        generate,
        {"step": Steps().seconds, "plain product": PlainProduct().seconds},
        kernels=kernel_family(),
        threads=blas_threads(),
        bytes=4 * model.config.num_parameters,
    )
