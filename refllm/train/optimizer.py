"""AdamW with decoupled weight decay, Muon, gradient clipping and the learning-rate schedules.

Sources: Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019, algorithm 2 (decay is
multiplied by the learning rate, as PyTorch does); Jordan et al. 2024, "Muon", with the
scale of Liu et al. 2025 (arXiv:2502.16982, eq. 4), which gives its updates the size of
AdamW's, so that one rate serves both; clipping by global norm, Pascanu et al. 2013,
algorithm 1.

| symbol | name                                    | shape          |
|--------|-----------------------------------------|----------------|
| w, g   | a parameter, its gradient               | any, both same |
| m, v   | running means of g and g²               | shape of w     |
| m̂, v̂   | m/(1 − β₁ᵗ), v/(1 − β₂ᵗ) after t steps  | shape of w     |
| lr, λ  | ``rate``, ``weight_decay``              | scalars        |
| O      | U Vᵀ of a matrix U Σ Vᵀ, nearly         | [M, N]         |

Left out: parameter groups beyond "matrices decay, vectors do not"; mixed-precision master
copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from refllm.backend import Array, namespace
from refllm.errors import InputError, alternatives

Tensors = dict[str, Array]
# ``map`` or a thread pool's: applies a function to each name
Map = Callable[[Callable[[str], None], list[str]], Iterable[None]]
SCHEDULES = ("cosine", "linear")
OPTIMIZERS = ("adamw", "muon")


def optimizer_class(name: str) -> type[AdamW]:
    """The optimizer called ``name``, one of ``OPTIMIZERS``; ValueError for another name."""
    if name not in OPTIMIZERS:
        raise InputError(f"unknown optimizer {name!r}; {alternatives(name, OPTIMIZERS)}")
    return {"adamw": AdamW, "muon": Muon}[name]


def learning_rate(
    step: int, *, peak: float, warmup: int, total: int, schedule: str = "cosine"
) -> float:
    """Learning rate of the 0-based ``step``: linear warm-up to ``peak``, then a cosine or a
    straight line down to zero.

    The first step has the rate peak/warmup, since a rate of zero would waste it; the rate
    is zero from step ``total`` on. ValueError for a schedule that is not in ``SCHEDULES``.

    >>> [learning_rate(step, peak=1.0, warmup=2, total=6, schedule="linear") for step in range(7)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if schedule not in SCHEDULES:
        raise InputError(f"unknown schedule {schedule!r}; {alternatives(schedule, SCHEDULES)}")
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    if schedule == "cosine":
        return peak * (0.5 * (1 + math.cos(math.pi * done)))
    return peak * (1.0 - done)


def clip_by_global_norm(grads: Tensors, limit: float) -> float:
    """Scale all gradients in place so that their joint L2 norm is at most ``limit``; return
    the norm before scaling.

    On a GPU this waits for the device, once. The norm is not finite if a gradient is not.

    >>> import numpy as np
    >>> grads = {"w": np.array([3.0, 0.0]), "b": np.array([4.0])}
    >>> clip_by_global_norm(grads, 2.5)
    5.0
    >>> grads["w"].tolist(), grads["b"].tolist()
    ([1.5, 0.0], [2.0])
    """
    xp = namespace(*grads.values())
    flat = [g.reshape(-1) for g in grads.values()]
    norm = math.sqrt(float(sum(xp.sum(xp.einsum("i,i->", g, g)) for g in flat)))
    if norm > limit:
        for g in grads.values():
            g *= limit / norm
    return norm


@dataclass
class AdamW:
    """m ← β₁m + (1−β₁)g;  v ← β₂v + (1−β₂)g²;  w ← w − lr·(m̂/(√v̂ + ε) + λw), in place."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    step: int = 0
    m: Tensors = field(default_factory=dict)
    v: Tensors = field(default_factory=dict)

    def update(self, params: Tensors, grads: Tensors, rate: float, map: Map = map) -> None:
        """One optimizer step; ``grads`` is used as scratch space and is meaningless afterwards.

        ``map`` goes over the parameters, which do not depend on each other: it may be that
        of a thread pool.
        """
        self.step += 1
        for name, w in params.items():
            if name not in self.m:
                self.init_moments(name, w)

        def update_one(name: str) -> None:
            self._update_one(name, params[name], grads[name], rate)

        for _ in map(update_one, list(params)):
            pass

    def init_moments(self, name: str, w: Array) -> None:
        """Set the moments of a parameter to zeros."""
        xp = namespace(w)
        self.m[name] = xp.zeros_like(w)
        self.v[name] = xp.zeros_like(w)

    def _update_one(self, name: str, w: Array, g: Array, rate: float) -> None:
        """Update one parameter and its moments in place; ``g`` is scratch space."""
        xp = namespace(w)
        correct1 = 1 - self.beta1**self.step
        correct2 = 1 - self.beta2**self.step
        m = self.m[name]
        v = self.v[name]
        # In place throughout, with g as the only scratch: a step allocates one temporary
        m *= self.beta1
        m += (1 - self.beta1) * g
        g *= g
        g *= 1 - self.beta2
        v *= self.beta2
        v += g
        xp.sqrt(v, out=g)
        g *= 1.0 / math.sqrt(correct2)  # √v̂
        g += self.eps
        xp.divide(m, g, out=g)
        if w.ndim == 2:  # vectors are norm gains, which must not decay to zero
            w *= 1 - rate * self.weight_decay
        g *= rate / correct1  # lr·m̂ / (√v̂ + ε)
        w -= g


@dataclass
class Muon(AdamW):
    """m ← μm + (1−μ)g;  O ≈ UVᵀ of (1−μ)g + μm = UΣVᵀ;  w ← w − lr·(0.2·√max(M,N)·O + λw)
    for the layers' matrices.

    The embedding, the head and the norms are updated by AdamW. O has singular values near
    1, so every direction of a weight moves by about the same amount, rare ones too;
    0.2·√max(M,N) makes the root mean square of the update 0.2, about that of AdamW.
    """

    momentum: float = 0.95

    def init_moments(self, name: str, w: Array) -> None:
        """One moment of zeros for a matrix in a layer, two for the others."""
        if self.is_orthogonal(name, w):
            self.m[name] = namespace(w).zeros_like(w)
        else:
            super().init_moments(name, w)

    @staticmethod
    def is_orthogonal(name: str, w: Array) -> bool:
        """Whether ``name`` is a matrix inside a layer; a row of an embedding or of a head
        belongs to one token.
        """
        return bool(w.ndim == 2) and ".layers." in name

    def _update_one(self, name: str, w: Array, g: Array, rate: float) -> None:
        """As ``AdamW``'s; a matrix in a layer gets an orthogonalised update instead."""
        if not self.is_orthogonal(name, w):
            super()._update_one(name, w, g, rate)
            return
        m = self.m[name]
        m *= self.momentum
        m += (1 - self.momentum) * g
        g *= 1 - self.momentum
        g += self.momentum * m  # Nesterov momentum
        w *= 1 - rate * self.weight_decay
        w -= rate * 0.2 * math.sqrt(max(w.shape)) * orthogonalize(g)


def orthogonalize(x: Array, iterations: int = 5) -> Array:
    """The matrix with the singular vectors of ``x[M, N]`` and singular values within about
    [0.7, 1.2].

    The Newton-Schulz iteration X ← aX + (bA + cA²)X, A = XXᵀ, applies the odd polynomial
    ax + bx³ + cx⁵ to every singular value; Jordan's a, b, c give up an exact limit of 1 for
    a steep rise from zero. A singular value below 1e-3 of the norm of ``x`` is still rising
    after five iterations. A matrix of zeros stays zero.
    """
    a = 3.4445
    b = -4.7750
    c = 2.0315
    xp = namespace(x)
    tall = x.shape[0] > x.shape[1]
    y = x.T if tall else x  # so that A is the smaller square
    y = y / (xp.sqrt(xp.sum(y * y)) + 1e-30)
    for _ in range(iterations):
        gram = y @ y.T  # A
        y = a * y + (b * gram + c * (gram @ gram)) @ y
    return y.T if tall else y
