"""Training from scratch: initial weights, data-parallel steps, checkpoint and resume.

A step is: split the batch over worker threads, take loss and gradients of each share,
average, clip, AdamW. Two Python threads with half a batch each and one BLAS thread per
product beat two BLAS threads on the whole batch: NumPy releases the interpreter lock inside
products and ufuncs, and elementwise work is shared too. On CuPy one worker is used.

| symbol | name                                        | shape      |
|--------|---------------------------------------------|------------|
| B, S   | windows in a batch, predictions in a window | (``plan``) |
| tokens | a batch: inputs and answers                 | [B, S+1]   |
| rate   | AdamW's learning rate at a step             | scalar     |

A run that is resumed with the same plan ends with the bits of an unbroken one (see
``state``).

Left out: mixed precision, several devices.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from refllm.backend import Array, asarray_like, namespace
from refllm.model.config import ModelConfig
from refllm.train.backward import PLAIN, Product, loss_and_gradients, mean_loss
from refllm.train.loss import Teacher
from refllm.train.optimizer import Each, clip_by_global_norm, learning_rate, optimizer
from refllm.train.schedule import Phase, Plan, batches
from refllm.train.state import State, load_state, save_state

__all__ = ["Phase", "Plan", "State", "initialize", "load_state", "save_state", "train"]

Tensors = dict[str, Array]
TokenArray = NDArray[np.integer[Any]]  # host memory: the data plane begins at the batch


def initialize(config: ModelConfig, rng: np.random.Generator) -> Tensors:
    """Random float32 parameters under Hugging Face's names: normal(0, 0.02), norms 1.

    The two projections that write into the residual stream are smaller by √(2L) (GPT-2's
    rule), so that the stream's variance at the last layer does not grow with depth.
    """
    n = config.hidden_size
    d = config.head_dim
    f = config.intermediate_size
    h = config.num_attention_heads
    g = config.num_key_value_heads
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


def train(
    config: ModelConfig,
    streams: Sequence[TokenArray],
    plan: Plan,
    output: Path,
    *,
    like: Array | None = None,
    held_out: TokenArray | None = None,
    teacher: Teacher | None = None,
    teacher_from: int = 0,
    start: Tensors | None = None,
    product: Product = PLAIN,
    report: Callable[[dict[str, float]], None] | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> State:
    """Train a network from random weights, or from the checkpoint in ``output`` if there is
    one.

    ``streams`` are 1-D integer token arrays on the host, mixed as ``Phase.repeats`` says.
    ``like`` is any array of the library to train on (default NumPy). ``teacher(tokens[B,
    S+1])`` returns a function of rows that gives the target distribution (see ``distill``);
    before step ``teacher_from`` the labels alone are learnt, which is several times cheaper
    a token. ``start`` are the first weights, float32 on the host, in place of random ones.
    ``product`` computes the projections' products (see ``backward``); evaluation is in
    float32 always. ``report`` is called with the record of each evaluation: step, loss
    (nats per token of the last batch), norm (of the gradient, before clipping), rate,
    seconds, held_out. ``on_step`` is called after every step with the steps done and the
    batch's loss (for a progress bar).

    Raises
    ------
    ValueError
        for a token outside the vocabulary, a checkpoint that is damaged or of another
        network, a plan that does not fit the streams, and a held-out stream shorter than a
        window.
    FloatingPointError
        if the loss or a gradient is not finite.
    """
    _check_streams(streams, held_out, config, plan)
    output.mkdir(parents=True, exist_ok=True)
    path = output / "state.safetensors"
    state = _resume(path, config, plan, start)
    if like is not None:
        _move(state, like)
    began = time.perf_counter() - (state.curve[-1]["seconds"] if state.curve else 0.0)
    workers = plan.workers if namespace(*state.params.values()) is np else 1
    with threadpool_limits(limits=1 if workers > 1 else None), ThreadPoolExecutor(workers) as pool:
        for step, phase, windows in batches(
            plan, [len(s) for s in streams], first=state.optimizer.step
        ):
            # [B, S+1]
            tokens = np.stack([streams[s][a : a + phase.length + 1] for s, a in windows])
            target = teacher if step >= teacher_from else None
            loss, grads = _data_parallel(
                state.params, config, tokens, workers, pool, target, product
            )
            record = {"step": step + 1, "loss": loss} | _update(
                state, grads, loss, step, plan, pool.map
            )
            if on_step is not None:
                on_step(step + 1, loss)
            if (step + 1) % plan.evaluate_every == 0 or step + 1 == plan.steps:
                record["seconds"] = time.perf_counter() - began
                if held_out is not None:
                    record["held_out"] = _evaluate(state.params, config, held_out, phase.length)
                state.curve.append(record)
                if report is not None:
                    report(record)
            if (step + 1) % plan.save_every == 0 or step + 1 == plan.steps:
                save_state(state, path, config, plan)
    return state


def _check_streams(
    streams: Sequence[TokenArray], held_out: TokenArray | None, config: ModelConfig, plan: Plan
) -> None:
    """Refuse bad tokens here, on the host and before the first step: NumPy would raise
    late, CuPy wraps silently.
    """
    for tokens in (*streams, *(() if held_out is None else (held_out,))):
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ValueError(
                f"a stream is a 1-D array of integers, got {tokens.dtype}{list(tokens.shape)}"
            )
        if len(tokens) and not (tokens.min() >= 0 and tokens.max() < config.vocab_size):
            raise ValueError(
                f"token ids {tokens.min()}..{tokens.max()} are not within the vocabulary of {config.vocab_size}"
            )
    longest = max((phase.length for phase in plan.phases), default=0)
    if held_out is not None and len(held_out) <= longest:
        raise ValueError(
            f"the held-out stream has {len(held_out)} tokens: too few for windows of {longest}"
        )


def _move(state: State, like: Array) -> None:
    """Bring parameters and moments to the library and device of ``like``."""
    for tensors in (state.params, state.optimizer.m, state.optimizer.v):
        for name, t in tensors.items():
            tensors[name] = asarray_like(t, like)


def _update(
    state: State, grads: Tensors, loss: float, step: int, plan: Plan, each: Each
) -> dict[str, float]:
    """Clip and take one optimizer step; returns the norm before clipping and the rate."""
    norm = clip_by_global_norm(grads, plan.clip)
    if not math.isfinite(loss + norm):
        raise FloatingPointError(f"step {step}: loss {loss}, gradient norm {norm}: lower the rate")
    rate = learning_rate(
        step, peak=plan.peak_rate, warmup=plan.warmup, total=plan.steps, schedule=plan.schedule
    )
    state.optimizer.update(state.params, grads, rate, each)
    return {"norm": norm, "rate": rate}


def _data_parallel(
    params: Tensors,
    config: ModelConfig,
    tokens: TokenArray,
    workers: int,
    pool: ThreadPoolExecutor,
    teacher: Teacher | None,
    product: Product = PLAIN,
) -> tuple[float, Tensors]:
    """Loss and gradients of tokens[B, S+1], averaged over equal shares of the batch, one
    share a thread.
    """
    workers = math.gcd(workers, len(tokens))  # unequal shares would need weights
    like = next(iter(params.values()))

    def share(part: TokenArray) -> tuple[float, Tensors]:
        on_device = asarray_like(part, like)
        return loss_and_gradients(
            params, config, on_device, None if teacher is None else teacher(on_device), product
        )

    losses, grads = zip(*pool.map(share, np.split(tokens, workers)), strict=True)
    total: Tensors = grads[0]
    for name, g in total.items():
        for other in grads[1:]:
            g += other[name]
        g *= 1.0 / workers
    return sum(losses) / workers, total


def _evaluate(
    params: Tensors, config: ModelConfig, tokens: TokenArray, length: int, windows: int = 32
) -> float:
    """Mean nats per token over evenly spread windows of ``length`` (a quick look, not the
    reported figure).
    """
    # no more than lie side by side
    count = min(max(1, windows * 256 // length), len(tokens) // length)
    spread = np.linspace(0, len(tokens) - length - 1, count).astype(int)
    like = next(iter(params.values()))
    losses = [
        mean_loss(params, config, asarray_like(tokens[None, a : a + length + 1], like))
        for a in spread
    ]
    return sum(losses) / len(losses)


def _resume(path: Path, config: ModelConfig, plan: Plan, start: Tensors | None) -> State:
    """The checkpoint at ``path``, or a fresh start; a ``.partial`` file beside it is a
    broken write: ignored.
    """
    if not path.exists():
        if start is None:
            params = initialize(config, np.random.default_rng([plan.seed, 0]))
        else:
            params = dict(start)
        return State(params, optimizer(plan.optimizer)(weight_decay=plan.weight_decay))
    state, about = load_state(path)
    if ModelConfig.from_hf(json.loads(about["config"])) != config:
        raise ValueError(f"{path} is a checkpoint of another network; choose another output folder")
    state.optimizer.weight_decay = plan.weight_decay
    return state
