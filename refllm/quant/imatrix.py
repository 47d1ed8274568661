"""The importance of a weight's columns: how large the activations are that it multiplies.

An error e in column j of W changes the output by e·x_j, so that the expected square of a
row's error is Σ_j e_j² E[x_j²] if columns are independent. E[x_j²], the mean over tokens,
is what llama.cpp's imatrix holds (sums of squares and counts of tokens), and what its
encoders weigh errors by.

q, k and v read the same input, and so do gate and up: they share an importance. The
embedding is looked up, not multiplied, and has none; neither has the output matrix, as with
llama.cpp's tool by default.

Left out: files of llama.cpp's tool, experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refllm.backend import namespace, to_numpy
from refllm.checkpoints.gguf_names import gguf_name
from refllm.model.llama import PROJECTIONS
from refllm.quant.layer_inputs import LayerSource, walk

__all__ = ["importance"]


def importance(
    source: LayerSource,
    calibration: Any,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> dict[str, np.ndarray]:
    """Mean square of each input of each projection over the tokens of ``calibration``: GGUF
    name → float32 [N].

    Sums are float64. The text goes through the network as it is, layer by layer (``walk``).
    """
    found: dict[str, np.ndarray] = {}
    for run in walk(source, calibration):
        for names in run.stages():
            total = 0.0  # an array from the first batch on
            tokens = 0
            for x in run.inputs():
                xp = namespace(x)
                total = total + xp.sum(xp.astype(x, xp.float64) ** 2, axis=0)
                tokens = tokens + int(x.shape[0])
            mean = to_numpy(total / tokens).astype("float32")
            for name in names:
                found[gguf_name(f"model.layers.{run.index}.{PROJECTIONS[name]}.weight")] = mean
        progress(run.index + 1, source.config.num_hidden_layers)
    return found
