"""The importance of a weight's columns: the mean square of the activations they multiply.

An error e in column j of W changes the output by e·x_j, so the expected squared error of a
row is Σ_j e_j² E[x_j²] if columns are independent. E[x_j²], the mean over tokens, is what
llama.cpp's imatrix holds (sums of squares and counts of tokens), and what its encoders
weight errors by.

q, k and v read the same input, and so do gate and up: they share an importance. The
embedding is looked up, not multiplied, and has none; neither has the output matrix, as with
llama.cpp's tool by default.

Left out: files of llama.cpp's tool, experts.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from refllm.backend import Array, namespace, to_numpy
from refllm.checkpoints.gguf_names import gguf_name
from refllm.quant.layer_inputs import Calibration, LayerSource, walk

__all__ = ["importance"]


def importance(
    source: LayerSource,
    calibration: Calibration,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> dict[str, np.ndarray]:
    """Mean square of each input of each projection over the tokens of ``calibration``: GGUF
    name → float32 [N].

    Sums are float64. The tokens pass through the network in floating point, layer by layer
    (``walk``). ``progress`` is called with (layers done, all layers).
    """
    found: dict[str, np.ndarray] = {}
    for run in walk(source, calibration):
        for names in run.stages():
            squares = np.zeros(1)  # [N] from the first batch on
            tokens = 0
            for x in run.inputs():
                squares = squares + _sum_of_squares(x)
                tokens += int(x.shape[0])
            mean = (squares / tokens).astype("float32")  # [N]
            for name in names:
                found[gguf_name(f"{run.tensor(name)}.weight")] = mean
        progress(run.index + 1, source.config.num_hidden_layers)
    return found


def _sum_of_squares(x: Array) -> np.ndarray:
    """Σ_t x_t² of x[T, N] in float64 → [N], on the host."""
    xp = namespace(x)
    return to_numpy(xp.sum(xp.astype(x, xp.float64) ** 2, axis=0))
