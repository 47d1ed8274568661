"""What both GPTQ engines are asked: a weight and a Hessian, drawn by NumPy from a seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Task:
    """W[size, size] in ``bits`` bits and groups of ``group`` columns, inputs of ``tokens``
    tokens.
    """

    size: int
    tokens: int
    bits: int
    group: int
    seed: int = 0


def draw(task: Task) -> tuple[np.ndarray, np.ndarray]:
    """W[N, N] and H[N, N] = 2 xᵀx / T, float32; inputs whose columns have very different
    sizes, as activations do.
    """
    rng = np.random.default_rng(task.seed)
    weight = rng.standard_normal((task.size, task.size), dtype=np.float32) * 0.02
    sizes = np.exp(rng.standard_normal(task.size)).astype(np.float32)
    x = rng.standard_normal((task.tokens, task.size), dtype=np.float32)
    # neighbours are correlated, or there would be nothing to make up for
    x[:, 1:] += 0.5 * x[:, :-1]
    x *= sizes
    return weight, (x.T @ x) * np.float32(2 / task.tokens)
