"""The state of a training run, and its checkpoint: one safetensors file, which is either
complete or absent.

| tensor    | what                          | metadata | what                                      |
|-----------|-------------------------------|----------|-------------------------------------------|
| w.NAME    | parameter                     | step     | optimizer steps done                      |
| m.NAME    | AdamW's first moment          | curve    | JSON list of the records so far           |
| v.NAME    | AdamW's second moment         | config   | JSON of the network's ``config.json``     |
|           |                               | plan     | JSON of the plan that wrote it            |

NAME is the tensor's name in Hugging Face's checkpoints. No random state is stored: the
batches follow from the plan and the step. The precision is that of training, so that a
resumed run continues with exactly the same values.

Left out: a history of checkpoints, a checksum (safetensors checks sizes, not bits).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from refllm.atomic import replacing
from refllm.backend import Array, to_numpy
from refllm.errors import InputError
from refllm.model.config import ModelConfig
from refllm.train.optimizer import AdamW, optimizer_class
from refllm.train.schedule import Plan

Tensors = dict[str, Array]


@dataclass
class State:
    """What a checkpoint holds: parameters, moments, steps done and the curve so far."""

    params: Tensors
    optimizer: AdamW
    curve: list[dict[str, float]] = field(default_factory=list)


def save_state(state: State, path: Path, config: ModelConfig, plan: Plan) -> None:
    """Write a checkpoint atomically: if the process is killed, the old checkpoint or the new
    one is there, complete.

    OSError if the disk is full.
    """
    groups = {"w": state.params, "m": state.optimizer.m, "v": state.optimizer.v}
    tensors = {
        f"{kind}.{name}": np.ascontiguousarray(to_numpy(t))
        for kind in groups
        for name, t in groups[kind].items()
    }
    about = {
        "step": str(state.optimizer.step),
        "curve": json.dumps(state.curve),
        "config": json.dumps(config.to_hf()),
        "plan": json.dumps(asdict(plan)),
    }
    try:
        with replacing(path) as partial:
            save_file(tensors, partial, metadata=about)
    except SafetensorError as error:  # a full disk, say
        raise OSError(
            f"{path} cannot be written ({error}); the checkpoint saved before it is intact"
        ) from error


def load_state(path: Path) -> tuple[State, dict[str, str]]:
    """Read a checkpoint; the second value is its metadata (step, curve, config, plan).

    Raises
    ------
    ValueError
        if the file is damaged, or was not written by ``save_state``.
    """
    groups: dict[str, Tensors] = {"w": {}, "m": {}, "v": {}}
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                kind, name = key.split(".", 1)
                groups[kind][name] = file.get_tensor(key)
        if missing := {"step", "curve", "config", "plan"} - about.keys():
            raise InputError(f"no {', '.join(sorted(missing))}")
        step = int(about["step"])
        curve = json.loads(about["curve"])
        kind = optimizer_class(json.loads(about["plan"]).get("optimizer", "adamw"))
        fresh = kind()
        for name, w in groups["w"].items():
            fresh.init_moments(name, w)
        if step and not (
            fresh.m.keys() == groups["m"].keys() and fresh.v.keys() == groups["v"].keys()
        ):
            raise InputError("the moments are not those of the parameters")
    except (SafetensorError, KeyError, ValueError) as error:
        raise InputError(
            f"{path} is damaged or no training checkpoint ({error}); delete it to start again"
        ) from error
    return State(groups["w"], kind(step=step, m=groups["m"], v=groups["v"]), curve), about
