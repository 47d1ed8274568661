"""From a training state to a finished model directory: weights, tokenizer, card, manifest, curve.

| file           | what it holds                                                                  |
|----------------|--------------------------------------------------------------------------------|
| README.md      | the card as a page, made from card.json                                        |
| card.json      | data, training and measurements (see ``model_card``)                           |
| curve.json     | every evaluation during training, those of earlier runs first                  |
| manifest.json  | SHA-256 of each file here and of each text trained on or held out, by name     |

The stored weights are measured: they are rounded to the stored type first.

Left out: uploading; numbers that are typed in by hand.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

import refllm
from refllm.api import Model, load
from refllm.array_types import Json
from refllm.atomic import write_atomic
from refllm.backend import to_numpy
from refllm.checkpoints.loading import build_weights, iter_tensors
from refllm.checkpoints.tensor_files import converted
from refllm.checkpoints.tokenizer import Tokenizer
from refllm.checkpoints.writer import file_sha256, save
from refllm.corpus import Document
from refllm.errors import InputError
from refllm.jobs import card_page, model_card
from refllm.model.config import ModelConfig
from refllm.train.data import Data, encode, fingerprint
from refllm.train.schedule import Phase, Plan, batches
from refllm.train.state import load_state

MANIFEST = "manifest.json"
Curve = list[Json]


def finish(
    state_path: Path,
    tokenizer: Tokenizer,
    output: Path,
    data: Data,
    *,
    command: str,
    teacher: Path | None = None,
    start: Path | None = None,
    start_share: float = 0.0,
    remark: str = "",
    dtype: str = "float16",
    overwrite: bool = False,
    progress: model_card.Progress = lambda label, done, total: None,
) -> model_card.Record:
    """Write ``output`` from the state of a finished run and return the card's record.

    ``data`` must be what the run was trained on: its documents are counted and hashed here.
    ``command`` goes into the card, and ``remark`` beside it (where the run departed from
    it). ``teacher`` is the directory of the model that it was distilled from, ``start``
    that of the model whose weights it started from.

    The stored weights are an average: ``start_share`` of the weights that the run started
    from, 1 − ``start_share`` of its last ones. Where both were annealed, their mean lies in a
    flatter minimum and generalises better (Izmailov et al. 2018).

    Raises
    ------
    ValueError
        if the run is not finished, or the state is damaged, or ``start_share`` is given
        without ``start``.
    CheckpointError
        if ``output`` must not be replaced, or the weights are not finite in ``dtype``.
    """
    state, about = load_state(state_path)
    config = ModelConfig.from_hf(json.loads(about["config"]))
    plan = read_plan(about)
    if state.optimizer.step < plan.steps:
        raise InputError(
            f"{state_path} has done {state.optimizer.step} of {plan.steps} steps: let it "
            "train to the end first"
        )
    params = {name: to_numpy(w) for name, w in state.params.items()}
    if start_share:
        params = _averaged(params, start, start_share)
    stored = {name: converted(w, dtype, name, state_path) for name, w in params.items()}
    rounded = {name: w.astype(np.float32) for name, w in stored.items()}
    model = Model(config, build_weights(config, rounded), tokenizer)
    record = {
        "name": output.resolve().name,
        "architecture": config.summary,
        "parameters": config.num_parameters,
        "stored as": dtype,
        "made with": {
            "refllm": refllm.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
        },
        "data": _data(data, tokenizer, plan),
        "training": {
            "command": command,
            "remark": remark,
            "steps": plan.steps,
            "teacher": None if teacher is None else teacher.resolve().name,
            "start": None if start is None else _origin(start),
            **_given({"start share": start_share}),
            "tokens": sum(p.steps * p.batch * p.length for p in plan.phases),
            "seconds": state.curve[-1]["seconds"] if state.curve else 0.0,
            "plan": json.loads(about["plan"]),
        },
        "measured": model_card.measure(
            model,
            data.held_out,
            code=_python(data),
            seed=plan.seed,
            progress=progress,
            teacher=None if teacher is None else load(teacher, backend="numpy"),
        ),
    }
    curve = _history(start) + with_tokens(state.curve, plan, _tokens_before(start))
    texts = {
        "README.md": card_page.page(record),
        "card.json": json.dumps(record, indent=2, ensure_ascii=False) + "\n",
        "curve.json": json.dumps(curve, indent=1) + "\n",
    }
    save(output, config, stored, tokenizer, dtype=dtype, extra_files=texts, overwrite=overwrite)
    listed = json.dumps(manifest(output, data), indent=1, ensure_ascii=False)
    write_atomic(output / MANIFEST, listed + "\n")
    return record


def _given(settings: Json) -> Json:
    """The settings that are not zero."""
    return {name: value for name, value in settings.items() if value}


def _averaged(
    params: Mapping[str, np.ndarray], start: Path | None, share: float
) -> dict[str, np.ndarray]:
    """(1 − share) · params + share · the weights of ``start``."""
    if start is None:
        raise InputError(
            f"a share of {share:g} for the first weights needs the model that they came from"
        )
    first = dict(iter_tensors(start, "float32"))
    return {name: (1 - share) * w + share * first[name] for name, w in params.items()}


def _origin(directory: Path) -> Json:
    """The weights that a run started from: name, digest, and their training if a card
    records it.
    """
    file = directory / "card.json"
    training = {}
    if file.is_file():
        training = json.loads(file.read_text("utf-8")).get("training", {})
    weights = sorted(directory.glob("*.safetensors"))
    recorded = ("command", "remark", "steps", "tokens", "start")
    return {
        "name": directory.resolve().name,
        "sha256": {p.name: file_sha256(p) for p in weights},
        "training": {key: training[key] for key in recorded if key in training},
    }


def with_tokens(curve: Curve, plan: Plan, before: int = 0) -> Curve:
    """The records of a run's evaluations, each with the number of tokens read until then;
    ``before`` is the number read in earlier runs.

    Steps of different phases read different numbers of tokens, so figures draw the loss over
    tokens.

    >>> plan = Plan((Phase(2, 4, 8), Phase(1, 1, 64)))
    >>> with_tokens([{"step": 2}, {"step": 3}], plan)
    [{'step': 2, 'tokens': 64}, {'step': 3, 'tokens': 128}]
    """
    per_step = [p.batch * p.length for p in plan.phases for _ in range(p.steps)]
    read = list(accumulate(per_step, initial=before))
    return [record | {"tokens": read[int(record["step"])]} for record in curve]


def _history(start: Path | None) -> Curve:
    """The curve of the weights that a run started from, if their directory holds one."""
    if start is None or not ((start / "card.json").is_file() and (start / "curve.json").is_file()):
        return []
    curve: Curve = json.loads((start / "curve.json").read_text("utf-8"))
    if all("tokens" in record for record in curve):
        return curve
    training = json.loads((start / "card.json").read_text("utf-8"))["training"]
    return with_tokens(curve, read_plan({"plan": json.dumps(training["plan"])}))


def _tokens_before(start: Path | None) -> int:
    """Tokens read before a run, in the training of its initial weights."""
    return int(max((record["tokens"] for record in _history(start)), default=0))


def read_plan(about: Mapping[str, str]) -> Plan:
    """The plan in a training state's metadata."""
    raw = json.loads(about["plan"])
    phases = tuple(Phase(**{**p, "repeats": tuple(p["repeats"])}) for p in raw.pop("phases"))
    return Plan(phases, **raw)


def manifest(directory: Path, data: Data) -> Json:
    """SHA-256 of the files in the directory and of the documents that were read."""
    files = sorted(p for p in directory.iterdir() if p.is_file() and p.name != MANIFEST)
    return {
        "python": platform.python_version(),
        "files": {p.name: {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in files},
        "trained on": {name: fingerprint(documents) for name, documents in data.streams.items()},
        "held out": fingerprint(data.held_out),
    }


def _data(data: Data, tokenizer: Tokenizer, plan: Plan) -> model_card.Record:
    """Documents, tokens and passes of each stream; the plan lists the windows that were read,
    so the passes are counted, not estimated.
    """
    lengths = {name: len(encode(tokenizer, documents)) for name, documents in data.streams.items()}
    seen = dict.fromkeys(range(len(lengths)), 0)
    for _, phase, windows in batches(plan, list(lengths.values())):
        for stream, _ in windows:
            seen[stream] += phase.length
    return {
        "name": data.name,
        "code": data.code,
        "streams": {
            name: _count(documents) | {"tokens": lengths[name], "passes": seen[i] / lengths[name]}
            for i, (name, documents) in enumerate(data.streams.items())
        },
        "held out": _count(data.held_out) | {"tokens": len(encode(tokenizer, data.held_out))},
    }


def _python(data: Data) -> list[Document]:
    """The Python files that were trained on."""
    return [
        d for part in data.streams.values() for d in part if data.code and d.name.endswith(".py")
    ]


def _count(documents: Sequence[Document]) -> model_card.Record:
    """The number of documents and of their bytes."""
    return {"documents": len(documents), "bytes": sum(len(d.text.encode()) for d in documents)}
