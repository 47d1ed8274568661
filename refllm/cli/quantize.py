"""``refllm quantize``: a checkpoint in fewer bits, in a layout that transformers and vLLM load."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

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
from refllm.cli.threads import ThreadsOption, use_threads
from refllm.errors import InputError
from refllm.terminal import console, counted_bar, format_bytes, note, pairs

NOT_KNOWN = "not known: no manifest of the model lists this text"

if TYPE_CHECKING:
    from refllm.array_types import Json
    from refllm.formats.uniform import Scheme
    from refllm.jobs.quantize import QuantizationJob
    from refllm.quant.methods import TensorReport

_ROW = "{:>5}  {:>12}  {:>12}  {:>12}  {:>8}"
_METHODS = "rtn|gptq|awq|smoothquant|int8|fp8"
_LAYOUTS = "pack-quantized|int-quantized|naive-quantized|gptq_v2|gptq|awq|float-quantized|fp8"


OutputOption = Annotated[
    Path, opt("Where the quantised model goes.", "--output", "-o", metavar="DIR")
]
MethodOption = Annotated[str, opt("How codes are chosen.", metavar=_METHODS)]
BitsOption = Annotated[
    int | None, opt("Bits per weight.", min=1, max=8, show_default="4; 8 with activations")
]
GroupSizeOption = Annotated[
    int | None,
    opt(
        "Columns (fp8: and rows) that share a scale; 0: the whole row.",
        min=-1,
        show_default="128, or the row",
    ),
]
SymmetricOption = Annotated[
    bool | None,
    opt("Without or with zero points.", "--symmetric/--asymmetric", show_default="the method's"),
]
LayoutOption = Annotated[
    str | None, opt("The file layout.", metavar=_LAYOUTS, show_default="the method's")
]
DtypeOption = Annotated[
    str | None,
    opt(
        "Of scales and unquantised tensors.",
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
SeedOption = Annotated[int, opt("Decides which windows are drawn.", min=0)]
DampOption = Annotated[
    float | None,
    opt("gptq: damping, relative to the mean diagonal.", metavar="X", show_default="0.01"),
]
ActOrderOption = Annotated[
    bool, flag("gptq: columns in order of their Hessian diagonal.", "--act-order")
]
StaticGroupsOption = Annotated[
    bool, flag("gptq: scales from the original weight.", "--static-groups")
]
AlphaOption = Annotated[
    float | None,
    opt(
        "smoothquant: migration strength.",
        metavar="X",
        show_default="0.5",
    ),
]
KeepOption = Annotated[
    list[str] | None,
    opt("smoothquant: keep these unquantised; may be repeated.", metavar="o_proj|down_proj|…"),
]
EvaluateOption = Annotated[
    bool, flag("Measure bits per byte before and after.", "--evaluate/--no-evaluate")
]
MaxTokensOption = Annotated[int, opt("Held-out tokens to measure on.", min=1)]
WorkOption = Annotated[
    Path | None,
    opt("Where finished layers are stored.", metavar="DIR", show_default="OUTPUT.quantizing"),
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
    threads: ThreadsOption = None,
    backend: BackendOption = "numpy",
) -> None:
    """Quantise a model.

    Layer by layer, so that memory holds one decoder layer in floats; only measuring needs a
    whole model.

    An interrupted run continues after its last complete layer when the same command is
    given again. Layouts: pack-quantized, int-quantized and float-quantized are those of
    compressed-tensors, which transformers and vLLM load; gptq_v2, gptq and awq are those of
    GPTQModel and AutoAWQ, fp8 is DeepSeek's.

    \b
    Examples:
      refllm quantize --output stdlib-w4 --method gptq
      refllm quantize --output stdlib-w8a8 --method smoothquant --alpha 0.8
      refllm quantize --model ./Llama-3.2-1B --output ./llama-w4 --bits 4 --group-size 128
      refllm generate --model ./stdlib-w4 'def main('
    """
    from refllm.backend import get
    from refllm.checkpoints.sources import locate
    from refllm.jobs import quantize
    from refllm.train.data import read_files

    get(backend)
    calibration = read_files(text) if text else None
    given = {
        "damp": damp,
        "act_order": act_order or None,
        "static_groups": static_groups or None,
        "alpha": alpha,
        "keep": tuple(keep) if keep else None,
    }
    job = quantize.prepare(
        locate(model),
        output,
        method,
        scheme_for(method, bits, group_size, symmetric),
        work=work and Path(os.path.expanduser(work)),
        layout=layout,
        dtype=dtype,
        texts=calibration,
        samples=samples,
        length=length,
        seed=seed,
        overwrite=overwrite,
        **{name: value for name, value in given.items() if value is not None},
    )
    keep_freed_memory()
    _announce(job, use_threads(threads))
    with _display() as display:
        record = quantize.run(
            job,
            backend=backend,
            measure=max_tokens if evaluate else None,
            progress=display.layer,
            measuring=display.measuring,
        )
    if as_json:
        import json

        typer.echo(json.dumps(record, indent=2))
    else:
        _show(job, record)


def scheme_for(
    method: str, bits: int | None, group_size: int | None, symmetric: bool | None
) -> Scheme:
    """A method's default scheme, changed by what is not None; a group of 0 or −1 columns is
    one scale per row.

    >>> print(scheme_for("rtn", bits=3, group_size=0, symmetric=None))
    Scheme(bits=3, rule='half_integer', granularity='channel', group_size=None)
    """
    from refllm.formats.uniform import Scheme
    from refllm.quant.recipe import default_scheme

    usual = default_scheme(method)
    if bits is None:
        bits = usual.bits
    group = usual.group_size if group_size is None else group_size
    if group_size in (0, -1):
        group = None
    rule = usual.rule
    if symmetric is not None and symmetric != usual.symmetric:
        rule = "half_integer" if symmetric else "asymmetric"
    if method == "fp8" and symmetric is False:
        raise InputError("fp8 has no zero points: its codes are floats, leave --asymmetric out")
    if bits == 1 and rule != "asymmetric":
        raise InputError(
            "one bit around zero has no other level than 0: take --bits 2, or --asymmetric"
        )
    if group is None:
        return Scheme(bits, rule, "channel")
    granularity = "block" if usual.granularity == "block" else "group"
    return Scheme(bits, rule, granularity, group)


def _announce(job: QuantizationJob, computing: str) -> None:
    """What is about to happen, to stderr."""
    windows = job.calibration
    layout = job.export.layout
    share = "one scale per row"
    if layout.group_size:
        share = f"groups of {layout.group_size}"
        if layout.is_float:
            share = f"blocks of {layout.group_size}"
    text = "none needed"
    if windows is not None:
        text = f"{windows.shape[0]} windows of {windows.shape[1]} tokens"
    lines = {
        "method": f"{job.method}, {job.scheme.bits} bits, {share}",
        "layout": f"{layout.name}, floats in {job.export.dtype}",
        "text": text,
        "layers": f"stored in {job.work} until all are done",
        "computed with": computing,
    }
    pairs(console(stderr=True), lines)


class _Display(NamedTuple):
    """The callbacks of ``jobs.quantize.run``."""

    layer: Callable[[int, int, TensorReport], None]
    measuring: Callable[[str, int, int], None]


@contextmanager
def _display() -> Iterator[_Display]:
    """Callbacks that print a row per layer and, on a terminal, move a bar below the rows;
    all to stderr.
    """
    from refllm.model.llama import PROJECTIONS

    bar = counted_bar()
    task = bar.add_task("quantising", total=None)
    rows: list[TensorReport] = []  # of the current layer

    def layer(done: int, total: int, row: TensorReport) -> None:
        rows.append(row)
        bar.update(task, completed=done, total=total, description=row.name)
        if len(rows) == len(PROJECTIONS):
            bar.console.print(_ROW.format(*_cells(rows)))
            rows.clear()

    def measuring(label: str, done: int, total: int) -> None:
        bar.update(task, description=f"bits per byte {label}", completed=done, total=total)

    with bar:
        head = _ROW.format("layer", "loss", "weight error", "output error", "seconds")
        bar.console.print(head, style="dim")
        yield _Display(layer, measuring)


def _cells(rows: list[TensorReport]) -> tuple[str, ...]:
    """A layer's row: losses are summed, errors are those of its worst projection."""
    losses = [t.loss for t in rows if t.loss is not None]
    outputs = [t.output_error for t in rows if t.output_error is not None]
    return (
        str(rows[0].layer),
        f"{sum(losses):.4g}" if losses else "-",
        f"{max(t.weight_error for t in rows):.3g}",
        f"{max(outputs):.3g}" if outputs else "-",
        f"{sum(t.seconds for t in rows):.2f}",
    )


def _show(job: QuantizationJob, record: Json) -> None:
    """Sizes, and bits per byte before and after with the text and windows behind them."""
    from refllm.measure.protocol import describe_text, describe_windows, is_held_out

    size = record["bytes"]
    score = record["bits per byte"]
    lines = {
        "quantised": f"{record['quantised weights']:,} weights at "
        f"{record['bits per weight']:.3f} bits, {format_bytes(size['quantised weights'])}",
        "model": f"{format_bytes(size['model'])}, was {format_bytes(size['model before'])}",
    }
    if score:
        lines["bits per byte"] = f"{score['after']:.4f}, was {score['before']:.4f}"
        documents = score["documents"]
        lines["measured on"] = describe_text(score["tokens"], documents, score["python"])
        lines["windows"] = describe_windows(score["window"], score["stride"])
        held_out = is_held_out(job.source, documents)
        lines["held out"] = "yes, by the model's manifest" if held_out else NOT_KNOWN
    out = console()
    out.print(str(job.output), style="bold")
    pairs(out, lines)
    for sentence in record["notes"]:
        note(sentence)
