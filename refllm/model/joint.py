"""Weights that multiply the same input, q, k and v or gate and up, as one product.

``side_by_side`` lays them out as one joint weight, of which each is a part that can still be used by itself;
``product`` multiplies by all at once, and ``bound`` does so again and again.

| symbol | name                     | shape    |
|--------|--------------------------|----------|
| x      | what all of them multiply| [T, N]   |
| M_i    | outputs of weight i      |          |

Left out: joint weights on a GPU, without a ``Room``, or where one of them is quantised or its M no multiple of 64:
these are multiplied one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from refllm.backend import Array, namespace
from refllm.model.weights import Dense, Linear, Room, as_linear, block_width, in_blocks


def side_by_side(weights: Iterable[Any], room: Room | None = None) -> list[Any]:
    """A ``Dense`` each of arrays of the same N; those that find ``room`` together are also views of a joint weight.

    A ``Linear`` among them stays what it is.
    """
    given = list(weights)
    shapes = [(int(w.shape[0]), int(w.shape[1])) for w in given]
    if (
        room is None
        or len(given) == 1
        or not all(room.holds(weight) and in_blocks(shape) for weight, shape in zip(given, shapes, strict=True))
    ):  # a GPU, a ragged M, another dtype
        return [as_linear(weight, room) for weight in given]
    m, n = sum(shape[0] for shape in shapes), shapes[0][1]
    width, first, parts = block_width(m), 0, []
    joint = Dense._of_blocks(room.take(m * n).reshape(-1, n, width))
    for weight, (rows, _) in zip(given, shapes, strict=True):
        last = first + rows
        place = joint._data[:, :, first:last] if width == m else joint._data[first // width : last // width]
        part = Dense._of_blocks(place, weight)
        part.joint, part.first = joint, first
        first = last
        parts.append(part)
    return parts


def product(x: Array, *weights: Linear) -> Array:
    """x[T, N] times each of the weights, the results side by side in a new array, [T, ΣM].

    One product where they are a joint weight, whole and in order. Where one of them was exchanged, for a quantised
    one say, they are multiplied one by one.
    """
    joint = _joint(weights)
    if joint is not None:
        return joint.matmul(x)
    return namespace(x).concat([weight.matmul(x) for weight in weights], axis=1)


def bound(x: Array, out: Array, weights: Sequence[Dense]) -> Callable[[], object]:
    """``product`` again and again: a call multiplies what x[T, N] holds by then, and writes to out[T, ΣM]."""
    joint = _joint(weights)
    if joint is not None:
        return joint.bind(x, out)
    calls, edge = [], 0
    for weight in weights:
        calls.append(weight.bind(x, out[:, edge : edge + weight.shape[0]]))
        edge += weight.shape[0]
    return calls[0] if len(calls) == 1 else lambda: [call() for call in calls]


def _joint(weights: Sequence[Any]) -> Dense | None:
    """The joint weight that these are, whole and in order."""
    joint: Dense | None = getattr(weights[0], "joint", None)
    edge = 0
    for weight in weights if joint is not None else ():
        if getattr(weight, "joint", None) is not joint or getattr(weight, "first", None) != edge:
            return None
        edge += weight.shape[0]
    return joint if joint is not None and edge == joint.shape[0] else None
