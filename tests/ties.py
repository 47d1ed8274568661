"""Which codes two ways of computing them must share: those of the columns before the first
tie.

A weight half-way between two codes is rounded by the last bit of its computation, and the
rest of its row follows. This is not rare: the half-integer rules put an extreme weight at
±7.5 scales, which is a tie wherever the first column of a group holds the extreme that is
not clipped.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from conftest import to_host
from refllm.quant.hessian import factor
from schemes import spread

NEAR = 1e-9  # relative to the scale, in float64


def settled(
    q: Any, weight: np.ndarray, hessian: np.ndarray, *, damp: float = 0.01, act_order: bool = False
) -> Any:
    """Columns visited before one that holds a tie, bool[N] in the weight's own order; all
    of them if there is none.

    From the result alone: W − Ŵ = e U, and e_i U_ii is what the rounding of column i did.
    """
    f = factor(hessian, damp, act_order)
    order = np.arange(weight.shape[1]) if f.order is None else to_host(f.order)
    upper = to_host(f.upper)
    codes = to_host(q.codes)
    error = (np.where(to_host(f.dead), 0.0, weight) - to_host(q.dequantize()))[:, order]
    rounded = np.linalg.solve(upper.T, error.T).T * np.diag(upper)
    # of a dynamic group: in the order of the visit
    scales = spread(to_host(q.scale), q.scheme, weight.shape)
    r = rounded / (scales if q.g_idx is not None else scales[:, order])
    codes = codes[:, order]
    clipped = ((codes == q.scheme.qmin) & (r < 0)) | ((codes == q.scheme.qmax) & (r > 0))
    ties = (np.abs(np.abs(r) - 0.5) < NEAR) & ~clipped
    first = int(np.argmax(ties.any(axis=0))) if ties.any() else len(order)
    before = np.empty(len(order), dtype=bool)
    before[order] = np.arange(len(order)) < first
    return before
