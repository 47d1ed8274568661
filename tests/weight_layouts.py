"""Weights of every shape that a layout distinguishes, and the processors that choose one."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st

from refllm.model import weight_layout
from refllm.model.weight_layout import COLUMNS
from strategies import arrays

# OpenBLAS's kernels and its threads: the two facts that decide on a layout
PROCESSORS = (("SkylakeX", 1), ("SkylakeX", 2), ("Haswell", 1), ("Haswell", 2), ("", 1))

# one block and several, one row less and one more, and sizes that are no multiple of 64
outputs = st.sampled_from(
    [1, 3, COLUMNS - 1, COLUMNS, COLUMNS + 1, 2 * COLUMNS, 3 * COLUMNS, 5 * COLUMNS]
)
dtypes = st.sampled_from(["float32", "float64"])


@st.composite
def matrices(draw):
    """Host W[M, N]; every kind but the extreme one, whose products overflow in any layout."""
    kinds = ("normal", "outlier_column", "zero", "constant", "denormal", "one_sided")
    return draw(arrays(draw(outputs), st.integers(1, 9), dtype=draw(dtypes), kinds=kinds))


def on_processor(patch: pytest.MonkeyPatch, family: str, threads: int) -> None:
    """Lay weights out as on a processor for which OpenBLAS chooses ``family``."""
    patch.setattr(weight_layout, "kernel_family", lambda: family)
    patch.setattr(weight_layout, "blas_threads", lambda: threads)
