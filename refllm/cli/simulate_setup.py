"""What ``refllm simulate`` runs on: network, device, scheduler and requests, by their names on
the command line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from refllm.errors import InputError, alternatives

if TYPE_CHECKING:
    from refllm.measure.device import DeviceSpec
    from refllm.measure.roofline_clock import RooflineClock
    from refllm.model.config import ModelConfig
    from refllm.serve.base_scheduler import BaseScheduler
    from refllm.serve.request import Request
    from refllm.simulate.programs import Follow

SHAPES = ("llama-8b", "llama-70b")
# a few hundred MB of Python integers; no simulated device with more memory ever fills up
MAX_BLOCKS = 1 << 22


def model_config(name: str) -> ModelConfig:
    """The configuration of a named shape or of a checkpoint."""
    from refllm.measure import memory

    if name in SHAPES:
        return {"llama-8b": memory.LLAMA_8B, "llama-70b": memory.LLAMA_70B}[name]
    from refllm.checkpoints.sources import is_gguf, locate

    path = locate(name, more=SHAPES)
    if is_gguf(path):
        from refllm.checkpoints.gguf import read_config as read_gguf_config

        return read_gguf_config(path)
    from refllm.checkpoints.loading import read_config

    return read_config(path)


def find_device(name: str) -> DeviceSpec:
    """A known device, or this machine, measured now."""
    from refllm.measure.device import DEVICES, measure_machine

    if name == "here":
        return measure_machine()
    if name not in DEVICES:
        raise InputError(f"unknown device {name!r}; {alternatives(name, [*DEVICES, 'here'])}")
    return DEVICES[name]


def device_slots(clock: RooflineClock, device: str) -> int:
    """Tokens of keys and values that fit into the device's memory beside the weights."""
    from refllm.measure.roofline_clock import DEVICE_MEMORY

    if device not in DEVICE_MEMORY:
        raise InputError(
            f"the memory of {device!r} is not known: say how many tokens fit with --slots"
        )
    return clock.slots(0.9 * DEVICE_MEMORY[device])  # 10 % is left for activations, as servers do


def make_scheduler(
    policy: str,
    slots: int,
    block_size: int,
    *,
    prefix_cache: str | None,
    preempt: str,
    longest: int,
    max_batch_tokens: int,
    max_sequences: int,
) -> BaseScheduler:
    """The scheduler with its memory; ValueError for options that do not fit together."""
    from refllm.kv.block_pool import BlockPool
    from refllm.serve import factory
    from refllm.serve.scheduler import Scheduler
    from refllm.serve.swapping import SwappingKVManager

    if slots < block_size:
        raise InputError(
            f"{slots} slots hold no block of {block_size}: take more slots or smaller blocks"
        )
    if slots // block_size > MAX_BLOCKS:
        raise InputError(
            f"{slots:,} slots in blocks of {block_size} exceed the limit of {MAX_BLOCKS:,} "
            "simulated blocks: take fewer slots or larger blocks"
        )
    pool = BlockPool(slots // block_size, block_size)
    if preempt not in ("recompute", "swap"):
        raise InputError(f"unknown preemption mode {preempt!r}; choose recompute or swap")
    if preempt == "swap":
        if prefix_cache is not None or policy not in factory.CONTINUOUS:
            raise InputError(
                "--preempt swap goes with fcfs, priority or lpm, and without a prefix cache"
            )
        return Scheduler(
            SwappingKVManager(pool),
            order=policy,
            max_batch_tokens=max_batch_tokens,
            max_sequences=max_sequences,
        )
    return factory.make(
        policy,
        pool,
        prefix_cache=prefix_cache,
        longest=longest,
        max_batch_tokens=max_batch_tokens,
        max_sequences=max_sequences,
    )


def make_workload(
    name: str, count: int, rate: float | None, shape: float, seed: int
) -> tuple[Iterable[Request], Follow | None]:
    """The requests of a traffic or program, and what a program sends after an answer."""
    import numpy as np

    from refllm.simulate import programs
    from refllm.simulate.workload import TRAFFIC, DistinctTokens, requests

    rng = np.random.default_rng(seed)
    tokens = DistinctTokens()
    if name in TRAFFIC:
        if rate is None:
            rate = math.inf
        return requests(TRAFFIC[name], count, rng, rate=rate, shape=shape), None
    makers: dict[str, Callable[[], programs.Program]] = {
        "few-shot": lambda: programs.few_shot(tokens, count),
        "self-consistency": lambda: programs.self_consistency(tokens, count),
        "chat": lambda: programs.chat(tokens, count),
        "tree": lambda: programs.tree_of_thought(tokens, count),
        "rag": lambda: programs.rag(tokens, count, rng),
        "unique": lambda: programs.unique(tokens, count),
    }
    if name not in makers:
        known = [*TRAFFIC, *makers]
        raise InputError(f"unknown traffic {name!r}; {alternatives(name, known)}")
    if rate not in (None, math.inf):
        raise InputError(
            f"--rate is for traffic: the requests of {name} come together, and after answers"
        )
    program = makers[name]()
    return program.requests, program.follow
