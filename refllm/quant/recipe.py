"""Whole models: calibrate, transform, quantise and report, one decoder layer at a time.

``quantize_model`` takes a model in memory and gives one back. ``quantize_layers`` is the
same loop between two protocols, a ``Source`` that reads layers and a ``Sink`` that keeps
them, so that a checkpoint larger than memory streams through: at any moment there are one
layer in floating point, the calibration activations, and what the sink has not written yet.
A sink that keeps finished layers lets a run resume: they are not quantised again.

| method      | weights                       | activations    | text goes on through     | needs text |
|-------------|-------------------------------|----------------|--------------------------|------------|
| rtn         | rounded to nearest            | as they are    | the quantised layer      | no         |
| gptq        | rounded with compensation     | as they are    | the quantised layer      | yes        |
| awq         | scaled, clipped, rounded      | as they are    | the layer as it was      | yes        |
| smoothquant | 8 bits, a scale a row         | 8 bits         | the layer as it was      | yes        |
| int8        | 8 bits, a scale a row         | 8 bits, but for outliers | the quantised layer | no    |
| fp8         | 8-bit floats, in blocks       | 8-bit floats   | the quantised layer      | no         |

The embedding, the norms' precision and the head stay as they are; a tied head stays the
embedding itself.

Left out: mixed schemes by layer, quantising the head.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from refllm.checkpoints.tensor_files import tensor_shapes
from refllm.formats.uniform import Scheme
from refllm.model.config import ModelConfig
from refllm.model.llama import PROJECTIONS, Layer
from refllm.quant.calibration_data import sequences
from refllm.quant.layer_io import CheckpointSource, MemorySink, ModelSource
from refllm.quant.layer_inputs import Batch, LayerRun, Source, embed
from refllm.quant.methods import METHODS, Method, default_scheme, make
from refllm.quant.report import Report, TensorReport

__all__ = [
    "METHODS", "CheckpointSource", "MemorySink", "ModelSource", "Progress", "Report", "Sink", "Source", "TensorReport",
    "default_scheme", "quantize_layers", "quantize_model", "settings",
]  # fmt: skip

# tensors done, tensors in all, the row of the newest
Progress = Callable[[int, int, TensorReport], None]
M = TypeVar("M")


class Sink(Protocol):
    """Where quantised layers go: a tree in memory, or files."""

    def done(self, index: int) -> Sequence[TensorReport] | None:
        """The rows of a layer that an earlier run finished and stored whole; None if it is
        still to be done.
        """
        ...

    def layer(self, index: int) -> Layer:
        """A finished layer as the quantised network computes with it. Asked for only where
        ``done`` gave rows and the text must go through it to reach a later layer that is
        still to be done.
        """
        ...

    def put(self, index: int, layer: Layer, rows: Sequence[TensorReport]) -> object:
        """Keep a layer, durably when this returns.

        Projections are quantised ``Linear``s; norm gains and biases may have changed
        (folding).
        """
        ...


def quantize_model(
    model: M,
    method: str,
    scheme: Scheme | None = None,
    calibration: Any = None,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> tuple[M, Report]:
    """Quantise the projections of ``model``, a ``Model`` or any record with ``.config
    .weights .tokenizer``.

    Returns the same kind of record, which runs through the same ``forward``, and the
    report; ``model`` is left as it is and shares its embedding, norms and head with the
    result (but for gains that something was folded into).

    Parameters
    ----------
    method
        ``"rtn"``, ``"gptq"``, ``"awq"``, ``"smoothquant"``, ``"int8"`` or ``"fp8"``;
        ``options`` are the fields of its class in ``methods``.
    scheme
        of the weights; None is ``default_scheme(method)``.
    calibration
        token ids [B, S], or any number of sequences of them; see
        ``calibrate.calibration_windows``.

    Raises
    ------
    ValueError
        for an unknown method or option, a scheme that does not fit the method or the
        network's shapes, text that is missing or no text, and numbers that are not finite
        (says where).
    """
    record: Any = model
    sink = MemorySink()
    source = ModelSource(record.config, record.weights)
    report = quantize_layers(
        source, sink, method, scheme, calibration, progress=progress, **options
    )
    weights = record.weights | {"layers": sink.layers}
    if dataclasses.is_dataclass(record):
        result: Any = dataclasses.replace(record, weights=weights)  # type: ignore[type-var]
    else:
        result = copy.copy(record)
        result.weights = weights
    return result, report


def quantize_layers(
    source: Source,
    sink: Sink,
    method: str,
    scheme: Scheme | None = None,
    calibration: Any = None,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Quantise every layer of ``source`` into ``sink``; arguments and errors as
    ``quantize_model``'s.
    """
    began = time.perf_counter()
    config = source.config
    how = make(method, **options)
    scheme = default_scheme(method) if scheme is None else scheme
    how.check(scheme)
    check_shapes(config, scheme)
    if calibration is None and how.calibrates:
        raise ValueError(
            f"{method} needs calibration text: pass token ids [B, S], from calibration_windows say"
        )
    count = config.num_hidden_layers
    finished = [sink.done(index) for index in range(count)]
    # nobody reads what leaves this one
    last = max((i for i in range(count) if finished[i] is None), default=-1)
    if calibration is None:
        ids = None
    else:
        ids = sequences(calibration, config.vocab_size)
    batches = embed(source, ids) if ids is not None and last >= 0 else []
    rows: list[TensorReport] = []

    def tell(row: TensorReport) -> None:
        rows.append(row)
        if progress is not None:
            progress(len(rows), count * len(PROJECTIONS), row)

    for index, stored in enumerate(finished):
        if stored is not None:
            for row in stored:
                tell(row)
            if batches and index < last:
                layer = sink.layer(index) if how.sequential else source.layer(index)
                LayerRun(config, index, layer, batches).finish()
            continue
        _quantize_layer(source, sink, index, how, scheme, batches, tell, index < last)
    return Report(method, scheme, tuple(rows), time.perf_counter() - began)


def _quantize_layer(
    source: Source,
    sink: Sink,
    index: int,
    how: Method,
    scheme: Scheme,
    batches: list[Batch],
    tell: Callable[[TensorReport], None],
    goes_on: bool,
) -> None:
    """One layer from source to sink. In a function of its own, so that nothing of it is
    alive at the next.
    """
    run = LayerRun(source.config, index, source.layer(index), batches)
    rows: list[TensorReport] = []

    def note(row: TensorReport) -> None:
        rows.append(row)
        tell(row)

    layer = how.quantize(run, scheme, note)
    if goes_on:
        run.finish()
    run.layer = {}
    sink.put(index, layer, rows)


def check_shapes(config: ModelConfig, scheme: Scheme) -> None:
    """ValueError naming a projection that the scheme does not fit, before anything is
    computed.
    """
    for name, shape in tensor_shapes(config):
        if name.endswith(tuple(f"{path}.weight" for path in PROJECTIONS.values())):
            try:
                scheme.scale_shape(shape)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error


def settings(
    method: str, scheme: Scheme | None, calibration: Any, **options: Any
) -> dict[str, Any]:
    """What decides the result, as JSON: a run may only resume what was begun with equal
    settings.
    """
    how = make(method, **options)
    text = None
    if calibration is not None:
        ids = sequences(calibration, 2**31)
        digest = hashlib.sha256(repr(ids).encode()).hexdigest()
        text = {"sequences": len(ids), "tokens": sum(map(len, ids)), "sha256": digest}
    found = {
        "method": method,
        "options": dataclasses.asdict(how),  # type: ignore[call-overload]
        "scheme": dataclasses.asdict(default_scheme(method) if scheme is None else scheme),
        "calibration": text,
    }
    # tuples become lists, as they do in a file
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain
