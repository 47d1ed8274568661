"""What quantising a model did: one row a tensor, and the totals.

| column       | meaning                                                                                       |
|--------------|-----------------------------------------------------------------------------------------------|
| bits         | bits a weight as stored, scales and zero points included                                      |
| weight error | ‖W − Ŵ‖² / ‖W‖², of the weight that was encoded (after folding, where a method folds)          |
| output error | Σ ‖ŷ − y‖² / Σ ‖y‖² of the product on calibration inputs; none where nothing was calibrated    |
| loss         | the method's own objective: GPTQ's Σ, AWQ's best loss; none where a method has none            |

Left out: losses of a whole layer or model (``experiments.quantization_quality`` measures
what text costs).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from refllm.backend import Array, namespace
from refllm.formats.uniform import Scheme
from refllm.model.llama import PROJECTIONS
from refllm.model.weights import Linear


@dataclass(frozen=True)
class TensorReport:
    """One projection of one layer."""

    layer: int
    name: str  # "q_proj" …, a key of ``llama.PROJECTIONS``
    method: str
    shape: tuple[int, int]  # [M, N]
    nbytes: int
    weight_error: float
    output_error: float | None
    loss: float | None
    seconds: float
    note: str = ""  # what a reader should know: dead channels, raised damping, too few tokens

    @property
    def bits(self) -> float:
        """Bits a weight, scales and zero points included."""
        return 8.0 * self.nbytes / (self.shape[0] * self.shape[1])

    @property
    def tensor(self) -> str:
        """The name in the checkpoint, without ``.weight``."""
        return f"model.layers.{self.layer}.{PROJECTIONS[self.name]}"


@dataclass(frozen=True)
class Report:
    """Every row, in the order of the network, and what was asked for."""

    method: str
    scheme: Scheme
    tensors: tuple[TensorReport, ...]
    seconds: float

    @property
    def nbytes(self) -> int:
        """Bytes of the quantised projections (embedding, norms and head stay as they were)."""
        return sum(t.nbytes for t in self.tensors)

    @property
    def weights(self) -> int:
        """How many numbers were quantised."""
        return sum(t.shape[0] * t.shape[1] for t in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Over the quantised projections."""
        if self.weights:
            return 8.0 * self.nbytes / self.weights
        return 0.0

    @property
    def notes(self) -> list[str]:
        """What a reader should know, one sentence a tensor."""
        return [f"{t.tensor}: {t.note}" for t in self.tensors if t.note]

    def table(self) -> str:
        """The rows as text, one line a tensor and one for all."""
        header = ("tensor", "shape", "bits", "weight error", "output error", "loss", "s")
        lines = [header, *(_cells(t) for t in self.tensors)]
        lines.append(
            (
                "all",
                f"{self.weights:,}",
                f"{self.bits_per_weight:.3f}",
                "",
                "",
                "",
                f"{self.seconds:.2f}",
            )
        )
        return _aligned(lines)


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.began = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self.began


def row(
    layer: int,
    name: str,
    method: str,
    dense: Array,
    made: Linear,
    x: Array | None,
    seconds: float,
    loss: float | None = None,
    note: str = "",
) -> TensorReport:
    """The row of a projection: W[M, N] as it was, the ``Linear`` that it became, inputs
    x[T, N] to compare them on.
    """
    if x is None:
        output_error = None
    else:
        output_error = relative_error(x @ dense.T, made.matmul(x))
    weight_error = relative_error(dense, made.dequantize())
    return TensorReport(
        layer,
        name,
        method,
        made.shape,
        made.nbytes,
        weight_error,
        output_error,
        loss,
        seconds,
        note,
    )


def relative_error(exact: Array, rounded: Array) -> float:
    """‖rounded − exact‖² / ‖exact‖², summed in float64; 0 where both are zero."""
    xp = namespace(exact, rounded)
    error = float(xp.sum(xp.square(rounded - exact), dtype=xp.float64))
    size = float(xp.sum(xp.square(exact), dtype=xp.float64))
    if size:
        return error / size
    if error == 0:
        return 0.0
    return math.inf


def _cells(t: TensorReport) -> tuple[str, ...]:
    errors = ["-" if e is None else f"{e:.3g}" for e in (t.weight_error, t.output_error, t.loss)]
    return (t.tensor, f"{t.shape[0]} × {t.shape[1]}", f"{t.bits:.3f}", *errors, f"{t.seconds:.2f}")


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = (
        [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        for line in lines
    )
    return "\n".join("  ".join(row).rstrip() for row in rows)
