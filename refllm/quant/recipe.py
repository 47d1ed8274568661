"""Whole models: calibrate, transform, quantise and report, one decoder layer at a time.

``quantize_model`` takes a model in memory and returns one. ``quantize_layers`` is the same
loop between two protocols, a ``LayerSource`` that reads layers and a ``LayerSink`` that
keeps them, so that a checkpoint larger than memory streams through. At any moment memory
holds one layer in floating point, the calibration activations, and what the sink has not
written yet. A sink that keeps finished layers lets a run resume: they are not quantised
again.

| method      | weights                   | activations             | later layers read | tokens |
|-------------|---------------------------|-------------------------|-------------------|--------|
| rtn         | rounded to nearest        | not quantised           | quantised outputs | no     |
| gptq        | rounded with compensation | not quantised           | quantised outputs | yes    |
| awq         | scaled, clipped, rounded  | not quantised           | original outputs  | yes    |
| smoothquant | 8 bits, a scale per row   | 8 bits                  | original outputs  | yes    |
| int8        | 8 bits, a scale per row   | 8 bits, except outliers | quantised outputs | no     |
| fp8         | 8-bit floats, in blocks   | 8-bit floats            | quantised outputs | no     |

Embedding, norms and head are not quantised; a tied head stays the embedding itself.

Left out: different schemes for different layers, quantising the head.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from refllm.array_types import Json
from refllm.checkpoints.tensor_files import tensor_shapes
from refllm.errors import InputError, alternatives
from refllm.formats.uniform import Scheme
from refllm.model.config import ModelConfig
from refllm.model.llama import PROJECTION_WEIGHTS, PROJECTIONS, Layer
from refllm.quant.awq_model import AWQ
from refllm.quant.fp8 import FP8
from refllm.quant.gptq import GPTQ
from refllm.quant.layer_inputs import Batch, Calibration, LayerRun, LayerSource, embed, sequences
from refllm.quant.layer_io import CheckpointSource, MemorySink, ModelSource
from refllm.quant.llm_int8 import Int8
from refllm.quant.methods import Method, Report, ReportTensor, TensorReport
from refllm.quant.rotation import wrap_rotated
from refllm.quant.rtn import RTN
from refllm.quant.smoothquant import SmoothQuant

__all__ = ["METHODS", "CheckpointSource", "LayerSink", "LayerSource", "MemorySink", "ModelSource",
           "Progress", "Report", "TensorReport", "default_scheme", "make", "quantize_layers",
           "quantize_model", "settings"]  # fmt: skip

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (RTN, GPTQ, AWQ, SmoothQuant, Int8, FP8)
}
# (tensors done, all tensors, the report on the newest)
Progress = Callable[[int, int, TensorReport], None]
M = TypeVar("M")


class LayerSink(Protocol):
    """Where quantised layers go: a list in memory, or files."""

    def done(self, index: int) -> Sequence[TensorReport] | None:
        """The report on a layer that an earlier run finished and stored completely; None if
        the layer still has to be quantised.
        """
        ...

    def layer(self, index: int) -> Layer:
        """A finished layer as the quantised network computes with it. Called only where
        ``done`` returned a report, and a later layer that is not done needs its outputs.
        """
        ...

    def put(self, index: int, layer: Layer, rows: Sequence[TensorReport]) -> object:
        """Keep a layer; it is stored durably when this returns.

        Projections are quantised ``Linear``s; norm gains and biases may have changed
        (folding).
        """
        ...


def make(method: str, **options: object) -> Method:
    """The method of that name with these options; ValueError for unknown names, listing the
    known ones.
    """
    kind = _method(method)
    known = [field.name for field in dataclasses.fields(kind)]
    for name in options:
        if name not in known:
            raise InputError(f"{method} has no option {name!r}; its options are {', '.join(known)}")
    return kind(**options)


def default_scheme(method: str) -> Scheme:
    """The scheme that a method uses unless another one is given.

    >>> print(default_scheme("awq"))
    Scheme(bits=4, rule='awq', granularity='group', group_size=128)
    """
    return _method(method).default_scheme


def _method(name: str) -> type[Method]:
    """The class of a method; ValueError if there is none of that name."""
    if name not in METHODS:
        raise InputError(f"unknown method {name!r}; {alternatives(name, METHODS)}")
    return METHODS[name]


def quantize_model(
    model: M,
    method: str,
    scheme: Scheme | None = None,
    calibration: Calibration | None = None,
    *,
    progress: Progress | None = None,
    **options: object,
) -> tuple[M, Report]:
    """Quantise the projections of ``model``: a ``Model``, or any record of config, weights
    and tokenizer.

    Returns a record of the same kind, which runs through the same ``forward``, and the
    report. ``model`` is not changed; it shares embedding, norms and head with the result
    (except gains that scales were folded into).

    Parameters
    ----------
    method
        ``"rtn"``, ``"gptq"``, ``"awq"``, ``"smoothquant"``, ``"int8"`` or ``"fp8"``;
        ``options`` are the fields of its class (``METHODS``).
    scheme
        of the weights; None is ``default_scheme(method)``.
    calibration
        token ids [B, S], or sequences of them; see ``layer_inputs.calibration_windows``.

    Raises
    ------
    ValueError
        for an unknown method or option, a scheme that does not fit the method or the
        network's shapes, missing or invalid token ids, and values that are not finite
        (naming the tensor).
    """
    record: Any = model
    sink = MemorySink()
    source = ModelSource(record.config, record.weights)
    report = quantize_layers(
        source, sink, method, scheme, calibration, progress=progress, **options
    )
    weights = record.weights | {"layers": [wrap_rotated(layer) for layer in sink.layers]}
    if dataclasses.is_dataclass(record):
        result: Any = dataclasses.replace(record, weights=weights)  # type: ignore[type-var]
    else:
        result = copy.copy(record)
        result.weights = weights
    return result, report


def quantize_layers(
    source: LayerSource,
    sink: LayerSink,
    method: str,
    scheme: Scheme | None = None,
    calibration: Calibration | None = None,
    *,
    progress: Progress | None = None,
    **options: object,
) -> Report:
    """Quantise every layer of ``source`` into ``sink``; arguments and errors are those of
    ``quantize_model``.
    """
    began = time.perf_counter()
    config = source.config
    quantizer = make(method, **options)
    scheme = default_scheme(method) if scheme is None else scheme
    quantizer.check(scheme)
    check_shapes(config, scheme)
    if calibration is None and quantizer.calibrates:
        raise InputError(
            f"{method} needs calibration tokens: pass token ids [B, S], for example from "
            "calibration_windows"
        )
    ids = None if calibration is None else sequences(calibration, config.vocab_size)
    count = config.num_hidden_layers
    finished = [sink.done(index) for index in range(count)]
    # nothing reads the outputs of this layer
    last = max((i for i in range(count) if finished[i] is None), default=-1)
    batches = embed(source, ids) if ids is not None and last >= 0 else []
    rows: list[TensorReport] = []

    def report(row: TensorReport) -> None:
        rows.append(row)
        if progress is not None:
            progress(len(rows), count * len(PROJECTIONS), row)

    for index, stored in enumerate(finished):
        if stored is None:
            needed = index < last
            _quantize_layer(source, sink, index, quantizer, scheme, batches, report, needed)
            continue
        for row in stored:
            report(row)
        if batches and index < last:
            layer = sink.layer(index) if quantizer.sequential else source.layer(index)
            LayerRun(config, index, layer, batches).finish()
    return Report(method, scheme, tuple(rows), time.perf_counter() - began)


def _quantize_layer(
    source: LayerSource,
    sink: LayerSink,
    index: int,
    method: Method,
    scheme: Scheme,
    batches: list[Batch],
    report: ReportTensor,
    outputs_needed: bool,
) -> None:
    """One layer from source to sink. A function, so that nothing of the layer is alive when
    the next one is read.
    """
    run = LayerRun(source.config, index, source.layer(index), batches)
    rows: list[TensorReport] = []

    def collect(row: TensorReport) -> None:
        rows.append(row)
        report(row)

    layer = method.quantize(run, scheme, collect)
    if outputs_needed:
        run.finish()
    run.layer = {}
    sink.put(index, layer, rows)


def check_shapes(config: ModelConfig, scheme: Scheme) -> None:
    """ValueError naming a projection that the scheme does not fit, before anything is computed."""
    for name, shape in tensor_shapes(config):
        if name.endswith(PROJECTION_WEIGHTS):
            try:
                scheme.scale_shape(shape)
            except ValueError as error:
                raise InputError(f"{name}: {error}") from error


def settings(
    method: str, scheme: Scheme | None, calibration: Calibration | None, **options: object
) -> Json:
    """Everything that determines the result, as JSON: a run can only resume one that was
    begun with equal settings.
    """
    quantizer = make(method, **options)
    tokens = None
    if calibration is not None:
        ids = sequences(calibration, 2**31)
        digest = hashlib.sha256(repr(ids).encode()).hexdigest()
        tokens = {"sequences": len(ids), "tokens": sum(map(len, ids)), "sha256": digest}
    found = {
        "method": method,
        "options": dataclasses.asdict(quantizer),
        "scheme": dataclasses.asdict(default_scheme(method) if scheme is None else scheme),
        "calibration": tokens,
    }
    # tuples become lists, as they do in a file
    plain: Json = json.loads(json.dumps(found))
    return plain
