"""A checkpoint quantised from start to finish: text, layers one by one, the new directory,
what it costs.

| step    | what happens                                                                                          |
|---------|-------------------------------------------------------------------------------------------------------|
| prepare | everything that can be refused is refused: names, shapes, layout, text, an output that is taken       |
| go      | ``recipe.quantize_layers`` from the source's files into ``work``, a file a layer; then ``assemble``   |
| measure | bits per byte of the source and of the new directory, before it takes its name                       |

Memory holds one decoder layer in floats and the calibration activations. Measuring holds a
whole model, one of the two at a time; it can be left out. ``work`` makes an interrupted run
go on: see ``quant.layer_io``.

Left out: choosing a method or a scheme by what it costs
(``experiments.quantization_quality`` has the table).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refllm import __version__
from refllm.checkpoints.loading import load, read_config
from refllm.checkpoints.tensor_files import CheckpointError, tensor_shapes
from refllm.checkpoints.tokenizer import Tokenizer
from refllm.checkpoints.writer import STORED_TYPES, check_target, documents, resolved, write_text
from refllm.corpus import Document, held_out_documents
from refllm.formats.float_layouts import layout_for as float_layout_for
from refllm.formats.layouts import layout_for
from refllm.formats.uniform import Scheme
from refllm.measure.perplexity import evaluate
from refllm.model.config import ModelConfig
from refllm.model.llama import PROJECTIONS
from refllm.quant import recipe
from refllm.quant.calibration_data import calibration_windows
from refllm.quant.export import ExportSpec, default_layout
from refllm.quant.fp8 import fp8
from refllm.quant.layer_io import LayerFiles, assemble
from refllm.quant.recipe import make

RECORD = "quantization.json"
KEPT = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
        "chat_template.jinja", "LICENSE")  # text files that go over as they are  # fmt: skip
ROOM = 16  # characters of a document that are encoded for each token that a window needs

Measuring = Callable[[str, int, int], None]  # what is measured, tokens done, tokens in all


@dataclass(frozen=True)
class Job:
    """What ``prepare`` made sure of."""

    source: Path
    output: Path
    work: Path
    method: str
    scheme: Scheme
    storing: ExportSpec
    options: Mapping[str, Any]
    calibration: np.ndarray | None  # token ids [B, S]
    overwrite: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the bytes of a layer; a run goes on only where all of it is the
        same.
        """
        weights = sorted(p for p in self.source.iterdir() if p.suffix == ".safetensors")
        files = {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in weights}
        return recipe.settings(self.method, self.scheme, self.calibration, **self.options) | {
            "layout": self.storing.layout.name,
            "dtype": self.storing.dtype,
            "model": files,
        }


def scheme_of(
    method: str, bits: int | None, group_size: int | None, symmetric: bool | None
) -> Scheme:
    """A method's usual scheme with what was asked for; a group of 0 or −1 columns is a
    scale a row.
    """
    make(method)  # refuses unknown names
    usual = recipe.default_scheme(method)
    if group_size is None:
        group = usual.group_size
    elif group_size in (0, -1):
        group = None
    else:
        group = group_size
    rule = usual.rule
    if symmetric is not None and symmetric != usual.symmetric:
        rule = "half_integer" if symmetric else "asymmetric"
    if method == "fp8" and symmetric is False:
        raise ValueError("fp8 has no zero points: its codes are floats, leave --asymmetric out")
    if bits == 1 and rule != "asymmetric":
        raise ValueError(
            "one bit around zero has no other level than 0: take --bits 2, or --asymmetric"
        )
    shared = "block" if usual.granularity == "block" else "group"
    return Scheme(
        usual.bits if bits is None else bits, rule, "channel" if group is None else shared, group
    )


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
    **options: Any,
) -> Job:
    """Check everything and draw the calibration text: ``samples`` windows of ``length``
    tokens (None: 512).

    ``texts`` None are the standard library's modules, but for those that are measured on.
    ``dtype`` None is the source's where that has two bytes, else float16. ``options`` are
    the method's.

    Raises
    ------
    ValueError
        for whatever would fail later, in one sentence that says what to do.
    """
    config = read_config(source)
    output = resolved(output)
    check_free(output, overwrite)
    dtype = _dtype(source) if dtype is None else dtype
    if dtype not in STORED_TYPES:
        raise ValueError(f"dtype {dtype!r} is not stored; choose one of {', '.join(STORED_TYPES)}")
    options |= {"scale_dtype": dtype} if method not in ("int8", "fp8") else {}
    if method == "smoothquant":
        # activations as the readers of the file round them
        options = {"rule": "half_integer"} | options
    how = make(method, **options)
    how.check(scheme)
    recipe.check_shapes(config, scheme)
    storing = _storing(config, method, scheme, layout, dtype, options)
    ids = None
    if how.calibrates:
        tokenizer = Tokenizer.from_file(source / "tokenizer.json")
        ids = _calibration(config, tokenizer, method, texts, samples, length, seed)
    if work is None:
        work = output.with_name(output.name + ".quantizing")
    else:
        work = work
    return Job(source, output, work, method, scheme, storing, options, ids, overwrite)


def check_free(output: Path, overwrite: bool) -> None:
    """CheckpointError if ``output`` is taken."""
    if not overwrite and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(
            f"{output} exists already: choose another --output, or pass --overwrite"
        )
    check_target(output, overwrite=True)  # only a checkpoint is replaced, even so


def _dtype(source: Path) -> str:
    raw = json.loads((source / "config.json").read_text("utf-8"))
    said = raw.get("dtype", raw.get("torch_dtype"))
    if said in ("float16", "bfloat16"):
        return str(said)
    return "float16"


def _storing(
    config: ModelConfig,
    method: str,
    scheme: Scheme,
    layout: str | None,
    dtype: str,
    options: Mapping[str, Any],
) -> ExportSpec:
    about = {
        "activations": method == "smoothquant",
        "act_order": bool(options.get("act_order")) and not options.get("static_groups"),
    }
    if about["act_order"] and scheme.granularity != "group":
        about["act_order"] = False
    if method == "fp8":
        side = scheme.block[0] if scheme.granularity == "block" else 1
        # a block tells of all
        stored = float_layout_for(fp8(np.zeros((side, side), np.float32), scheme), layout)
    else:
        stored = layout_for(scheme, layout or default_layout(scheme, **about), **about)
    storing = ExportSpec(stored, dtype, tuple(options.get("keep", ())))
    storing.plan(config)  # refuses shapes that the layout has no place for
    return storing


def _calibration(
    config: ModelConfig,
    tokenizer: Tokenizer,
    method: str,
    texts: Sequence[Document] | None,
    samples: int,
    length: int | None,
    seed: int,
) -> np.ndarray:
    longest = config.max_position_embeddings
    length = min(512, longest) if length is None else length
    if length > longest:
        raise ValueError(
            f"calibration: windows of {length} tokens are longer than the model's {longest} positions"
        )
    if texts is not None:
        held = 0
        for text in texts:
            held += len(tokenizer.encode(text.text[: ROOM * length]))
            if held >= length:
                break
        else:
            raise ValueError(
                f"calibration: the text has {held} tokens, too few for a window of {length}: give more "
                "text, or shorter windows (--length)"
            )
    widest = max(shape[1] for name, shape in tensor_shapes(config) if name.endswith(_ENDS))
    if method == "gptq" and samples * length < widest:
        raise ValueError(
            f"calibration: {samples} windows of {length} tokens are too few for inputs of {widest} "
            f"columns: gptq needs at least {-(-widest // length)} (--samples)"
        )
    return calibration_windows(tokenizer, samples, length, seed, documents=texts)


_ENDS = tuple(f"{path}.weight" for path in PROJECTIONS.values())


def go(
    job: Job,
    *,
    backend: str | None = None,
    measure: int | None = 20_000,
    progress: recipe.Progress | None = None,
    measuring: Measuring | None = None,
) -> dict[str, Any]:
    """Quantise, write, measure on the first ``measure`` held-out tokens (None: not at all);
    returns the record.

    The record is also the file ``quantization.json`` of the new directory.
    """
    record: dict[str, Any] = {}
    with recipe.CheckpointSource(job.source, backend=backend) as source:
        layers = LayerFiles(job.work, source, job.storing, job.settings)
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
                record["bits per byte"] = _measured(
                    job.source, directory, backend, measure, measuring
                )
            write_text(directory / RECORD, json.dumps(record, indent=1) + "\n")

        tokenizer = Tokenizer.from_file(job.source / "tokenizer.json")
        texts = documents(
            source.config, tokenizer, job.storing.dtype, {}, quantization_config=job.storing.config_entry
        )
        for name in KEPT:  # a chat template, say, is in them
            if (job.source / name).is_file():
                texts[name] = (job.source / name).read_text("utf-8")
        check_free(job.output, job.overwrite)
        began = time.perf_counter()
        assemble(job.output, layers, source.files, texts, finish=finish)
    record["seconds"]["writing and measuring"] = time.perf_counter() - began
    shutil.rmtree(job.work)
    return record


def _record(job: Job, report: recipe.Report, directory: Path) -> dict[str, Any]:
    """What was done, and what it takes, as plain data."""
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
            "model": _bytes(directory),
            "model before": _bytes(job.source),
        },
        "bits per byte": None,
        "seconds": {
            "quantising": sum(t.seconds for t in report.tensors),
            "this run": report.seconds,
        },
        "notes": report.notes,
        "tensors": [dataclasses.asdict(t) | {"bits": t.bits} for t in report.tensors],
    }


def _bytes(directory: Path) -> int:
    return sum(p.stat().st_size for p in directory.iterdir() if p.suffix == ".safetensors")


def _measured(
    before: Path, after: Path, backend: str | None, tokens: int, measuring: Measuring | None
) -> dict[str, Any]:
    """Bits per byte of both on the same held-out text, one model in memory at a time."""
    found: dict[str, Any] = {}
    for what, path in (("before", before), ("after", after)):
        model = load(path, backend=backend)
        window = min(1024, model.config.max_position_embeddings)

        def tell(done: int, total: int, what: str = what) -> None:
            if measuring is not None:
                measuring(what, done, total)

        score = evaluate(
            model,
            held_out_documents(),
            window=window,
            stride=max(1, window // 2),
            max_tokens=tokens,
            progress=tell,
        )
        found |= {what: score.bits_per_byte, "tokens": score.tokens, "python": score.python}
    return found
