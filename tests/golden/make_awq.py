"""Record llm-compressor's AWQ scale search on small random networks: ``awq.json``.

In an environment of its own (llm-compressor holds transformers at an older release), with
refllm's requirements ``ml_dtypes`` and ``threadpoolctl`` beside it, from the root of the
repository:

    pip install llmcompressor ml_dtypes threadpoolctl
    PYTHONPATH=.:tests python tests/golden/make_awq.py

For each case and each scale group of the first layer: the 20 losses in the order of the
grid, and the scale that was chosen. Weights and tokens are not stored:
``networks.random_tensors`` and ``tokens`` make them again.
"""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import networks
from refllm.checkpoints.writer import save

# All asymmetric: on a symmetric grid the negative extreme of a group lies at −7.5 scales, a tie
# that the last bit of the scale decides, in half of all groups.
CASES: list[dict[str, Any]] = [
    {"network": "llama-tied-mha", "group_size": 8, "bits": 4, "duo": True},
    {"network": "llama-tied-mha", "group_size": 8, "bits": 3, "duo": False},
    {"network": "llama", "group_size": 4, "bits": 3, "duo": False},
    {"network": "qwen2", "group_size": None, "bits": 4, "duo": True},
]
SEED = 11
SEQUENCES = 4
LENGTH = 40


def tokens() -> np.ndarray:
    """[4, 40] token ids."""
    return np.random.default_rng(SEED).integers(0, networks.VOCAB, (SEQUENCES, LENGTH))


class Recorder(AWQModifier):
    """AWQModifier that keeps every loss and the scale it settles on."""

    def _compute_loss(self, *args: Any, **kwargs: Any) -> float:
        loss = super()._compute_loss(*args, **kwargs)
        LOSSES.append(loss)
        return loss

    def _compute_best_scale(self, mapping: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        LOSSES.clear()
        scale = super()._compute_best_scale(mapping, *args, **kwargs)
        FOUND[mapping.smooth_name] = {"losses": list(LOSSES), "scale": scale.double().tolist()}
        return scale


LOSSES: list[float] = []
FOUND: dict[str, Any] = {}


def record(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    config = networks.NETWORKS[case["network"]]
    save(
        folder,
        config,
        networks.random_tensors(config, SEED, "float32"),
        networks.tokenizer(),
        dtype="float32",
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = {
        "num_bits": case["bits"],
        "type": "int",
        "symmetric": False,
        "dynamic": False,
        "strategy": "group" if case["group_size"] else "channel",
        "group_size": case["group_size"],
    }
    scheme = {"group_0": {"targets": ["Linear"], "weights": weights}}
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * LENGTH} for row in tokens()]
    FOUND.clear()
    oneshot(
        model=model,
        processor=PreTrainedTokenizerFast.from_pretrained(folder),
        dataset=datasets.Dataset.from_list(rows),
        recipe=[
            Recorder(duo_scaling=case["duo"]),
            QuantizationModifier(config_groups=scheme, ignore=["lm_head"]),
        ],
        max_seq_length=LENGTH,
        num_calibration_samples=SEQUENCES,
    )
    first = "model.layers.0."
    return {
        name.removeprefix(first).split(".")[-1]: row
        for name, row in FOUND.items()
        if name.startswith(first)
    }


if __name__ == "__main__":
    if not torch.accelerator.is_available():
        # it fails where there is no device to pin for
        IntermediatesCache.pin_memory = lambda self, batch_index: None
    cases = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            cases.append(case | {"groups": record(case, Path(folder) / "model")})
    versions = {
        name: importlib.metadata.version(name)
        for name in ("llmcompressor", "compressed-tensors", "torch")
    }
    path = Path(__file__).with_name("awq.json")
    path.write_text(
        json.dumps({"versions": versions, "seed": SEED, "cases": cases}, indent=1) + "\n"
    )
    print(f"{path}: {[sorted(case['groups']) for case in cases]}")
