"""AdamW with decoupled weight decay, gradient clipping and the learning-rate schedules.

Sources: Kingma & Ba 2015, algorithm 1; Loshchilov & Hutter 2019, algorithm 2 (decay is multiplied by the
learning rate, as PyTorch does); clipping by global norm, Pascanu et al. 2013, algorithm 1.

| symbol | name                                    | shape          |
|--------|-----------------------------------------|----------------|
| w, g   | a parameter, its gradient               | any, both same |
| m, v   | running means of g and g²               | shape of w     |
| m̂, v̂   | m/(1 − β₁ᵗ), v/(1 − β₂ᵗ) after t steps  | shape of w     |
| lr, λ  | ``rate``, ``weight_decay``              | scalars        |

Left out: parameter groups beyond "matrices decay, vectors do not"; mixed-precision master copies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from refllm.backend import Array, namespace

Tensors = dict[str, Array]
SCHEDULES = ("cosine", "linear")


def learning_rate(step: int, *, peak: float, warmup: int, total: int, schedule: str = "cosine") -> float:
    """Rate for the 0-based ``step``: linear warm-up to ``peak``, then cosine or straight line to zero.

    The first step has the rate peak/warmup and not zero, which would waste it; the rate is zero from step
    ``total`` on. ValueError for a schedule that is not in ``SCHEDULES``.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}")
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * (0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1.0 - done)


def clip_by_global_norm(grads: Tensors, limit: float) -> float:
    """Scale all gradients in place so that their joint L2 norm is at most ``limit``; return the norm before.

    On a GPU this waits for the device, once. A norm that is not finite says that a gradient is not.
    """
    xp = namespace(*grads.values())
    norm = math.sqrt(float(sum(xp.sum(xp.einsum("i,i->", g.reshape(-1), g.reshape(-1))) for g in grads.values())))
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

    def update(self, params: Tensors, grads: Tensors, rate: float) -> None:
        """One step; ``grads`` is used as scratch space and holds no meaning afterwards."""
        self.step += 1
        correct1 = 1 - self.beta1**self.step
        correct2 = 1 - self.beta2**self.step
        for name, w in params.items():
            xp = namespace(w)
            g = grads[name]
            if name not in self.m:
                self.m[name], self.v[name] = xp.zeros_like(w), xp.zeros_like(w)
            m, v = self.m[name], self.v[name]
            # In place throughout, g is the only scratch: a step writes no array but w, m, v and one product.
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
