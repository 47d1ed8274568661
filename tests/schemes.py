"""Strategies and brute force for uniform grids, which the tests of ``refllm.formats``
share.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from refllm.formats.granularity import Granularity
from refllm.formats.uniform import RULES, Scheme

FORCED = tuple(rule for rule in RULES if rule != "awq")  # zero is forced into the range
HALF_STEP = tuple(rule for rule in FORCED if rule != "power")

# granularities that fit a matrix whose rows are a multiple of 4 long
LAYOUTS: tuple[tuple[str, Any], ...] = (
    *(("tensor", None), ("channel", None), ("token", None)),
    *(
        ("group", 2),
        ("group", 4),
        ("block", 3),
        ("block", (2, 5)),
        ("block", (1, 4)),
        ("block", 64),
    ),
)


@st.composite
def schemes(draw: st.DrawFn, *, rules: Any = RULES, layouts: Any = LAYOUTS, low: int = 1) -> Scheme:
    """Any scheme; ``low`` is the fewest bits."""
    rule = draw(st.sampled_from(rules))
    bits = draw(st.integers(max(low, 2 if rule == "restricted" else 1), 8))
    return Scheme(bits, rule, *draw(st.sampled_from(layouts)))


rows = st.integers(1, 7)
columns = st.sampled_from([4, 8, 12, 20])


def spread(parameter: np.ndarray, scheme: Scheme, shape: tuple[int, int]) -> np.ndarray:
    """A scale or zero point at each element of a matrix, element by element."""
    out = np.empty(shape, dtype=parameter.dtype)
    for i in range(shape[0]):
        for j in range(shape[1]):
            out[i, j] = parameter[place(scheme.geometry, i, j)]
    return out


def place(geometry: Granularity, i: int, j: int) -> tuple[int, ...]:
    """Index of the scale of element (i, j)."""
    size: Any = geometry.size
    if geometry.kind == "tensor":
        return ()
    if geometry.kind in ("channel", "token"):
        return i, 0
    if geometry.kind == "group":
        return i, j // size
    down, right = size if isinstance(size, tuple) else (size, size)
    return i // down, j // right


def slack(x: np.ndarray, step: np.ndarray, scheme: Scheme) -> np.ndarray:
    """What rounding adds to |x̂ − x|.

    In halves of eps: the quotient, the scale (a subtraction and a division) and the product
    err by |x| each, four times; adding z to the quotient by 2^b scales. Doubled, for
    products of these errors.
    """
    eps = float(np.finfo(x.dtype).eps)
    return eps * (
        4 * np.abs(x.astype(np.longdouble)) + 2.0**scheme.bits * step.astype(np.longdouble)
    )
