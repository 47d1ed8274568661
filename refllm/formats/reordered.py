"""A quantised weight whose groups are groups of columns in another order than their own.

GPTQ with "act-order" and dynamic groups visits columns by falling importance and gives each g *visited* columns a
scale. The words then hold the columns in the order of the visit, which keeps groups together, and each column's group
is known by its ``g_idx``: Ŵ[:, j] = scale[:, g_idx[j]] · (q[:, j] − z[:, g_idx[j]]).

| symbol | name                                            | shape   |
|--------|-------------------------------------------------|---------|
| p      | order: column p[i] stands at place i of the words | int64[N] |
| g_idx  | group of each column, in the weight's own order | int32[N] |

Left out: groups of unequal sizes.
"""

from __future__ import annotations

from refllm.backend import Array, namespace
from refllm.formats.quantized import Quantized

__all__ = ["Reordered", "order_of"]


def order_of(g_idx: Array, groups: int, *, name: str = "weight") -> Array:
    """The order in which the columns stand group by group, int64[N]; ValueError unless all groups are of one size."""
    xp = namespace(g_idx)
    size = int(g_idx.shape[0]) // groups
    order = xp.argsort(g_idx, kind="stable")
    if not bool(xp.all(g_idx[order] == xp.arange(groups * size) // size)):
        raise ValueError(f"{name}: g_idx does not put {size} columns into each of {groups} groups")
    return order


class Reordered(Quantized):
    """A ``Quantized`` with an ``order``; None is the weight's own, and changes nothing.

    ``packed()`` holds the codes in that order; ``codes``, ``dequantize`` and ``matmul`` are in the weight's own, and
    ``nbytes`` counts 4 bytes a column for ``g_idx``.
    """

    order: Array | None = None

    @property
    def g_idx(self) -> Array | None:
        """The group of each column, int32[N]; None where column j belongs to group j // g."""
        if self.order is None:
            return None
        xp = namespace(self.order)
        return xp.astype(xp.argsort(self.order) // self.scheme.block[1], xp.int32)

    @property
    def codes(self) -> Array:
        """q[M, N] in the weight's own order, unpacked anew at each call."""
        codes = super().codes
        return codes if self.order is None else codes[:, namespace(codes).argsort(self.order)]

    @property
    def nbytes(self) -> int:
        """Bytes of words, scales, zero points, and of ``g_idx`` where there is one."""
        return super().nbytes + (0 if self.order is None else 4 * self.shape[1])

    def dequantize(self) -> Array:
        """W[M, N] in ``dtype``, a new array."""
        weight = super().dequantize()
        return weight if self.order is None else weight[:, namespace(weight).argsort(self.order)]

    def matmul(self, x: Array) -> Array:
        """x[T, N] → x Wᵀ [T, M]."""
        return super().matmul(x if self.order is None else x[:, self.order])
