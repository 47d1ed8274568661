"""Taps observe the inputs of projections while a complete network runs, quantised or not.

``layer_inputs`` computes the same inputs layer by layer. A tap is for a network in memory, to
look at it or to check a quantiser against it.

Left out: taps on norms, attention weights and outputs.
"""

from __future__ import annotations

from collections.abc import Callable

from refllm.backend import Array
from refllm.model.llama import PROJECTIONS, Weights
from refllm.model.weights import Linear

__all__ = ["Tap", "tapped"]


class Tap:
    """A ``Linear`` that passes each of its inputs x[T, N] to ``observe`` before it multiplies
    like the one it wraps.
    """

    def __init__(self, inner: Linear, observe: Callable[[Array], None]):
        self.inner = inner
        self.observe = observe

    @property
    def shape(self) -> tuple[int, int]:
        """(M, N)"""
        return self.inner.shape

    @property
    def nbytes(self) -> int:
        """Of the wrapped weight."""
        return self.inner.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Of the wrapped weight."""
        return self.inner.bits_per_weight

    def matmul(self, x: Array) -> Array:
        """x[T, N] → x Wᵀ [T, M]"""
        self.observe(x)
        return self.inner.matmul(x)

    def dequantize(self) -> Array:
        """W[M, N]"""
        return self.inner.dequantize()


def tapped(weights: Weights, observe: Callable[[int, str, Array], None]) -> Weights:
    """A weight tree whose projections call ``observe(layer, "q_proj", x[T, N])`` with each of
    their inputs; nothing is copied.
    """

    def tap(index: int, name: str, inner: Linear) -> Tap:
        return Tap(inner, lambda x: observe(index, name, x))

    layers = [
        layer | {name: tap(index, name, layer[name]) for name in PROJECTIONS}
        for index, layer in enumerate(weights["layers"])
    ]
    return weights | {"layers": layers}
