"""AdamW with decoupled weight decay, Muon, gradient clipping and the learning-rate
schedules.

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

Tensors = dict[str, Array]
Each = Callable[[Callable[[str], None], list[str]], Iterable[None]]
SCHEDULES = ("cosine", "linear")
OPTIMIZERS = ("adamw", "muon")


def optimizer(name: str) -> type[AdamW]:
    """The class of ``OPTIMIZERS`` by its name; ValueError for another name."""
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}; choose one of {', '.join(OPTIMIZERS)}")
    return {"adamw": AdamW, "muon": Muon}[name]


def learning_rate(
    step: int, *, peak: float, warmup: int, total: int, schedule: str = "cosine"
) -> float:
    """Rate for the 0-based ``step``: linear warm-up to ``peak``, then cosine or straight
    line to zero.

    The first step has the rate peak/warmup and not zero, which would waste it; the rate is
    zero from step ``total`` on. ValueError for a schedule that is not in ``SCHEDULES``.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}")
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * (0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1.0 - done)


def clip_by_global_norm(grads: Tensors, limit: float) -> float:
    """Scale all gradients in place so that their joint L2 norm is at most ``limit``; return
    the norm before.

    On a GPU this waits for the device, once. A norm that is not finite says that a gradient
    is not.
    """
    xp = namespace(*grads.values())
    norm = math.sqrt(
        float(sum(xp.sum(xp.einsum("i,i->", g.reshape(-1), g.reshape(-1))) for g in grads.values()))
    )
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

    def update(self, params: Tensors, grads: Tensors, rate: float, each: Each = map) -> None:
        """One step; ``grads`` is used as scratch space and holds no meaning afterwards.

        ``each`` maps over the parameters, which do not depend on each other: the ``map`` of
        a thread pool will do.
        """
        self.step += 1
        for name, w in params.items():
            if name not in self.m:
                self.begin(name, w)
        for _ in each(lambda name: self._one(name, params[name], grads[name], rate), list(params)):
            pass

    def begin(self, name: str, w: Array) -> None:
        """Moments of zeros for a parameter."""
        xp = namespace(w)
        self.m[name] = xp.zeros_like(w)
        self.v[name] = xp.zeros_like(w)

    def _one(self, name: str, w: Array, g: Array, rate: float) -> None:
        xp = namespace(w)
        correct1 = 1 - self.beta1**self.step
        correct2 = 1 - self.beta2**self.step
        m = self.m[name]
        v = self.v[name]
        # In place throughout, g is the only scratch: a step writes no array but w, m, v and
        # one product.
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
        if w.ndim == 2:  # vectors are norm gains: no decay pulls them to zero
            w *= 1 - rate * self.weight_decay
        g *= rate / correct1  # lr·m̂ / (√v̂ + ε)
        w -= g


@dataclass
class Muon(AdamW):
    """m ← μm + (1−μ)g;  O ≈ UVᵀ of (1−μ)g + μm = UΣVᵀ;  w ← w − lr·(0.2·√max(M,N)·O + λw)
    for the layers' matrices.

    The embedding, the head and the norms are AdamW's. O has singular values near 1, so
    every direction of a weight moves by about as much, the rare ones too; 0.2·√max(M,N)
    makes its root mean square 0.2, as AdamW's is about.
    """

    momentum: float = 0.95

    def begin(self, name: str, w: Array) -> None:
        """One moment of zeros for a matrix in a layer, two for the rest."""
        if self.is_orthogonal(name, w):
            self.m[name] = namespace(w).zeros_like(w)
        else:
            super().begin(name, w)

    @staticmethod
    def is_orthogonal(name: str, w: Array) -> bool:
        """Whether ``name`` is a matrix inside a layer; a row of an embedding or of a head
        belongs to one token.
        """
        return bool(w.ndim == 2) and ".layers." in name

    def _one(self, name: str, w: Array, g: Array, rate: float) -> None:
        if not self.is_orthogonal(name, w):
            super()._one(name, w, g, rate)
            return
        m = self.m[name]
        m *= self.momentum
        m += (1 - self.momentum) * g
        g *= 1 - self.momentum
        g += self.momentum * m  # Nesterov's look ahead
        w *= 1 - rate * self.weight_decay
        w -= rate * 0.2 * math.sqrt(max(w.shape)) * orthogonalize(g)


def orthogonalize(x: Array, iterations: int = 5) -> Array:
    """The matrix with the singular vectors of ``x[M, N]`` and singular values within about
    [0.7, 1.2].

    Newton and Schulz's iteration X ← aX + (bA + cA²)X, A = XXᵀ, is the odd polynomial ax +
    bx³ + cx⁵ on every singular value; Jordan's a, b, c trade an exact limit of 1 for a
    steep rise from zero. A singular value below 1e-3 of the norm of ``x`` is still on its
    way up after five. A matrix of zeros stays one.
    """
    a = 3.4445
    b = -4.7750
    c = 2.0315
    xp = namespace(x)
    tall = x.shape[0] > x.shape[1]
    y = x.T if tall else x  # A is the smaller square
    y = y / (xp.sqrt(xp.sum(y * y)) + 1e-30)
    for _ in range(iterations):
        gram = y @ y.T
        y = a * y + (b * gram + c * (gram @ gram)) @ y
    return y.T if tall else y
