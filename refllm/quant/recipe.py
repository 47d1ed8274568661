"""Whole models: calibrate, transform, quantise and report, one decoder layer at a time.

``quantize_model`` takes a model in memory and gives one back. ``quantize_layers`` is the same loop between two
protocols, a ``Source`` that reads layers and a ``Sink`` that keeps them, so that a checkpoint larger than memory
streams through: at any moment there are one layer in floating point, the calibration activations, and what the
sink has not written yet. A sink that keeps finished layers lets a run resume: they are not quantised again.

The embedding, the norms and the head stay as they are; a tied head stays the embedding itself.

Left out: fp8 (it comes with ``formats.floats``), mixed schemes by layer, quantising the head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from refllm.model.llama import Layer
from refllm.quant.calibrate import Source
from refllm.quant.report import Report, TensorReport

__all__ = ["Progress", "Report", "Sink", "Source", "TensorReport"]

Progress = Callable[[int, int, TensorReport], None]  # tensors done, tensors in all, the row of the newest


class Sink(Protocol):
    """Where quantised layers go: a tree in memory, or files."""

    def done(self, index: int) -> Sequence[TensorReport] | None:
        """The rows of a layer that an earlier run finished and stored whole; None if it is still to be done."""
        ...

    def layer(self, index: int) -> Layer:
        """A finished layer as the quantised network computes with it. Asked for only where ``done`` gave rows and a
        later layer's calibration needs its output."""
        ...

    def put(self, index: int, layer: Layer, rows: Sequence[TensorReport]) -> Layer:
        """Keep a layer, durably when this returns; give back what ``layer(index)`` would give.

        Projections are quantised ``Linear``s; norm gains may have changed (folding). Later layers are calibrated
        on what comes back: where storing rounds (gains in float16), a resumed run then sees the same numbers.
        """
        ...
