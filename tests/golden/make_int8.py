"""Record what bitsandbytes makes of a few products: ``int8.npz``, read by
``test_llm_int8``.

    python -m venv reference && reference/bin/pip install bitsandbytes==0.50.2 scipy torch
    reference/bin/python tests/golden/make_int8.py

Of each case: the codes, row statistics and outlier columns of the activations, those of the
weight, and the product in float16. Activations and weights are float16, as
bitsandbytes casts them, drawn with a seed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).with_name("int8.npz")

# seed, tokens, threshold, what is special about the activations
CASES: dict[str, dict[str, Any]] = {
    "outliers": {"seed": 0, "tokens": 9, "threshold": 6.0, "outliers": 3},
    "many outliers": {"seed": 1, "tokens": 5, "threshold": 2.0, "outliers": 8},
    "no outliers": {"seed": 2, "tokens": 9, "threshold": 6.0, "outliers": 0},
    "threshold 0": {"seed": 3, "tokens": 9, "threshold": 0.0, "outliers": 3},
    "one token": {"seed": 4, "tokens": 1, "threshold": 6.0, "outliers": 3},
    "a row of zeros": {"seed": 5, "tokens": 4, "threshold": 6.0, "outliers": 2, "zero": True},
}
OUTPUTS = 24
INPUTS = 64


def case(name: str) -> tuple[np.ndarray, np.ndarray, float]:
    """x[T, 64] and weight[24, 64] in float16, and the threshold."""
    options = CASES[name]
    rng = np.random.default_rng(options["seed"])
    x = rng.standard_normal((options["tokens"], INPUTS))
    # whole columns of about 40, with small values among them: those belong to the columns,
    # and are no outliers
    columns = rng.permutation(INPUTS)[: options["outliers"]]
    x[:, columns] *= rng.choice([1.0, 40.0], (options["tokens"], len(columns)))
    if len(columns):
        x[0, columns[0]] = -6.0  # exactly the threshold counts
    if options.get("zero"):
        x[-1] = 0.0
    weight = rng.standard_normal((OUTPUTS, INPUTS)) / 8
    return x.astype(np.float16), weight.astype(np.float16), options["threshold"]


def main() -> None:
    """Needs bitsandbytes."""
    import bitsandbytes as bnb
    import torch

    made: dict[str, Any] = {"bitsandbytes": np.array(bnb.__version__)}
    for name in CASES:
        x, weight, threshold = case(name)
        a = torch.from_numpy(x.copy())
        codes, absmax, columns = bnb.functional.int8_vectorwise_quant(a, threshold)
        w_codes, w_absmax, _ = bnb.functional.int8_vectorwise_quant(torch.from_numpy(weight.copy()))
        state = bnb.MatmulLtState()
        state.CB = w_codes
        state.SCB = w_absmax
        state.has_fp16_weights = False
        state.threshold = threshold
        # on a CPU it multiplies by the dequantised weight otherwise: no LLM.int8() at all
        state.is_training = False
        y = bnb.matmul(torch.from_numpy(x.copy()), w_codes, threshold=threshold, state=state)
        found = {
            "codes": codes.numpy(),
            "absmax": absmax.numpy(),
            "columns": np.zeros(0, np.int64) if columns is None else columns.numpy(),
            "weight codes": w_codes.numpy(),
            "weight absmax": w_absmax.numpy(),
            "product": y.numpy(),
        }
        made |= {f"{name}/{key}": value for key, value in found.items()}
        exact = x.astype(np.float64) @ weight.astype(np.float64).T
        print(name, found["columns"], float(np.abs(found["product"] - exact).max()))
    np.savez_compressed(FILE, **made)


if __name__ == "__main__":
    main()
