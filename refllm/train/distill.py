"""Distillation: a smaller network is trained on a larger one's next-token distribution.

The student's loss is the cross-entropy against p, which differs from KL(p ‖ q) by the
entropy of p, a constant: both have the same gradient, softmax(z) − p. A draft model is
distilled because speculative decoding accepts a draft token with probability Σ min(p, q):
the nearer q is to the target's p, the more tokens are accepted.

| symbol | name                                       | shape      |
|--------|--------------------------------------------|------------|
| p      | teacher's probabilities, softmax(z_t / τ)  | [rows, V]  |
| q      | student's probabilities, softmax(z_s)      | [rows, V]  |
| τ      | ``temperature`` of the teacher             | scalar > 0 |
| α      | ``alpha``: weight of p against the label   | in [0, 1]  |

Sources: Hinton et al. 2015, section 2 (soft targets, their mixture with the true label);
Zhou et al. 2023, DistillSpec (distillation raises the acceptance of a draft model).

Left out: a temperature on the student's side (the student is used at temperature 1, where
acceptance is measured), other divergences, and training on the student's own samples.
"""

from __future__ import annotations

import math

from refllm.backend import Array, namespace
from refllm.errors import InputError
from refllm.model.config import ModelConfig
from refllm.train.backward import Tensors, hidden_states, output_name
from refllm.train.loss import TargetRows, Teacher


def make_teacher(
    params: Tensors, config: ModelConfig, temperature: float = 1.0, alpha: float = 1.0
) -> Teacher:
    """Return the ``teacher`` argument of ``train`` for a network, whose targets are
    α·softmax(z/τ) + (1−α)·onehot(label).

    ``teacher(tokens[B, S+1])`` runs the network once up to its last norm, [B·S, N]. The
    function that it returns computes the probabilities [rows, V] of the requested rows, so
    the [B·S, V] array never exists. Rows sum to 1.

    Raises
    ------
    ValueError
        if ``temperature`` is not positive and finite, or ``alpha`` not within 0..1.
    """
    if not (temperature > 0 and math.isfinite(temperature)):
        raise InputError(f"temperature must be positive and finite, got {temperature}")
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha must be within 0..1, got {alpha}")
    head = params[output_name(config)]  # [V, N]

    def teacher(tokens: Array) -> TargetRows:
        """tokens[B, S+1] → the targets of the B·S positions."""
        xp = namespace(tokens, head)
        labels = tokens[:, 1:].reshape(-1)  # [B·S]
        hidden = hidden_states(params, config, tokens[:, :-1])  # [B·S, N]
        hidden *= 1.0 / temperature  # cheaper than dividing the logits: N columns instead of V

        def targets(rows: slice) -> Array:
            """Probabilities [rows, V] of a slice of the positions."""
            p = hidden[rows] @ head.T  # [rows, V]
            p -= xp.max(p, axis=-1, keepdims=True)
            xp.exp(p, out=p)
            p *= alpha / xp.sum(p, axis=-1, keepdims=True)
            if alpha < 1:
                label = labels[rows]  # [rows]
                # one column per row: no index repeats
                p[xp.arange(label.shape[0]), label] += 1.0 - alpha
            return p

        return targets

    return teacher
