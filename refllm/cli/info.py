"""``refllm info``: what a checkpoint is, from its headers alone; no weight is read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from refllm.cli.options import BackendOption, JsonOption, ModelOption, flag
from refllm.terminal import console, format_bytes, pairs, table

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


def describe(directory: Path, *, verify: bool = False) -> dict[str, Any]:
    """Everything that ``info`` prints, as plain data; CheckpointError for what is no
    checkpoint.
    """
    from refllm.checkpoints.loading import NetworkTensors, read, read_config
    from refllm.checkpoints.tensor_files import FLOATS, INTEGERS, TensorFiles, host_dtype
    from refllm.checkpoints.tokenizer import Tokenizer
    from refllm.measure.memory import kv_bytes_per_token

    config = read_config(directory)
    names = FLOATS | INTEGERS
    quantization = read(directory)
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
        "card": _json(directory / "card.json"),
        "files": list_files(directory, verify=verify),
    }


def list_files(directory: Path, *, verify: bool) -> list[dict[str, Any]]:
    """Each file with its size, the hash in the manifest, and, if asked for, whether it
    still has that hash.
    """
    from refllm.checkpoints.writer import file_sha256

    recorded = (_json(directory / "manifest.json") or {}).get("files", {})
    if not isinstance(recorded, dict) or not all(
        isinstance(entry, dict) for entry in recorded.values()
    ):
        raise ValueError(f"{directory / 'manifest.json'} is no manifest of files with their hashes")
    present = {p.name: p for p in directory.iterdir() if p.is_file() and not p.name.startswith(".")}
    found = []
    for name in sorted({*present, *recorded}):
        known = recorded.get(name, {}).get("sha256")
        known = None if known is None else str(known)
        state = "not recorded" if known is None else "recorded"
        if name == "manifest.json":  # it cannot hold its own hash
            state = "the record"
        if name not in present:
            state = "missing"
        elif verify and known is not None:
            state = "verified" if file_sha256(present[name]) == known else "differs"
        size = present[name].stat().st_size if name in present else 0
        found.append({"name": name, "bytes": size, "sha256": known, "state": state})
    return found


def device(backend: str) -> str:
    """What a backend computes on; BackendUnavailable if it cannot run here."""
    from refllm.backend import get

    library = get(backend)
    if library.__name__ == "numpy":
        return f"NumPy {library.__version__} on the CPU"
    name = library.cuda.runtime.getDeviceProperties(library.cuda.Device().id)["name"].decode()
    return f"CuPy {library.__version__} on {name}"


def _spelling(tokenizer: Any, token: int | None) -> str | None:
    spelling: str | None = None if token is None else tokenizer.inner.id_to_token(token)
    return spelling


def _json(path: Path) -> dict[str, Any] | None:
    from refllm.checkpoints.tensor_files import read_json

    return read_json(path) if path.is_file() else None


def _show(facts: dict[str, Any]) -> None:
    from refllm.model.config import ModelConfig

    config = ModelConfig.from_hf(facts["config"])
    weights, kv, tokenizer = (
        facts[key] for key in ("weights", "KV cache bytes per token", "tokenizer")
    )
    full = kv["float16"] * config.max_position_embeddings
    out = console()
    out.print(facts["model"], style="bold")
    pairs(
        out,
        {
            "architecture": config.summary,
            "parameters": f"{facts['parameters']:,}",
            "weights": f"{format_bytes(weights['bytes'])} in {', '.join(weights['types'])}, "
            f"{weights['bits per weight']:.2f} bits per weight",
            "quantised": weights["quantised"] or "no",
            "KV cache": f"{kv['float16']:,} bytes a token in float16 ({kv['float32']:,} in float32); "
            f"{format_bytes(full)} for the full context in float16",
            "tokenizer": f"{tokenizer['kind']}, {tokenizer['tokens']:,} tokens, text begins with {tokenizer['begin']} "
            f"and ends with {' or '.join(map(str, tokenizer['end'])) or 'nothing'}",
            "runs on": facts["runs on"],
        },
    )
    if facts["card"]:
        try:
            _show_record(out, facts["card"])
        except (KeyError, TypeError, ValueError, AttributeError):
            out.print("\ncard.json is no training record of refllm's")
    out.print()
    files = table("file", "bytes", "sha256", "state")
    for file in facts["files"]:
        files.add_row(
            file["name"], f"{file['bytes']:,}", (file["sha256"] or "")[:16], file["state"]
        )
    out.print(files)


def _show_record(out: Any, card: dict[str, Any]) -> None:
    """The card's figures in five lines; the page itself is README.md."""
    data = card["data"]
    training = card["training"]
    measured = card["measured"]
    tokens = sum(s["tokens"] for s in data["streams"].values())
    lines = {
        "trained on": f"{data['name']}, {tokens:,} tokens",
        "for": f"{training['steps']:,} steps, {training['tokens']:,} tokens, {training['seconds'] / 60:.0f} minutes",
        "made with": f"refllm {card['made with']['refllm']}, Python {card['made with']['python']}, "
        f"NumPy {card['made with']['numpy']}",
        "held out": f"{measured['bits per byte']:.3f} bits per byte, perplexity {measured['perplexity']:.2f}, "
        f"on {measured['tokens']:,} tokens",
    }
    if training["teacher"]:
        lines["distilled from"] = training["teacher"]
        lines["acceptance"] = (
            f"{measured['against the teacher']['acceptance']:.3f} by {training['teacher']}"
        )
    if "samples" in measured:
        lines["samples"] = "pass Python's tokenize: " + ", ".join(
            f"{x['share']:.0%} of {x['tokens']} tokens (real files {x['share of real text']:.0%})"
            for x in measured["samples"]["by length"]
        )
    out.print("\ntraining", style="bold")
    pairs(out, lines)
