"""Training from scratch: initial weights, data-parallel steps, checkpoint and resume.

A step: split the batch over worker threads, compute loss and gradients of each share,
average, clip, update. Two Python threads with half a batch each and one BLAS thread per
product are faster than two BLAS threads on the whole batch: NumPy releases the interpreter
lock inside products and ufuncs, and elementwise work is shared too. On CuPy there is one
worker.

| symbol | name                                        | shape          |
|--------|---------------------------------------------|----------------|
| B, S   | windows per batch, predictions per window   | (``schedule``) |
| tokens | a batch: inputs and labels                  | [B, S+1]       |
| rate   | the learning rate of a step                 | scalar         |

A run that is resumed with the same plan ends with the same weights, bit for bit, as an
uninterrupted one (see ``train.state``).

Left out: mixed precision, several devices.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from refllm.backend import NUMPY, Array, asarray_like, namespace
from refllm.checkpoints.tensor_files import tensor_shapes
from refllm.errors import InputError
from refllm.model.config import ModelConfig
from refllm.train.backward import PLAIN, Product, loss_and_gradients, mean_loss
from refllm.train.loss import Teacher
from refllm.train.optimizer import Map, clip_by_global_norm, learning_rate, optimizer_class
from refllm.train.schedule import Phase, Plan, batches
from refllm.train.state import State, load_state, save_state

__all__ = ["Phase", "Plan", "State", "initialize", "load_state", "save_state", "train"]

Tensors = dict[str, Array]
TokenArray = NDArray[np.integer]  # in host memory; each batch is moved to the device


def initialize(config: ModelConfig, rng: np.random.Generator) -> Tensors:
    """Random float32 parameters under Hugging Face's names: normal(0, 0.02), norms 1.

    The two projections that write into the residual stream are smaller by √(2L) (GPT-2's
    rule), so that the stream's variance at the last layer does not grow with depth.
    """
    residual = 1.0 / math.sqrt(2 * config.num_hidden_layers)
    params: Tensors = {}
    for name, shape in tensor_shapes(config):
        if name.endswith("norm.weight"):
            params[name] = np.ones(shape, np.float32)
            continue
        scale = 1.0
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            scale = residual
        params[name] = (0.02 * scale * rng.standard_normal(shape)).astype(np.float32)
    return params


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
    """Train a network from random weights, or from the checkpoint in ``output`` if there is one.

    Parameters
    ----------
    streams
        1-D integer token arrays on the host, mixed as ``Phase.repeats`` says.
    output
        the folder of the run's checkpoint, ``state.safetensors``.
    like
        any array of the library to train on (default: NumPy).
    held_out
        tokens for the evaluation, a stream of their own.
    teacher
        ``teacher(tokens[B, S+1])`` returns a function from rows to target probabilities
        (see ``train.distill``). Steps before ``teacher_from`` use the labels only, which is
        several times cheaper per token.
    start
        initial weights, float32 on the host, instead of random ones.
    product
        computes the products of the projections (see ``train.backward``); evaluation is
        always in float32.
    report
        is called with the record of each evaluation: step, loss (nats per token of the last
        batch), norm (of the gradient, before clipping), rate, seconds, held_out.
    on_step
        is called after every step with the number of steps done and the batch's loss (for a
        progress bar).

    Raises
    ------
    ValueError
        for a token outside the vocabulary, a checkpoint that is damaged or of another
        network, a plan that does not fit the streams, and a held-out stream shorter than a
        window; during training, if the loss or a gradient is not finite.
    """
    _check_streams(streams, held_out, config, plan)
    output.mkdir(parents=True, exist_ok=True)
    path = output / "state.safetensors"
    state = _resume(path, config, plan, start)
    if like is not None:
        _move(state, like)
    began = time.perf_counter()
    if state.curve:  # time continues where the interrupted run stopped
        began -= state.curve[-1]["seconds"]
    on_host = namespace(*state.params.values()) is NUMPY
    workers = plan.workers if on_host else 1
    lengths = [len(stream) for stream in streams]
    threads = 1 if workers > 1 else None  # of BLAS, for each worker
    with threadpool_limits(limits=threads), ThreadPoolExecutor(workers) as pool:
        for step, phase, windows in batches(plan, lengths, first=state.optimizer.step):
            tokens = np.stack(
                [streams[stream][at : at + phase.length + 1] for stream, at in windows]
            )  # [B, S+1]
            target = teacher if step >= teacher_from else None
            loss, grads = _data_parallel(
                state.params, config, tokens, workers, pool, target, product
            )
            record = {"step": step + 1, "loss": loss}
            record |= _update(state, grads, loss, step, plan, pool.map)
            if on_step is not None:
                on_step(step + 1, loss)
            last = step + 1 == plan.steps
            if (step + 1) % plan.evaluate_every == 0 or last:
                record["seconds"] = time.perf_counter() - began
                if held_out is not None:
                    record["held_out"] = _evaluate(state.params, config, held_out, phase.length)
                state.curve.append(record)
                if report is not None:
                    report(record)
            if (step + 1) % plan.save_every == 0 or last:
                save_state(state, path, config, plan)
    return state


def _check_streams(
    streams: Sequence[TokenArray], held_out: TokenArray | None, config: ModelConfig, plan: Plan
) -> None:
    """ValueError for bad tokens, on the host and before the first step: NumPy would raise
    late, CuPy would wrap an index silently.
    """
    given = [*streams]
    if held_out is not None:
        given.append(held_out)
    for tokens in given:
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise InputError(
                f"a stream is a 1-D array of integers, got {tokens.dtype}{list(tokens.shape)}"
            )
        if len(tokens) and not (tokens.min() >= 0 and tokens.max() < config.vocab_size):
            raise InputError(
                f"token ids {tokens.min()}..{tokens.max()} are not within the vocabulary of "
                f"{config.vocab_size}"
            )
    longest = max((phase.length for phase in plan.phases), default=0)
    if held_out is not None and len(held_out) <= longest:
        raise InputError(
            f"the held-out stream has {len(held_out)} tokens: too few for windows of {longest}"
        )


def _move(state: State, like: Array) -> None:
    """Move parameters and moments to the library and device of ``like``."""
    for tensors in (state.params, state.optimizer.m, state.optimizer.v):
        for name, t in tensors.items():
            tensors[name] = asarray_like(t, like)


def _update(
    state: State, grads: Tensors, loss: float, step: int, plan: Plan, map: Map
) -> dict[str, float]:
    """Clip and take one optimizer step; returns the norm before clipping and the rate."""
    norm = clip_by_global_norm(grads, plan.clip)
    if not math.isfinite(loss + norm):
        raise InputError(f"step {step}: loss {loss}, gradient norm {norm}: lower the rate")
    rate = learning_rate(
        step, peak=plan.peak_rate, warmup=plan.warmup, total=plan.steps, schedule=plan.schedule
    )
    state.optimizer.update(state.params, grads, rate, map)
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
    share per thread.
    """
    workers = math.gcd(workers, len(tokens))  # unequal shares would need weights
    like = next(iter(params.values()))

    def share(part: TokenArray) -> tuple[float, Tensors]:
        """Loss and gradients of a part of the batch."""
        on_device = asarray_like(part, like)
        targets = None if teacher is None else teacher(on_device)
        return loss_and_gradients(params, config, on_device, targets, product)

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
    """Mean nats per token over evenly spread windows of ``length``: a quick estimate, not
    the figure that is reported.
    """
    # no more than fit without overlap
    count = min(max(1, windows * 256 // length), len(tokens) // length)
    starts = np.linspace(0, len(tokens) - length - 1, count).astype(int)
    like = next(iter(params.values()))
    windows_of_tokens = (tokens[None, start : start + length + 1] for start in starts)
    losses = [mean_loss(params, config, asarray_like(window, like)) for window in windows_of_tokens]
    return sum(losses) / len(losses)


def _resume(path: Path, config: ModelConfig, plan: Plan, start: Tensors | None) -> State:
    """The checkpoint at ``path``, or the initial state. A ``.partial`` file next to it was
    left by a process that was killed as it wrote, and is ignored.
    """
    if not path.exists():
        if start is None:
            params = initialize(config, np.random.default_rng([plan.seed, 0]))
        else:
            params = dict(start)
        return State(params, optimizer_class(plan.optimizer)(weight_decay=plan.weight_decay))
    state, about = load_state(path)
    if ModelConfig.from_hf(json.loads(about["config"])) != config:
        raise InputError(f"{path} is a checkpoint of another network; choose another output folder")
    state.optimizer.weight_decay = plan.weight_decay
    return state
