"""``refllm quantize``: a checkpoint in fewer bits, in a layout that transformers and vLLM
load.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from refllm.cli.main import keep_freed_memory
from refllm.cli.options import (
    BackendOption,
    JsonOption,
    ModelOption,
    OverwriteOption,
    flag,
    opt,
)
from refllm.terminal import console, counted_bar, format_bytes, note, pairs

if TYPE_CHECKING:
    from refllm.jobs.quantize import Job
    from refllm.quant.report import TensorReport

_ROW = "{:>5}  {:>12}  {:>12}  {:>12}  {:>8}"
_METHODS = "rtn|gptq|awq|smoothquant|int8|fp8"
_LAYOUTS = "pack-quantized|int-quantized|naive-quantized|gptq_v2|gptq|awq|float-quantized|fp8"


OutputOption = Annotated[
    Path, opt("Where the quantised model goes.", "--output", "-o", metavar="DIR")
]
MethodOption = Annotated[str, opt("How codes are chosen.", metavar=_METHODS)]
BitsOption = Annotated[
    int | None, opt("Bits a weight.", min=1, max=8, show_default="4; 8 with activations")
]
GroupSizeOption = Annotated[
    int | None,
    opt(
        "Columns (fp8: and rows) that share a scale; 0: a row.",
        min=-1,
        show_default="128, or a row",
    ),
]
SymmetricOption = Annotated[
    bool | None,
    opt("Without or with zero points.", "--symmetric/--asymmetric", show_default="the method's"),
]
LayoutOption = Annotated[
    str | None, opt("The form of the file.", metavar=_LAYOUTS, show_default="the usual one")
]
DtypeOption = Annotated[
    str | None,
    opt(
        "Of scales, and of what stays in floats.",
        metavar="float16|bfloat16|float32",
        show_default="the model's",
    ),
]
TextOption = Annotated[
    list[Path] | None,
    opt("Calibration text; may be repeated.", metavar="PATH", show_default="the standard library"),
]
SamplesOption = Annotated[int, opt("Windows of calibration text.", min=1)]
LengthOption = Annotated[
    int | None, opt("Tokens in a window.", min=1, show_default="512, or the context")
]
SeedOption = Annotated[int, opt("Decides which windows.", min=0)]
DampOption = Annotated[
    float | None, opt("gptq: share of the mean diagonal.", metavar="X", show_default="0.01")
]
ActOrderOption = Annotated[bool, flag("gptq: the columns that matter most first.", "--act-order")]
StaticGroupsOption = Annotated[
    bool, flag("gptq: scales from the weight as it came.", "--static-groups")
]
AlphaOption = Annotated[
    float | None, opt("smoothquant: how much moves.", metavar="X", show_default="0.5")
]
KeepOption = Annotated[
    list[str] | None,
    opt("smoothquant: leave these in floats; may be repeated.", metavar="o_proj|down_proj|…"),
]
EvaluateOption = Annotated[
    bool, flag("Measure bits per byte before and after.", "--evaluate/--no-evaluate")
]
MaxTokensOption = Annotated[int, opt("Held-out tokens that are measured on.", min=1)]
WorkOption = Annotated[
    Path | None, opt("Where finished layers wait.", metavar="DIR", show_default="OUTPUT.quantizing")
]


def quantize(
    output: OutputOption,
    model: ModelOption = "stdlib",
    method: MethodOption = "rtn",
    bits: BitsOption = None,
    group_size: GroupSizeOption = None,
    symmetric: SymmetricOption = None,
    layout: LayoutOption = None,
    dtype: DtypeOption = None,
    text: TextOption = None,
    samples: SamplesOption = 32,
    length: LengthOption = None,
    seed: SeedOption = 0,
    damp: DampOption = None,
    act_order: ActOrderOption = False,
    static_groups: StaticGroupsOption = False,
    alpha: AlphaOption = None,
    keep: KeepOption = None,
    evaluate: EvaluateOption = True,
    max_tokens: MaxTokensOption = 20_000,
    work: WorkOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    backend: BackendOption = "numpy",
) -> None:
    """Quantise a model.

    Layer by layer, so that memory holds one decoder layer in floats; only measuring needs a
    whole model.

    An interrupted run goes on after its last whole layer when the same command is given
    again. Layouts: pack-quantized, int-quantized and float-quantized are
    compressed-tensors', which transformers and vLLM load; gptq_v2, gptq and awq are
    GPTQModel's and AutoAWQ's, fp8 is DeepSeek's.

    \b
    Examples:
      refllm quantize --output stdlib-w4 --method gptq
      refllm quantize --output stdlib-w8a8 --method smoothquant --alpha 0.8
      refllm quantize --model ./Llama-3.2-1B --output ./llama-w4 --bits 4 --group-size 128
      refllm generate --model ./stdlib-w4 'def main('
    """
    from refllm.backend import get
    from refllm.checkpoints.loading import locate
    from refllm.jobs import quantize
    from refllm.train.data import read_files

    get(backend)
    asked = {
        "damp": damp,
        "act_order": act_order or None,
        "static_groups": static_groups or None,
        "alpha": alpha,
        "keep": tuple(keep) if keep else None,
    }
    options = {name: value for name, value in asked.items() if value is not None}
    scheme = quantize.scheme_of(method, bits, group_size, symmetric)
    work = None if work is None else Path(os.path.expanduser(work))
    job = quantize.prepare(
        locate(model),
        output,
        method,
        scheme,
        work=work,
        layout=layout,
        dtype=dtype,
        texts=read_files(text) if text else None,
        samples=samples,
        length=length,
        seed=seed,
        overwrite=overwrite,
        **options,
    )
    keep_freed_memory()
    _announce(job)
    with _display(job) as shown:
        record = quantize.go(
            job, backend=backend, measure=max_tokens if evaluate else None, **shown
        )
    if as_json:
        import json

        typer.echo(json.dumps(record, indent=2))
    else:
        _show(job, record)


def _announce(job: Job) -> None:
    ids = job.calibration
    stored = job.storing.stored
    lines = {
        "method": f"{job.method}, {job.scheme.bits} bits, "
        + (
            f"{'blocks' if stored.floats else 'groups'} of {stored.group_size}"
            if stored.group_size
            else "a scale a row"
        ),
        "layout": f"{stored.layout}, floats in {job.storing.dtype}",
        "text": "none is needed"
        if ids is None
        else f"{ids.shape[0]} windows of {ids.shape[1]} tokens",
        "layers": f"wait in {job.work}",
    }
    pairs(console(stderr=True), lines)


@contextmanager
def _display(job: Job) -> Iterator[dict[str, Any]]:
    """Callbacks that print a row for each layer and, on a terminal, keep a bar below them;
    all to stderr.
    """
    from refllm.model.llama import PROJECTIONS

    bar = counted_bar()
    task = bar.add_task("quantising", total=None)
    layer: list[TensorReport] = []

    def progress(done: int, total: int, row: TensorReport) -> None:
        layer.append(row)
        bar.update(task, completed=done, total=total, description=row.name)
        if len(layer) == len(PROJECTIONS):
            bar.console.print(_ROW.format(*_cells(layer)))
            layer.clear()

    def measuring(what: str, done: int, total: int) -> None:
        bar.update(task, description=f"bits per byte {what}", completed=done, total=total)

    with bar:
        bar.console.print(
            _ROW.format("layer", "loss", "weight error", "output error", "seconds"), style="dim"
        )
        yield {"progress": progress, "measuring": measuring}


def _cells(rows: list[TensorReport]) -> tuple[str, ...]:
    """A layer's line: losses are summed, errors are those of its worst projection."""
    losses = [t.loss for t in rows if t.loss is not None]
    outputs = [t.output_error for t in rows if t.output_error is not None]
    return (
        str(rows[0].layer),
        f"{sum(losses):.4g}" if losses else "-",
        f"{max(t.weight_error for t in rows):.3g}",
        f"{max(outputs):.3g}" if outputs else "-",
        f"{sum(t.seconds for t in rows):.2f}",
    )


def _show(job: Job, record: dict[str, Any]) -> None:
    size = record["bytes"]
    score = record["bits per byte"]
    lines = {
        "quantised": f"{record['quantised weights']:,} weights at {record['bits per weight']:.3f} bits, "
        f"{format_bytes(size['quantised weights'])}",
        "model": f"{format_bytes(size['model'])}, was {format_bytes(size['model before'])}",
    }
    if score:
        lines["bits per byte"] = (
            f"{score['after']:.4f}, was {score['before']:.4f}, on {score['tokens']:,} held-out "
            f"tokens of Python {score['python']}"
        )
    out = console()
    out.print(str(job.output), style="bold")
    pairs(out, lines)
    for sentence in record["notes"]:
        note(sentence)
