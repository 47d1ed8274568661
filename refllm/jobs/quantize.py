"""A checkpoint quantised from start to finish: text, layers one by one, the new directory, and
its loss.

| step    | what happens                                                                          |
|---------|---------------------------------------------------------------------------------------|
| prepare | every check that can be made beforehand: names, shapes, layout, text, the output       |
| run     | ``recipe.quantize_layers`` from the source's files into ``work``, one file per layer;  |
|         | then ``assemble``                                                                      |
| measure | bits per byte of source and new directory, before the directory gets its final name    |

Memory holds one decoder layer in floats and the calibration activations. Measuring holds a
whole model, one of the two at a time; it can be left out. ``work`` lets an interrupted run
continue: see ``quant.layer_io``.

Left out: choosing a method or a scheme by its loss (``experiments.quantization_quality`` has
the table).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refllm import __version__
from refllm.array_types import Json
from refllm.checkpoints.loading import load, read_config
from refllm.checkpoints.tensor_files import CheckpointError, tensor_shapes
from refllm.checkpoints.tokenizer import Tokenizer
from refllm.checkpoints.writer import STORED_TYPES, check_target, documents, resolved, write_text
from refllm.corpus import Document, held_out_documents
from refllm.errors import InputError
from refllm.formats.float_layouts import layout_for as float_layout_for
from refllm.formats.layouts import layout_for
from refllm.formats.uniform import Scheme
from refllm.measure.perplexity import evaluate
from refllm.measure.windows import default_windows
from refllm.model.config import ModelConfig
from refllm.model.llama import PROJECTION_WEIGHTS
from refllm.quant import recipe
from refllm.quant.export import ExportSpec, default_layout
from refllm.quant.fp8 import fp8
from refllm.quant.layer_inputs import calibration_windows
from refllm.quant.layer_io import CheckpointSource, LayerFiles, assemble
from refllm.quant.methods import Report

RECORD = "quantization.json"
COPIED = (  # text files that are copied unchanged
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
)

# of a document: characters that are encoded per token of a window, to see whether it is long enough
ENCODED_CHARACTERS = 16

Measuring = Callable[[str, int, int], None]  # ("before" or "after", tokens done, tokens in all)


@dataclass(frozen=True)
class QuantizationJob:
    """What ``prepare`` has checked and ``run`` needs."""

    source: Path
    output: Path
    work: Path
    method: str
    scheme: Scheme
    export: ExportSpec
    options: Mapping[str, object]  # of the method
    calibration: np.ndarray | None  # token ids [B, S]
    overwrite: bool = False

    @property
    def settings(self) -> Json:
        """Everything that decides the bytes of a layer: a run continues only if all of it is
        the same.
        """
        weights = sorted(p for p in self.source.iterdir() if p.suffix == ".safetensors")
        files = {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in weights}
        return recipe.settings(self.method, self.scheme, self.calibration, **self.options) | {
            "layout": self.export.layout.name,
            "dtype": self.export.dtype,
            "model": files,
        }


def prepare(
    source: Path,
    output: Path,
    method: str,
    scheme: Scheme,
    *,
    work: Path | None = None,
    layout: str | None = None,
    dtype: str | None = None,
    texts: Sequence[Document] | None = None,
    samples: int = 32,
    length: int | None = None,
    seed: int = 0,
    overwrite: bool = False,
    **options: object,
) -> QuantizationJob:
    """Check everything and draw the calibration text: ``samples`` windows of ``length``
    tokens (None: 512, or the context).

    ``texts`` None are the standard library's modules without the held-out ones. ``dtype``
    None is the source's where that has two bytes, else float16. ``options`` are the
    method's.

    Raises
    ------
    ValueError
        for everything that would fail later, in one sentence that says what to do.
    """
    config = read_config(source)
    output = resolved(output)
    check_free(output, overwrite)
    if dtype is None:
        dtype = _stored_dtype(source)
    if dtype not in STORED_TYPES:
        raise InputError(f"dtype {dtype!r} is not stored; choose one of {', '.join(STORED_TYPES)}")
    if method not in ("int8", "fp8"):  # whose scales stay in float32
        options["scale_dtype"] = dtype
    if method == "smoothquant":
        # the rounding of activations in the programs that read the file
        options = {"rule": "half_integer"} | options
    quantizer = recipe.make(method, **options)
    quantizer.check(scheme)
    recipe.check_shapes(config, scheme)
    export = _export_spec(config, method, scheme, layout, dtype, options)
    calibration = None
    if quantizer.calibrates:
        tokenizer = Tokenizer.from_file(source / "tokenizer.json")
        calibration = _calibration_tokens(config, tokenizer, method, texts, samples, length, seed)
    if work is None:
        work = output.with_name(output.name + ".quantizing")
    return QuantizationJob(
        source, output, work, method, scheme, export, options, calibration, overwrite
    )


def _stored_dtype(source: Path) -> str:
    """The dtype of the source where it has two bytes, else float16."""
    raw = json.loads((source / "config.json").read_text("utf-8"))
    dtype = raw.get("dtype", raw.get("torch_dtype"))
    return str(dtype) if dtype in ("float16", "bfloat16") else "float16"


def _export_spec(
    config: ModelConfig,
    method: str,
    scheme: Scheme,
    layout: str | None,
    dtype: str,
    options: Mapping[str, object],
) -> ExportSpec:
    """How the quantised model is stored; ``layout`` None is the usual one for its weights.

    Raises
    ------
    ValueError
        if the layout cannot hold such weights.
    """
    if method == "fp8":
        # one block stands for all: the layout depends on the scheme alone
        side = scheme.block[0] if scheme.granularity == "block" else 1
        block = fp8(np.zeros((side, side), np.float32), scheme)
        stored = float_layout_for(block, layout)
    else:
        activations = method == "smoothquant"
        act_order = bool(options.get("act_order")) and not options.get("static_groups")
        act_order = act_order and scheme.granularity == "group"
        usual = default_layout(scheme, activations=activations, act_order=act_order)
        stored = layout_for(scheme, layout or usual, activations=activations, act_order=act_order)
    keep = options.get("keep", ())
    assert isinstance(keep, tuple)
    spec = ExportSpec(stored, dtype, keep)
    spec.plan(config)  # raises for shapes that the layout cannot hold
    return spec


def _calibration_tokens(
    config: ModelConfig,
    tokenizer: Tokenizer,
    method: str,
    texts: Sequence[Document] | None,
    samples: int,
    length: int | None,
    seed: int,
) -> np.ndarray:
    """Windows of calibration text, [samples, length]; ``length`` None is 512, or the context.

    Raises
    ------
    ValueError
        for windows that the model cannot read, that the text cannot fill, or that are too
        few for GPTQ's Hessians.
    """
    longest = config.max_position_embeddings
    if length is None:
        length = min(512, longest)
    if length > longest:
        raise InputError(
            f"calibration: windows of {length} tokens are longer than the model's {longest} "
            "positions"
        )
    if texts is not None:
        _check_text(tokenizer, texts, length)
    columns = max(
        shape[1] for name, shape in tensor_shapes(config) if name.endswith(PROJECTION_WEIGHTS)
    )
    if method == "gptq" and samples * length < columns:
        raise InputError(
            f"calibration: {samples} windows of {length} tokens are too few for inputs of "
            f"{columns} columns: gptq needs at least {-(-columns // length)} (--samples)"
        )
    return calibration_windows(tokenizer, samples, length, seed, documents=texts)


def _check_text(tokenizer: Tokenizer, texts: Sequence[Document], length: int) -> None:
    """ValueError if all texts together do not fill a window."""
    tokens = 0
    for text in texts:
        tokens += len(tokenizer.encode(text.text[: ENCODED_CHARACTERS * length]))
        if tokens >= length:
            return
    raise InputError(
        f"calibration: the text has {tokens} tokens, too few for a window of {length}: give more "
        "text, or shorter windows (--length)"
    )


def check_free(output: Path, overwrite: bool) -> None:
    """CheckpointError if ``output`` is taken."""
    if not overwrite and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(
            f"{output} exists already: choose another --output, or pass --overwrite"
        )
    check_target(output, overwrite=True)  # even then, only a checkpoint is replaced


def run(
    job: QuantizationJob,
    *,
    backend: str | None = None,
    measure: int | None = 20_000,
    progress: recipe.Progress | None = None,
    measuring: Measuring | None = None,
) -> Json:
    """Quantise, write, measure on the first ``measure`` tokens of the standard library's
    held-out modules (None: not at all); return the record.

    The record is also the file ``quantization.json`` of the new directory.
    """
    record: Json = {}
    with CheckpointSource(job.source, backend=backend) as source:
        layers = LayerFiles(job.work, source, job.export, job.settings)
        report = recipe.quantize_layers(
            source,
            layers,
            job.method,
            job.scheme,
            job.calibration,
            progress=progress,
            **job.options,
        )

        def finish(directory: Path) -> None:
            record.update(_record(job, report, directory))
            if measure is not None:
                record["bits per byte"] = _bits_per_byte(
                    job.source, directory, backend, measure, measuring
                )
            write_text(directory / RECORD, json.dumps(record, indent=1) + "\n")

        texts = documents(
            source.config,
            Tokenizer.from_file(job.source / "tokenizer.json"),
            job.export.dtype,
            {},
            quantization_config=job.export.config_entry,
        )
        for name in COPIED:
            if (job.source / name).is_file():
                texts[name] = (job.source / name).read_text("utf-8")
        check_free(job.output, job.overwrite)
        began = time.perf_counter()
        assemble(job.output, layers, source.files, texts, finish=finish)
    record["seconds"]["writing and measuring"] = time.perf_counter() - began
    shutil.rmtree(job.work)
    return record


def _record(job: QuantizationJob, report: Report, directory: Path) -> Json:
    """Settings, sizes, seconds and errors as plain data."""
    settings = job.settings
    settings.pop("model")
    return {
        "made with": {"refllm": __version__, "numpy": np.__version__},
        "model": job.source.resolve().name,
        **settings,
        "quantised weights": report.weights,
        "bits per weight": report.bits_per_weight,
        "bytes": {
            "quantised weights": report.nbytes,
            "model": _file_bytes(directory),
            "model before": _file_bytes(job.source),
        },
        "bits per byte": None,
        "seconds": {
            "quantising": sum(t.seconds for t in report.tensors),
            "this run": report.seconds,
        },
        "notes": report.notes,
        "tensors": [dataclasses.asdict(t) | {"bits": t.bits} for t in report.tensors],
    }


def _file_bytes(directory: Path) -> int:
    """Bytes of the weights' files."""
    return sum(p.stat().st_size for p in directory.iterdir() if p.suffix == ".safetensors")


def _bits_per_byte(
    before: Path, after: Path, backend: str | None, tokens: int, measuring: Measuring | None
) -> Json:
    """Bits per byte of both models by ``measure.protocol``, on its first
    ``tokens``, one model in memory at a time.
    """
    found: Json = {}
    for label, path in (("before", before), ("after", after)):
        model = load(path, backend=backend)
        window, stride = default_windows(model.config.max_position_embeddings)

        def progress(done: int, total: int, label: str = label) -> None:
            if measuring is not None:
                measuring(label, done, total)

        score = evaluate(
            model,
            held_out_documents(),
            window=window,
            stride=stride,
            max_tokens=tokens,
            progress=progress,
        )
        found |= {label: score.bits_per_byte, "tokens": score.tokens, "python": score.python}
        names = [document.name for document in score.documents if document.tokens]
        found |= {"documents": names, "window": score.window, "stride": score.stride}
    return found
