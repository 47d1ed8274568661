"""What all quantisation methods share: the loop over a layer's projections, and the report.

A method is a frozen dataclass of its options, defined in the file of its technique. Its
``quantize`` turns one decoder layer into one with quantised projections. The loop is::

    for names in run.stages():                       # q k v | o | gate up | down
        quantize_weight = method.stage_quantizer(run, scheme)
        for name in names:                           # Method.quantize_projections
            made = quantize_weight(name, run.layer[name].dequantize())
            run.layer[name] = made.linear            # later projections see its errors
            report(tensor_report(...))

*Sequential* methods (RTN, GPTQ, LLM.int8(), FP8) run exactly this, so later projections and
later layers see the errors of earlier ones and can compensate for them. AWQ and SmoothQuant
look at the original layer, as their authors do: they override ``quantize``, transform the
whole layer first, and share ``quantize_projections``.

| column       | meaning                                                                  |
|--------------|--------------------------------------------------------------------------|
| bits         | bits per weight as stored, scales and zero points included               |
| weight error | ‖W − Ŵ‖² / ‖W‖² of the weight that was rounded (after folding, if any)   |
| output error | ‖ŷ − y‖² / ‖y‖² on calibration inputs; none without calibration          |
| loss         | the method's own objective (GPTQ's Σ, AWQ's best loss); none without one |

Left out: the arithmetic of each technique (its own file), the loss of a whole layer or
model (``experiments.quantization_quality`` measures bits per byte).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from refllm.backend import Array, namespace
from refllm.errors import InputError
from refllm.formats.uniform import Scheme
from refllm.model.llama import Layer, projection_name
from refllm.model.weights import Linear
from refllm.quant.layer_inputs import LayerRun

__all__ = ["Clock", "Method", "QuantizedProjection", "Report", "TensorReport", "relative_error",
           "sample_inputs", "tensor_report"]  # fmt: skip

SAMPLED = 512  # tokens on which the output error of a projection is measured


# --- the report -----------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorReport:
    """What quantising one projection of one layer did."""

    layer: int
    name: str  # "q_proj" …, a key of ``llama.PROJECTIONS``
    method: str
    shape: tuple[int, int]  # [M, N]
    nbytes: int
    weight_error: float
    output_error: float | None
    loss: float | None
    seconds: float
    note: str = ""  # worth knowing: dead channels, raised damping, too few tokens

    @property
    def bits(self) -> float:
        """Bits per weight, scales and zero points included."""
        return 8.0 * self.nbytes / (self.shape[0] * self.shape[1])

    @property
    def tensor(self) -> str:
        """The name in the checkpoint, without ``.weight``."""
        return projection_name(self.layer, self.name)

    @property
    def cells(self) -> tuple[str, ...]:
        """The row of ``Report.table``."""
        figures = (self.weight_error, self.output_error, self.loss)
        errors = ["-" if figure is None else f"{figure:.3g}" for figure in figures]
        shape = f"{self.shape[0]} × {self.shape[1]}"
        return (self.tensor, shape, f"{self.bits:.3f}", *errors, f"{self.seconds:.2f}")


@dataclass(frozen=True)
class Report:
    """What quantising a model did: one row per tensor in the order of the network, and totals."""

    method: str
    scheme: Scheme
    tensors: tuple[TensorReport, ...]
    seconds: float

    @property
    def nbytes(self) -> int:
        """Bytes of the quantised projections; embedding, norms and head are not counted."""
        return sum(t.nbytes for t in self.tensors)

    @property
    def weights(self) -> int:
        """How many weights were quantised."""
        return sum(t.shape[0] * t.shape[1] for t in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Over the quantised projections; 0 if there are none."""
        if self.weights:
            return 8.0 * self.nbytes / self.weights
        return 0.0

    @property
    def notes(self) -> list[str]:
        """One sentence for each tensor with a note."""
        return [f"{t.tensor}: {t.note}" for t in self.tensors if t.note]

    def table(self) -> str:
        """The rows as aligned text: one line per tensor, and one for all."""
        head = ("tensor", "shape", "bits", "weight error", "output error", "loss", "s")
        total = ("all", f"{self.weights:,}", f"{self.bits_per_weight:.3f}", "", "", "",
                 f"{self.seconds:.2f}")  # fmt: skip
        return _aligned([head, *(t.cells for t in self.tensors), total])


def tensor_report(
    layer: int,
    name: str,
    method: str,
    weight: Array,
    made: Linear,
    x: Array | None,
    seconds: float,
    loss: float | None = None,
    note: str = "",
) -> TensorReport:
    """Compare W[M, N] with the ``Linear`` that it became, on inputs x[T, N] if there are any."""
    output_error = None
    if x is not None:
        output_error = relative_error(x @ weight.T, made.matmul(x))  # both [T, M]
    weight_error = relative_error(weight, made.dequantize())
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
    """‖rounded − exact‖² / ‖exact‖², summed in float64; 0 where both are zero.

    >>> import numpy as np
    >>> relative_error(np.array([3.0, 4.0]), np.array([3.0, 4.5]))
    0.01
    """
    xp = namespace(exact, rounded)
    error = float(xp.sum(xp.square(rounded - exact), dtype=xp.float64))
    size = float(xp.sum(xp.square(exact), dtype=xp.float64))
    if size:
        return error / size
    if error == 0:
        return 0.0
    return math.inf


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    """A table in columns: the first flush left, the others flush right."""
    first, *others = zip(*lines, strict=True)
    columns = [[cell.ljust(max(map(len, first))) for cell in first]]
    columns += [[cell.rjust(max(map(len, column))) for cell in column] for column in others]
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))


# --- the loop -------------------------------------------------------------------------------


class QuantizedProjection(NamedTuple):
    """What a method made of one weight."""

    linear: Linear
    loss: float | None = None
    note: str = ""


QuantizeWeight = Callable[[str, Array], QuantizedProjection]  # (name, W[M, N]) -> made
ReportTensor = Callable[[TensorReport], None]


class Clock:
    """Seconds since it was created: ``clock()``."""

    def __init__(self) -> None:
        self.began = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self.began


@dataclass(frozen=True)
class Method:
    """Base of all methods: fields are options, class variables are properties of the technique.

    A sequential method implements ``stage_quantizer``; any other overrides ``quantize``.
    ``scale_dtype`` of those that have it is the dtype in which scales are stored: they are
    rounded to it before codes are computed with them. None keeps the dtype of the weight.
    """

    name: ClassVar[str]
    default_scheme: ClassVar[Scheme]  # of the weights
    calibrates: ClassVar[bool]  # whether it needs calibration tokens
    sequential: ClassVar[bool]  # whether later layers read the quantised layer's outputs

    def check(self, scheme: Scheme) -> None:
        """ValueError for a scheme that the method cannot use: by default each scale must
        belong to a single row, or to the whole weight.
        """
        if scheme.granularity not in ("channel", "group", "tensor"):
            raise InputError(
                f"weights are quantised by channel, group or tensor, not by {scheme.granularity!r}"
            )

    def stage_quantizer(self, run: LayerRun, scheme: Scheme) -> QuantizeWeight:
        """The function that quantises each weight of the run's current stage.

        Work that the projections of a stage share (they read the same inputs) is done here.
        """
        raise NotImplementedError

    def quantize(self, run: LayerRun, scheme: Scheme, report: ReportTensor) -> Layer:
        """The layer of ``run`` with quantised projections; ``report`` is called after each."""
        for names in run.stages():
            sample = sample_inputs(run)
            clock = Clock()
            quantize_weight = self.stage_quantizer(run, scheme)
            self.quantize_projections(
                run,
                run.layer,
                dict.fromkeys(names, sample),
                quantize_weight,
                report,
                shared_seconds=clock() / len(names),
            )
        return run.layer

    def quantize_projections(
        self,
        run: LayerRun,
        layer: Layer,
        samples: Mapping[str, Array | None],
        quantize_weight: QuantizeWeight,
        report: ReportTensor,
        *,
        exact: Layer | None = None,
        shared_seconds: float = 0.0,
    ) -> None:
        """Replace each projection of ``layer`` that ``samples`` names, and report on it.

        Parameters
        ----------
        samples
            projection → inputs x[T, N] on which its output error is measured, or None.
        exact
            the layer whose weights errors are measured against; None is ``layer`` itself.
        shared_seconds
            added to each projection's seconds: its part of the work done for all.
        """
        for name, x in samples.items():
            clock = Clock()
            weight = layer[name].dequantize()
            made = quantize_weight(name, weight)
            seconds = shared_seconds + clock()
            layer[name] = made.linear
            if exact is not None:
                weight = exact[name].dequantize()
            report(
                tensor_report(
                    run.index,
                    name,
                    self.name,
                    weight,
                    made.linear,
                    x,
                    seconds,
                    made.loss,
                    made.note,
                )
            )


def sample_inputs(run: LayerRun) -> Array | None:
    """The first inputs of the run's current stage, [≤ SAMPLED, N]; None without calibration."""
    for x in run.inputs(run.batches[:1]):
        return x[:SAMPLED, :]
    return None
