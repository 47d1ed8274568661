"""The bench of experiments on the pretrained model: text that it can read, its own predictions.

| text        | what                                                                   |
|-------------|------------------------------------------------------------------------|
| evaluation  | ``EXCERPTS`` windows of ``LENGTH`` tokens, 8,192 in all, of every      |
|             | second topic of ``pydoc_data.topics``, by name                         |
| calibration | windows of the other topics, by a seed                                 |

"Full precision" is the decoded file: SmolLM2-135M-Instruct comes in Q4_1, whose grid has 16
levels for each 32 weights of a row. Rounding to 4 bits in groups of 32 would nearly give the
reference back, so weights are compared in groups of 64, 192 and whole rows.

Comparison, intervals and results that are computed once are those of ``held_out_bench``.
"""

from __future__ import annotations

import hashlib

import numpy as np

from refllm.api import load
from refllm.checkpoints.sources import locate
from refllm.corpus import Document
from refllm.experiments.held_out_bench import HeldOutBench
from refllm.quant.layer_inputs import calibration_windows

MODEL = "smollm2"
EXCERPTS = 16
LENGTH = 512
FULL_PRECISION = "the decoded Q4_1 file, in float32"


def topics(part: int) -> list[Document]:
    """Half of ``pydoc_data.topics`` in the order of their names: part 0 calibrates, part 1 is
    evaluated.
    """
    from pydoc_data.topics import topics as texts

    return [Document(f"topics/{name}", texts[name]) for name in sorted(texts)[part::2]]


class RealBench(HeldOutBench):
    """A ``HeldOutBench`` whose texts are topics."""

    def __init__(self, name: str = MODEL, excerpts: int = EXCERPTS, length: int = LENGTH):
        model = load(name, backend="numpy", weights="float")
        digest = hashlib.sha256(locate(name).read_bytes()).hexdigest()
        super().__init__(model, digest, excerpts, length, windows=16, window=512)
        self.text = list(
            calibration_windows(model.tokenizer, excerpts, length, 0, documents=topics(1))
        )

    def calibration(self, seed: int) -> np.ndarray:
        """Calibration text [windows, tokens] of the other topics, drawn by ``seed``."""
        if seed not in self._calibration:
            self._calibration[seed] = calibration_windows(
                self.model.tokenizer, self.windows, self.window, seed, documents=topics(0)
            )
        return self._calibration[seed]
