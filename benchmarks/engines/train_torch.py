"""PyTorch, eager, on the same network, weights and batches: ``python -m
engines.train_torch``.

transformers' ``LlamaForCausalLM`` with scaled-dot-product attention, cross-entropy over
float32 logits, gradient clipping and the fused AdamW: what a user gets on a CPU without a
compiler.

Left out: ``torch.compile``, bfloat16 autocast.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import transformers
from common import Channel

from engines.training import Task
from refllm.train.loop import initialize
from refllm.train.optimizer import learning_rate
from refllm.train.schedule import batches


def build(task: Task) -> Any:
    """The network with refllm's initial weights."""
    config = transformers.LlamaConfig(**task.network, attn_implementation="sdpa", use_cache=False)
    model = transformers.LlamaForCausalLM(config).to(torch.float32).train()
    tensors = initialize(task.config(), np.random.default_rng([task.seed, 0]))
    missing = model.load_state_dict(
        {name: torch.from_numpy(t) for name, t in tensors.items()}, strict=False
    )
    # the tied head is the embedding
    if set(missing.missing_keys) - {"lm_head.weight"} or missing.unexpected_keys:
        raise SystemExit(f"the two networks have different tensors: {missing}")
    return model


def losses(task: Task) -> Iterator[float]:
    """One optimizer step each, as ``refllm.train.loop`` takes it."""
    model = build(task)
    plan = task.plan()
    stream = task.stream()
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups = [
        {"params": matrices, "weight_decay": plan.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)
    for step, phase, windows in batches(plan, [len(stream)]):
        tokens = torch.from_numpy(
            np.stack([stream[a : a + phase.length + 1] for _, a in windows]).astype(np.int64)
        )
        rate = learning_rate(
            step, peak=plan.peak_rate, warmup=plan.warmup, total=plan.steps, schedule=plan.schedule
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        logits = model(input_ids=tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
        optimizer.step()
        yield loss.item()


def main() -> None:
    transformers.logging.set_verbosity_error()
    channel = Channel()
    channel.send()
    request = channel.receive()
    if request is None:
        return
    task = Task(**request)
    torch.set_num_threads(task.workers)
    steps = losses(task)
    while request is not None:
        began = time.perf_counter()
        for _ in range(task.turn):
            loss = next(steps)
        channel.send(rate=task.tokens_per_turn / (time.perf_counter() - began), loss=loss)
        request = channel.receive()


if __name__ == "__main__":
    main()
