"""What the experiments on quantised networks share: one held-out text, one reference, the
calibration text, and results that are computed once.

| text        | what                                                                      |
|-------------|---------------------------------------------------------------------------|
| held-out    | ``EXCERPTS`` windows of ``LENGTH`` tokens of the held-out modules         |
| calibration | ``WINDOWS`` windows of ``WINDOW`` tokens of the training text, by a seed, |
|             | the same for every method                                                 |

Every network is compared with the original token by token (``measure.comparison``), so all
intervals are paired: what makes a token hard for both cancels.

A result is kept in a file under a digest of everything that decides it (model, text,
settings and the code that quantises). So a command that was interrupted continues where it
stopped, and computes only what has changed.

Left out: the whole held-out text (``refllm eval`` scores it).
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np

import refllm
from refllm.api import Model, load
from refllm.array_types import Json
from refllm.atomic import write_atomic
from refllm.checkpoints.sources import locate
from refllm.corpus import held_out_documents
from refllm.measure.bootstrap import Interval, blocks, bootstrap_intervals
from refllm.measure.comparison import (
    Comparison,
    PrecomputedReference,
    compare,
    precompute_reference,
)
from refllm.model.llama import Weights
from refllm.quant.layer_inputs import calibration_windows

EXCERPTS = 16  # of held-out text
LENGTH = 256
WINDOWS = 16  # of calibration text
WINDOW = 512
BLOCK = 128  # tokens per block of the bootstrap
RESAMPLES = 2000

_IMPORT = re.compile(r"^from refllm\.(formats|quant)\.(\w+) import", re.MULTILINE)


class HeldOutBench:
    """A model, the held-out text, and the model's own predictions there, computed once."""

    def __init__(
        self, model: Model, digest: str, excerpts: int, length: int, windows: int, window: int
    ):
        self.model = model
        self.windows = windows
        self.window = window
        self.text = list(
            calibration_windows(
                model.tokenizer, excerpts, length, 0, documents=held_out_documents()
            )
        )
        self.settings = {
            "model": digest,
            "code": code_digest(),
            "python": platform.python_version(),
            "excerpts": excerpts,
            "tokens each": length,
            "calibration windows": windows,
            "calibration tokens each": window,
            "block": BLOCK,
            "resamples": RESAMPLES,
        }
        self._calibration: dict[int, np.ndarray] = {}

    @cached_property
    def reference(self) -> PrecomputedReference:
        """The model's own hidden states on the text."""
        return precompute_reference(self.model, self.text)

    def calibration(self, seed: int) -> np.ndarray:
        """Calibration text [windows, tokens], drawn by ``seed``."""
        if seed not in self._calibration:
            begin = self.model.config.bos_token_id
            self._calibration[seed] = calibration_windows(
                self.model.tokenizer, self.windows, self.window, seed, begin=begin
            )
        return self._calibration[seed]

    def compare(self, model: Model) -> Comparison:
        """``model`` against the original, on the held-out text."""
        return compare(
            model,
            self.reference,
            self.text,
            rng=np.random.default_rng(0),
            block=BLOCK,
            resamples=RESAMPLES,
        )

    def compare_weights(self, weights: Weights) -> Comparison:
        """The model with other ``weights`` against the original."""
        return self.compare(Model(self.model.config, weights, self.model.tokenizer))

    def paired(self, values: np.ndarray, other: np.ndarray) -> Interval:
        """Mean of values − other over tokens [T], with its interval from the resamples that
        all comparisons use.
        """
        units = blocks(self.reference.plan.document, BLOCK)
        rng = np.random.default_rng(0)
        return bootstrap_intervals([values - other], units, rng, resamples=RESAMPLES)[0]


def open_bench(name: str, excerpts: int = EXCERPTS) -> HeldOutBench:
    """The bench of a bundled model or a checkpoint's folder."""
    weights = sorted(locate(name).glob("*.safetensors"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()
    return HeldOutBench(load(name, backend="numpy"), digest, excerpts, LENGTH, WINDOWS, WINDOW)


def increase(found: Comparison) -> Interval:
    """Bits per byte of the model minus those of the reference: each byte carries its
    token's share of the loss.
    """
    size = found.model.token_bytes
    some = size > 0  # special tokens stand for no text
    each = (found.model.nats - found.reference.nats)[some] / np.log(2) / size[some]
    units = blocks(found.model.document, BLOCK)[some]
    return bootstrap_intervals(
        [np.repeat(each, size[some])],
        np.repeat(units, size[some]),
        np.random.default_rng(0),
        resamples=RESAMPLES,
    )[0]


def ends(interval: Interval) -> list[float]:
    """[mean, low, high], as a record holds an interval."""
    return [interval.mean, interval.low, interval.high]


def digest_of(*settings: object) -> str:
    """A short digest of JSON values: the name of a result's file."""
    return hashlib.sha256(json.dumps(list(settings)).encode()).hexdigest()[:20]


def computed_once(file: Path, compute: Callable[[], Json]) -> Json:
    """The JSON value in ``file``; computed and written there if the file does not exist."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(compute()))
    found: Json = json.loads(file.read_text("utf-8"))
    return found


def code_digest() -> str:
    """Digest of the modules that quantise: a result of other code is not this code's.

    ``quant.recipe`` and what it imports from ``formats`` and ``quant``, so that export
    formats may change.
    """
    root = Path(refllm.__file__).parent
    pending = ["quant/recipe.py"]
    seen = set[str]()
    while pending:
        path = pending.pop()
        if path not in seen and (root / path).is_file():
            seen.add(path)
            text = (root / path).read_text("utf-8")
            pending += [f"{m[1]}/{m[2]}.py" for m in _IMPORT.finditer(text)]
    parts = [path.encode() + (root / path).read_bytes() for path in sorted(seen)]
    return hashlib.sha256(b"".join(parts)).hexdigest()
