"""Cross-entropy of hidden states under an output matrix, and its gradients, a few rows of
logits at a time.

The loss of one position is −Σ_v t_v log q_v with q = softmax(z), z = W h; with a label, t
is one-hot. Its derivative for z is q − t. The full logits [T, V] would be the largest array
of the whole network: here only ``ROWS`` of them exist at once.

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

# slice of the T positions → target probabilities t[rows, V], each row summing to 1
Rows = Callable[[slice], Array]
# tokens[B, S+1], inputs and answers, → the Rows of its T = B·S positions
Teacher = Callable[[Array], Rows]
ROWS = 256  # rows of logits at a time: 256 × V floats stay in the cache


def cross_entropy(hidden: Array, head: Array, targets: Array) -> float:
    """Mean loss in nats: hidden[T, N], head[V, N], targets[T] integers."""
    count = int(hidden.shape[0])
    losses = [_loss_of(hidden[rows] @ head.T, targets[rows], None)[0] for rows in _chunks(count)]
    return sum(map(float, losses)) / count


def cross_entropy_and_gradients(
    hidden: Array, head: Array, targets: Array, teacher: Rows | None = None
) -> tuple[float, Array, Array]:
    """Mean loss in nats, and its gradients for hidden[T, N] and head[V, N].

    With a ``teacher`` the target of a row is its distribution and ``targets[T]`` is not
    looked at. ValueError if the teacher's vocabulary is another one.
    """
    xp = namespace(hidden, head, targets)
    count = int(hidden.shape[0])
    d_hidden = xp.empty_like(hidden)
    d_head = xp.zeros_like(head)
    losses = []  # 0-d arrays: read once at the end, so that a GPU is not waited for in the loop
    for rows in _chunks(count):
        z = hidden[rows] @ head.T  # [rows, V]
        t = None if teacher is None else teacher(rows)  # [rows, V]
        if t is not None and t.shape != z.shape:
            raise ValueError(
                f"the teacher's probabilities are {t.shape}, the network's logits {z.shape}"
            )
        loss, mass = _loss_of(z, targets[rows], t)
        losses.append(loss)
        z *= 1.0 / mass  # q
        if t is None:
            z[xp.arange(z.shape[0]), targets[rows]] -= 1.0  # one column a row: no index repeats
        else:
            z -= t
        z *= 1.0 / count  # dz = (q − t) / T
        xp.matmul(z, head, out=d_hidden[rows])
        d_head += z.T @ hidden[rows]
    return sum(map(float, losses)) / count, d_hidden, d_head


def _chunks(count: int) -> Iterator[slice]:
    if count == 0:
        raise ValueError(
            "the mean over no positions is not defined: a sequence needs two tokens or more"
        )
    return (slice(start, min(start + ROWS, count)) for start in range(0, count, ROWS))


def _loss_of(z: Array, targets: Array, t: Array | None) -> tuple[Array, Array]:
    """Summed loss (0-d) of logits z[rows, V], and Σ exp z [rows, 1]; z itself becomes exp(z
    − max z).
    """
    xp = namespace(z)
    z -= xp.max(z, axis=-1, keepdims=True)
    if t is None:
        score = z[xp.arange(z.shape[0]), targets]
    else:
        score = xp.einsum("tv,tv->t", t, z)
    xp.exp(z, out=z)
    mass = xp.sum(z, axis=-1, keepdims=True)
    # log Σ exp z − Σ t z, both shifted: the shift cancels
    return xp.sum(xp.log(mass[:, 0]) - score), mass
