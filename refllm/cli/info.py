"""``refllm info``: what a checkpoint is, from its headers alone; no weight is read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from refllm.cli.options import BackendOption, JsonOption, ModelOption, flag
from refllm.errors import InputError
from refllm.terminal import console, format_bytes, pairs, table

if TYPE_CHECKING:
    from rich.console import Console

    from refllm.array_types import Json
    from refllm.checkpoints.tokenizer import Tokenizer

VerifyOption = Annotated[bool, flag("Compare every file with its recorded hash.", "--verify")]


def info(
    model: ModelOption = "stdlib",
    verify: VerifyOption = False,
    as_json: JsonOption = False,
    backend: BackendOption = "numpy",
) -> None:
    """Show what a model is.

    Architecture, sizes, tokenizer, training record and files, from headers alone: no weight
    is read.

    \b
    Examples:
      refllm info
      refllm info --model ./Llama-3.2-1B --json
      refllm info --verify
    """
    from refllm.checkpoints.loading import locate

    facts = describe(locate(model), verify=verify) | {"runs on": device(backend)}
    if as_json:
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        _show(facts)
    if any(file["state"] in ("differs", "missing") for file in facts["files"]):
        raise typer.Exit(1)


def describe(directory: Path, *, verify: bool = False) -> Json:
    """Everything that ``info`` prints, as plain data.

    Raises
    ------
    CheckpointError
        if the directory is no checkpoint that refllm reads.
    """
    from refllm.checkpoints.loading import NetworkTensors, read_config
    from refllm.checkpoints.quantization_files import read_quantization
    from refllm.checkpoints.tensor_files import FLOATS, INTEGERS, TensorFiles, host_dtype
    from refllm.checkpoints.tokenizer import Tokenizer
    from refllm.measure.memory import kv_bytes_per_token

    config = read_config(directory)
    names = FLOATS | INTEGERS
    quantization = read_quantization(directory)
    with TensorFiles(directory) as files:
        NetworkTensors(files, config, quantization, None, None).check()
        types = {name: names.get(files.dtype(name), files.dtype(name)) for name in files}
        stored = sum(
            math.prod(files.shape(n)) * host_dtype(types[n]).itemsize
            for n in files
            if types[n] in names.values()
        )
    tokenizer = Tokenizer.from_file(directory / "tokenizer.json")
    return {
        "model": directory.resolve().name,
        "config": config.to_hf(),
        "parameters": config.num_parameters,
        "weights": {
            "types": sorted(set(types.values())),
            "bytes": stored,
            "bits per weight": 8 * stored / config.num_parameters,
            "quantised": None if quantization is None else str(quantization),
        },
        "KV cache bytes per token": {
            name: int(kv_bytes_per_token(config, bits))
            for name, bits in (("float16", 16), ("float32", 32))
        },
        "tokenizer": {
            "kind": type(tokenizer.inner.model).__name__,
            "tokens": tokenizer.vocab_size,
            "begin": _spelling(tokenizer, config.bos_token_id),
            "end": [_spelling(tokenizer, i) for i in config.eos_token_ids],
        },
        "card": _read_json(directory / "card.json"),
        "files": list_files(directory, verify=verify),
    }


def list_files(directory: Path, *, verify: bool) -> list[Json]:
    """Each file of the directory or its manifest: name, size, recorded hash and state.

    The state is "recorded" or "not recorded" in the manifest, "the record" (the manifest
    itself), "missing", or with ``verify`` "verified" or "differs".
    """
    manifest = _read_json(directory / "manifest.json") or {}
    recorded = manifest.get("files", {})
    if not isinstance(recorded, dict) or not all(isinstance(f, dict) for f in recorded.values()):
        raise InputError(f"{directory / 'manifest.json'} is no manifest of files with their hashes")
    present = {p.name: p for p in directory.iterdir() if p.is_file() and not p.name.startswith(".")}
    found = []
    for name in sorted({*present, *recorded}):
        digest = recorded.get(name, {}).get("sha256")
        if digest is not None:
            digest = str(digest)
        size = 0
        file = present.get(name)
        if file is not None:
            size = file.stat().st_size
        state = _file_state(name, file, digest, verify)
        found.append({"name": name, "bytes": size, "sha256": digest, "state": state})
    return found


def _file_state(name: str, file: Path | None, digest: str | None, verify: bool) -> str:
    """How a file compares with its entry in the manifest."""
    from refllm.checkpoints.writer import file_sha256

    if file is None:
        return "missing"
    if verify and digest is not None:
        return "verified" if file_sha256(file) == digest else "differs"
    if name == "manifest.json":  # it cannot hold its own hash
        return "the record"
    return "not recorded" if digest is None else "recorded"


def device(backend: str) -> str:
    """The library and device of a backend; BackendUnavailable if it cannot run here."""
    from refllm.backend import get

    library = get(backend)
    if library.__name__ == "numpy":
        return f"NumPy {library.__version__} on the CPU"
    from cupy.cuda import Device, runtime

    name = runtime.getDeviceProperties(Device().id)["name"].decode()
    return f"CuPy {library.__version__} on {name}"


def _spelling(tokenizer: Tokenizer, token: int | None) -> str | None:
    """The text of a special token."""
    if token is None:
        return None
    spelling: str | None = tokenizer.inner.id_to_token(token)
    return spelling


def _read_json(path: Path) -> Json | None:
    """The object in a JSON file; None if there is no such file."""
    from refllm.checkpoints.tensor_files import read_json

    if not path.is_file():
        return None
    return read_json(path)


def _show(facts: Json) -> None:
    """Print facts, training record and files."""
    from refllm.model.config import ModelConfig

    config = ModelConfig.from_hf(facts["config"])
    weights = facts["weights"]
    cache = facts["KV cache bytes per token"]
    tokenizer = facts["tokenizer"]
    full = cache["float16"] * config.max_position_embeddings
    ends = " or ".join(map(str, tokenizer["end"])) or "nothing"
    out = console()
    out.print(facts["model"], style="bold")
    lines = {
        "architecture": config.summary,
        "parameters": f"{facts['parameters']:,}",
        "weights": f"{format_bytes(weights['bytes'])} in {', '.join(weights['types'])}, "
        f"{weights['bits per weight']:.2f} bits per weight",
        "quantised": weights["quantised"] or "no",
        "KV cache": f"{cache['float16']:,} bytes per token in float16 ({cache['float32']:,} in "
        f"float32); {format_bytes(full)} for the full context in float16",
        "tokenizer": f"{tokenizer['kind']}, {tokenizer['tokens']:,} tokens, text begins with "
        f"{tokenizer['begin']} and ends with {ends}",
        "runs on": facts["runs on"],
    }
    pairs(out, lines)
    if facts["card"]:
        try:
            _show_record(out, facts["card"])
        except (KeyError, TypeError, ValueError, AttributeError):
            out.print("\ncard.json is no training record of refllm's")
    out.print()
    files = table("file", "bytes", "sha256", "state")
    for file in facts["files"]:
        digest = (file["sha256"] or "")[:16]
        files.add_row(file["name"], f"{file['bytes']:,}", digest, file["state"])
    out.print(files)


def _show_record(out: Console, card: Json) -> None:
    """The training record in a few lines; the whole page is README.md."""
    data = card["data"]
    training = card["training"]
    measured = card["measured"]
    made = card["made with"]
    tokens = sum(s["tokens"] for s in data["streams"].values())
    lines = {
        "trained on": f"{data['name']}, {tokens:,} tokens",
        "for": f"{training['steps']:,} steps, {training['tokens']:,} tokens, "
        f"{training['seconds'] / 60:.0f} minutes",
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
