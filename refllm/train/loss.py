"""Cross-entropy of hidden states under an output matrix, and its gradients, with few rows of
logits in memory at a time.

The loss of one position is −Σ_v t_v log q_v with q = softmax(z), z = W h; with a label, t
is one-hot. Its derivative for z is q − t. The full logits [T, V] would be the largest array
of the whole network: here only ``ROWS`` rows of them exist at once.

| symbol | name                                                | shape  |
|--------|-----------------------------------------------------|--------|
| h      | hidden states after the last norm                   | [T, N] |
| W      | output matrix (a tied head is the embedding)        | [V, N] |
| z, q   | logits, softmax of them                             | [T, V] |
| t      | target distribution: one-hot label, or a teacher's  | [T, V] |

Source: the softmax is shifted by its maximum (Goodfellow et al. 2016, section 4.1), so that
no exp overflows.

Left out: label smoothing, ignored positions, weights for single positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from refllm.backend import Array, namespace
from refllm.errors import InputError

# slice of the T positions → target probabilities t[rows, V], each row summing to 1
TargetRows = Callable[[slice], Array]
# tokens[B, S+1], inputs and labels, → the targets of its T = B·S positions
Teacher = Callable[[Array], TargetRows]
ROWS = 256  # rows of logits at a time: 256 × V floats stay in the cache


def cross_entropy(hidden: Array, head: Array, targets: Array) -> float:
    """Mean loss in nats: hidden[T, N], head[V, N], targets[T] integers.

    >>> import numpy as np
    >>> logits = np.log([[0.5, 0.25, 0.25]])  # as hidden states, under an identity matrix
    >>> round(cross_entropy(logits, np.eye(3), np.array([1])), 4)  # −log 0.25
    1.3863
    """
    count = int(hidden.shape[0])
    losses = [_loss_of(hidden[rows] @ head.T, targets[rows], None)[0] for rows in _chunks(count)]
    return sum(map(float, losses)) / count


def cross_entropy_and_gradients(
    hidden: Array, head: Array, targets: Array, teacher: TargetRows | None = None
) -> tuple[float, Array, Array]:
    """Mean loss in nats, and its gradients for hidden[T, N] and head[V, N].

    With a ``teacher`` the target of a row is the teacher's distribution and ``targets[T]``
    is ignored. ValueError if the teacher has another vocabulary.
    """
    xp = namespace(hidden, head, targets)
    count = int(hidden.shape[0])
    d_hidden = xp.empty_like(hidden)
    d_head = xp.zeros_like(head)
    losses = []  # 0-d arrays, read at the end: the loop does not wait for a GPU
    for rows in _chunks(count):
        z = hidden[rows] @ head.T  # [rows, V]
        t = None if teacher is None else teacher(rows)  # [rows, V]
        if t is not None and t.shape != z.shape:
            raise InputError(
                f"the teacher's probabilities are {t.shape}, the network's logits {z.shape}"
            )
        loss, total = _loss_of(z, targets[rows], t)
        losses.append(loss)
        z *= 1.0 / total  # q
        if t is None:
            z[xp.arange(z.shape[0]), targets[rows]] -= 1.0  # one column per row: no index repeats
        else:
            z -= t
        z *= 1.0 / count  # dz = (q − t) / T, [rows, V]
        xp.matmul(z, head, out=d_hidden[rows])  # [rows, N]
        d_head += z.T @ hidden[rows]  # [V, N]
    return sum(map(float, losses)) / count, d_hidden, d_head


def _chunks(count: int) -> Iterator[slice]:
    """Slices of at most ``ROWS`` positions; ValueError if there is none."""
    if count == 0:
        raise InputError(
            "the mean over no positions is not defined: a sequence needs two tokens or more"
        )
    return (slice(start, min(start + ROWS, count)) for start in range(0, count, ROWS))


def _loss_of(z: Array, targets: Array, t: Array | None) -> tuple[Array, Array]:
    """Summed loss (0-d) of logits z[rows, V], and Σ exp(z − max z) [rows, 1]; z is
    overwritten with exp(z − max z).
    """
    xp = namespace(z)
    z -= xp.max(z, axis=-1, keepdims=True)
    if t is None:
        score = z[xp.arange(z.shape[0]), targets]  # [rows]
    else:
        score = xp.einsum("tv,tv->t", t, z)  # [rows]
    xp.exp(z, out=z)
    total = xp.sum(z, axis=-1, keepdims=True)  # [rows, 1]
    # log Σ exp z − Σ t z, both shifted by max z: the shift cancels
    return xp.sum(xp.log(total[:, 0]) - score), total
