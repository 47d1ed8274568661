"""Training from scratch: initial weights, batches, data-parallel steps, checkpoint and resume.

A step is: split the batch over worker threads, take loss and gradients of each share, average, clip, AdamW.
Two Python threads with half a batch each and one BLAS thread per product are as fast as two BLAS threads
are slow: NumPy releases the interpreter lock inside products and ufuncs. On CuPy one worker is used.

The batch of step i depends on (seed, i) alone, so a resumed run sees what an unbroken one would have seen.

Left out: mixed precision, several devices, sequence packing by document (windows are cut from the
concatenated stream, documents separated by ``<|endoftext|>``).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from threadpoolctl import threadpool_limits

from refllm.backend import Array, asarray_like, namespace, to_numpy
from refllm.model.backward import Teacher, loss_and_gradients, mean_loss
from refllm.model.config import ModelConfig
from refllm.model.optimizer import AdamW, clip_by_global_norm, learning_rate

Tensors = dict[str, Array]


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one batch shape and one mixture of streams.

    ``repeats[j]`` is how often stream j is passed through in one epoch of the mixture; 0 leaves it out.
    """

    steps: int
    batch: int
    length: int
    repeats: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class Plan:
    """Everything that decides a run except the data and the network's shape."""

    phases: tuple[Phase, ...]
    peak_rate: float = 3e-3
    warmup: int = 100
    schedule: str = "cosine"
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    workers: int = 2
    evaluate_every: int = 200
    save_every: int = 500

    @property
    def steps(self) -> int:
        return sum(p.steps for p in self.phases)


@dataclass
class State:
    """What a checkpoint holds: parameters, moments, steps done and the curve so far."""

    params: Tensors
    optimizer: AdamW
    curve: list[dict[str, float]] = field(default_factory=list)


def initialize(config: ModelConfig, rng: np.random.Generator) -> Tensors:
    """Random float32 parameters under Hugging Face's names: normal(0, 0.02), norms 1.

    The two projections that write into the residual stream are smaller by √(2L) (GPT-2's rule), so that the
    stream's variance at the last layer does not grow with depth.
    """
    n, d, f = config.hidden_size, config.head_dim, config.intermediate_size
    h, g = config.num_attention_heads, config.num_key_value_heads
    residual = 1.0 / math.sqrt(2 * config.num_hidden_layers)
    shapes: dict[str, tuple[tuple[int, ...], float]] = {
        "model.embed_tokens.weight": ((config.vocab_size, n), 1.0)
    }
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}."
        shapes |= {
            at + "input_layernorm.weight": ((n,), 0.0),
            at + "self_attn.q_proj.weight": ((h * d, n), 1.0),
            at + "self_attn.k_proj.weight": ((g * d, n), 1.0),
            at + "self_attn.v_proj.weight": ((g * d, n), 1.0),
            at + "self_attn.o_proj.weight": ((n, h * d), residual),
            at + "post_attention_layernorm.weight": ((n,), 0.0),
            at + "mlp.gate_proj.weight": ((f, n), 1.0),
            at + "mlp.up_proj.weight": ((f, n), 1.0),
            at + "mlp.down_proj.weight": ((n, f), residual),
        }
    shapes["model.norm.weight"] = ((n,), 0.0)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = ((config.vocab_size, n), 1.0)
    return {
        name: np.ones(shape, np.float32)
        if scale == 0.0
        else (0.02 * scale * rng.standard_normal(shape)).astype(np.float32)
        for name, (shape, scale) in shapes.items()
    }


def window_starts(lengths: Sequence[int], phase: Phase, rng: np.random.Generator) -> list[tuple[int, int]]:
    """(stream, offset) of every window of a phase, in training order.

    Each epoch cuts each stream at a fresh random offset into windows that do not overlap (each target is
    seen once a pass) and shuffles them all.
    """
    wanted = phase.steps * phase.batch
    starts: list[tuple[int, int]] = []
    while len(starts) < wanted:
        epoch: list[tuple[int, int]] = []
        for stream, (count, repeats) in enumerate(zip(lengths, phase.repeats, strict=True)):
            for _ in range(repeats):
                spare = count - 1 - phase.length
                if spare < 0:
                    raise ValueError(f"stream {stream} has {count} tokens: too few for windows of {phase.length}")
                first = int(rng.integers(0, min(phase.length, spare + 1)))
                epoch += [(stream, at) for at in range(first, count - phase.length, phase.length)]
        if not epoch:
            raise ValueError("every stream is left out: a phase needs at least one repeat above zero")
        starts += [epoch[i] for i in rng.permutation(len(epoch))]
    return starts[:wanted]


def train(
    config: ModelConfig,
    streams: Sequence[np.ndarray],
    plan: Plan,
    output: Path,
    *,
    like: Array | None = None,
    held_out: np.ndarray | None = None,
    teacher: Teacher | None = None,
    report: Callable[[dict[str, float]], None] = lambda record: None,
) -> State:
    """Train a network from random weights, or from the checkpoint in ``output`` if there is one.

    ``streams`` are 1-D integer token arrays, mixed as ``Phase.repeats`` says. ``like`` is any array of the
    library to train on (default NumPy). ``teacher(tokens[B, S+1])`` returns a function of rows that gives the
    target distribution (see ``distill``). ``report`` is called with the record of each evaluation.
    """
    output.mkdir(parents=True, exist_ok=True)
    state = _resume(output / "state.safetensors", config, plan)
    if like is not None:
        move = lambda tensors: {k: asarray_like(v, like) for k, v in tensors.items()}  # noqa: E731
        state.params = move(state.params)
        state.optimizer.m, state.optimizer.v = move(state.optimizer.m), move(state.optimizer.v)
    workers = plan.workers if namespace(*state.params.values()) is np else 1
    step, began = 0, time.perf_counter()
    with threadpool_limits(limits=1 if workers > 1 else None), ThreadPoolExecutor(workers) as pool:
        for number, phase in enumerate(plan.phases):
            if state.optimizer.step >= step + phase.steps:
                step += phase.steps
                continue
            rng = np.random.default_rng([plan.seed, 1, number])
            starts = window_starts([len(s) for s in streams], phase, rng)
            for i in range(phase.steps):
                if state.optimizer.step >= step + 1:
                    step += 1
                    continue
                tokens = np.stack(
                    [streams[s][a : a + phase.length + 1] for s, a in starts[i * phase.batch : (i + 1) * phase.batch]]
                )
                loss, grads = _data_parallel(state.params, config, tokens, workers, pool, teacher)
                norm = clip_by_global_norm(grads, plan.clip)
                if not math.isfinite(loss + norm):
                    raise FloatingPointError(f"step {step}: loss {loss}, gradient norm {norm}: lower the rate")
                rate = learning_rate(
                    step, peak=plan.peak_rate, warmup=plan.warmup, total=plan.steps, schedule=plan.schedule
                )
                state.optimizer.update(state.params, grads, rate)
                step += 1
                if step % plan.evaluate_every == 0 or step == plan.steps:
                    record = {"step": step, "loss": loss, "norm": norm, "rate": rate,
                              "seconds": time.perf_counter() - began}  # fmt: skip
                    if held_out is not None:
                        record["held_out"] = _evaluate(state.params, config, held_out, phase.length)
                    state.curve.append(record)
                    report(record)
                if step % plan.save_every == 0 or step == plan.steps:
                    save_state(state, output / "state.safetensors", config, plan)
    return state


def _data_parallel(
    params: Tensors, config: ModelConfig, tokens: np.ndarray, workers: int, pool: ThreadPoolExecutor, teacher: Teacher | None
) -> tuple[float, Tensors]:
    """Loss and gradients averaged over equal shares of the batch, one share a thread."""
    workers = math.gcd(workers, len(tokens))
    like = next(iter(params.values()))

    def share(part: np.ndarray) -> tuple[float, Tensors]:
        on_device = asarray_like(part, like)
        target = None if teacher is None else teacher(on_device)
        return loss_and_gradients(params, config, on_device, target)

    losses, grads = zip(*pool.map(share, np.split(tokens, workers)), strict=True)
    total: Tensors = grads[0]
    for name, g in total.items():
        for other in grads[1:]:
            g += other[name]
        g *= 1.0 / workers
    return sum(losses) / workers, total


def _evaluate(params: Tensors, config: ModelConfig, tokens: np.ndarray, length: int, windows: int = 32) -> float:
    """Mean nats per token over evenly spread windows of ``length`` (a quick look, not the reported figure)."""
    spread = np.linspace(0, len(tokens) - length - 1, max(1, windows * 256 // length)).astype(int)
    batch = np.stack([tokens[a : a + length + 1] for a in spread])
    like = next(iter(params.values()))
    losses = [mean_loss(params, config, asarray_like(part[None], like)) for part in batch]
    return sum(losses) / len(losses)


def save_state(state: State, path: Path, config: ModelConfig, plan: Plan) -> None:
    """Write a checkpoint under a temporary name, then rename it: a kill leaves the old one whole."""
    tensors = {f"{kind}.{name}": np.ascontiguousarray(to_numpy(t))
               for kind, group in (("w", state.params), ("m", state.optimizer.m), ("v", state.optimizer.v))
               for name, t in group.items()}  # fmt: skip
    about = {"step": str(state.optimizer.step), "curve": json.dumps(state.curve),
             "config": json.dumps(config.to_hf()), "plan": json.dumps(asdict(plan))}  # fmt: skip
    temporary = path.with_suffix(".partial")
    save_file(tensors, temporary, metadata=about)
    os.replace(temporary, path)


def load_state(path: Path) -> tuple[State, dict[str, str]]:
    """Read a checkpoint; the second value is its metadata (step, curve, config, plan)."""
    groups: dict[str, Tensors] = {"w": {}, "m": {}, "v": {}}
    with safe_open(path, framework="numpy") as file:
        about = file.metadata() or {}
        for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            kind, name = key.split(".", 1)
            groups[kind][name] = file.get_tensor(key)
    optimizer = AdamW(step=int(about["step"]), m=groups["m"], v=groups["v"])
    return State(groups["w"], optimizer, json.loads(about["curve"])), about


def _resume(path: Path, config: ModelConfig, plan: Plan) -> State:
    if not path.exists():
        params = initialize(config, np.random.default_rng([plan.seed, 0]))
        return State(params, AdamW(weight_decay=plan.weight_decay))
    state, about = load_state(path)
    if json.loads(about["config"]) != json.loads(json.dumps(config.to_hf())):
        raise ValueError(f"{path} is a checkpoint of another network; choose another output folder")
    state.optimizer.weight_decay = plan.weight_decay
    return state
