"""``refllm info``: what a checkpoint is, from its headers alone; no weight is read.

``model_facts`` finds what is printed here.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from refllm.cli.options import BackendOption, JsonOption, WeightsOption, flag, opt
from refllm.errors import InputError
from refllm.terminal import console, format_bytes, pairs, table

if TYPE_CHECKING:
    from rich.console import Console

    from refllm.array_types import Json

NameArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="[MODEL]",
        help="A bundled model, smollm2, a Hugging Face directory, a GGUF file or a name on the "
        "Hub; stdlib if none is named.",
    ),
]
ModelOption = Annotated[
    str | None, opt("The model, as an option.", "--model", "-m", metavar="NAME|DIR|FILE")
]
VerifyOption = Annotated[bool, flag("Compare every file with its recorded hash.", "--verify")]


def info(
    name: NameArgument = None,
    model: ModelOption = None,
    verify: VerifyOption = False,
    weights: WeightsOption = "auto",
    as_json: JsonOption = False,
    backend: BackendOption = "numpy",
) -> None:
    """Show what a model is.

    Architecture, types and sizes of its tensors, tokenizer, chat template, what is unusual
    about it, training record and files, from headers alone: no weight is read.

    \b
    Examples:
      refllm info
      refllm info smollm2
      refllm info model-Q4_K_M.gguf --weights stored
      refllm info ./Llama-3.2-1B --json
      refllm info --verify
    """
    from refllm.backend import get
    from refllm.checkpoints.sources import locate
    from refllm.cli.model_facts import describe

    if name is not None and model is not None:
        raise InputError("name one model: as an argument, or with --model")
    named = model if name is None else name
    path = locate("stdlib" if named is None else named)
    runs_on = device(backend)
    facts = describe(path, get(backend), weights=weights, verify=verify) | {"runs on": runs_on}
    if as_json:
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        _show(facts)
    if any(file["state"] in ("differs", "missing") for file in facts["files"]):
        raise typer.Exit(1)


def device(backend: str) -> str:
    """The library and device of a backend; BackendUnavailable if it cannot run here."""
    from refllm.backend import get

    library = get(backend)
    if library.__name__ == "numpy":
        return f"NumPy {library.__version__} on the CPU"
    from cupy.cuda import Device, runtime

    name = runtime.getDeviceProperties(Device().id)["name"].decode()
    return f"CuPy {library.__version__} on {name}"


def _show(facts: Json) -> None:
    """Print facts, training record and files."""
    weights = facts["weights"]
    cache = facts["KV cache bytes per token"]
    full = cache["float16"] * facts["config"]["max_position_embeddings"]
    types = ", ".join(f"{count} {type}" for type, count in weights["tensors"].items())
    rope = facts["RoPE"]
    out = console()
    out.print(facts["model"], style="bold")
    lines = {
        "architecture": facts["summary"],
        "parameters": f"{facts['parameters']:,}",
        "weights": f"{format_bytes(weights['bytes'])}, {weights['bits per weight']:.2f} bits per "
        "weight",
        "tensors": types,
        "quantised": weights["quantised"] or "no",
        "loaded as": facts["loaded as"],
        "KV cache": f"{cache['float16']:,} bytes per token in float16 ({cache['float32']:,} in "
        f"float32); {format_bytes(full)} for the full context in float16",
        "RoPE": f"base {rope['base']:,.10g}, {rope['scaling'] or 'no scaling'}",
        "tokenizer": _tokenizer_line(facts["tokenizer"]),
        "chat template": _template_line(facts["chat template"]),
        "runs on": facts["runs on"],
    }
    for i, sentence in enumerate(facts["unusual"], 1):
        lines["unusual" if i == 1 else f"unusual {i}"] = sentence
    pairs(out, lines)
    if facts["card"]:
        try:
            _show_record(out, facts["card"], facts["training runs"])
        except (KeyError, TypeError, ValueError, AttributeError):
            out.print("\ncard.json is no training record of refllm's")
    out.print()
    files = table("file", "bytes", "sha256", "state")
    for file in facts["files"]:
        digest = (file["sha256"] or "")[:16]
        files.add_row(file["name"], f"{file['bytes']:,}", digest, file["state"])
    out.print(files)


def _tokenizer_line(tokenizer: Json | None) -> str:
    """The tokenizer in one line."""
    if tokenizer is None:
        return "none"
    pre = "" if tokenizer["pre"] is None else f" with words {tokenizer['pre']}"
    begin = f"text begins with {tokenizer['begin']}"
    if not tokenizer["begins text"]:
        begin = f"BOS is {tokenizer['begin']} and not added"
    ends = " or ".join(map(str, tokenizer["end"])) or "nothing"
    return f"{tokenizer['kind']}{pre}, {tokenizer['tokens']:,} tokens, {begin}, ends with {ends}"


def _template_line(template: Json | None, longest: int = 60) -> str:
    """The chat template's names and its first line, cut."""
    if template is None:
        return "none"
    text = template["first line"]
    if len(text) > longest:
        text = text[: longest - 1] + "…"
    names = [name for name in template["names"] if name != "default"]
    more = f" (also {', '.join(names)})" if names else ""
    return f"{text}{more}"


def _show_record(out: Console, card: Json, runs: list[Json]) -> None:
    """The training record in a few lines; the whole page is README.md."""
    data = card["data"]
    training = card["training"]
    measured = card["measured"]
    made = card["made with"]
    tokens = sum(s["tokens"] for s in data["streams"].values())
    steps = [f"{run['steps']:,}" for run in runs]
    count = f"{len(runs)} runs of {', '.join(steps)}" if runs[1:] else steps[0]
    seen = sum(run["tokens"] for run in runs)
    last = "the last one took " if runs[1:] else ""
    lines = {
        "trained on": f"{data['name']}, {tokens:,} tokens",
        "for": f"{count} steps, {seen:,} tokens; {last}{training['seconds'] / 60:.0f} minutes",
        "made with": f"refllm {made['refllm']}, Python {made['python']}, NumPy {made['numpy']}",
        "held out": f"{measured['bits per byte']:.3f} bits per byte, perplexity "
        f"{measured['perplexity']:.2f}, on {measured['tokens']:,} tokens",
    }
    if training["teacher"]:
        acceptance = measured["against the teacher"]["acceptance"]
        lines["distilled from"] = training["teacher"]
        lines["acceptance"] = f"{acceptance:.3f} by {training['teacher']}"
    if "samples" in measured:
        lines["samples"] = "pass Python's tokenize: " + ", ".join(
            f"{x['share']:.0%} of {x['tokens']} tokens (real files {x['share of real text']:.0%})"
            for x in measured["samples"]["by length"]
        )
    out.print("\ntraining", style="bold")
    pairs(out, lines)
