"""Record what llm-compressor's GPTQ makes of a few small layers: ``gptq.npz``, read by
``test_gptq``.

    python -m venv reference && reference/bin/pip install llmcompressor==0.14.0.1
    reference/bin/python tests/golden/make_gptq.py

Inputs are drawn by NumPy from a seed, without any matrix product, so the test draws the
same ones. Scales come from compressed-tensors' own rule on the original weight
(half-integer symmetric, or asymmetric signed), codes from the dequantised weight that
``quantize_weight`` returns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FILE = Path(__file__).with_name("gptq.npz")


class Case(NamedTuple):
    seed: int
    bits: int
    symmetric: bool
    group: int | None  # None: a scale a row
    act_order: bool
    shape: tuple[int, int] = (32, 256)
    tokens: int = 512


CASES = {
    "symmetric": Case(1, 4, True, 64, False),
    "asymmetric": Case(2, 4, False, 64, False),
    "symmetric, act-order": Case(3, 4, True, 64, True),
    "asymmetric, act-order": Case(4, 3, False, 32, True),
    "channel, few tokens": Case(5, 3, True, None, False, tokens=100),
    "channel, 8 bits": Case(6, 8, False, None, False, shape=(24, 200)),
}


def inputs(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """W[M, N] and x[T, N], float32: columns of different sizes that all follow a common
    signal.
    """
    rng = np.random.default_rng(case.seed)
    m, n = case.shape
    t = case.tokens
    w = 0.05 * rng.standard_normal((m, n))
    size = np.exp(rng.standard_normal(n))
    x = size * (rng.standard_normal((t, n)) + rng.standard_normal((t, 1)) * rng.standard_normal(n))
    return w.astype(np.float32), x.astype(np.float32)


def record(case: Case) -> dict[str, Any]:
    """Codes, scales, zero points and the loss of llm-compressor for H = 2 xᵀx / T."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
    from compressed_tensors.quantization.utils import calculate_qparams
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    w, x = (torch.from_numpy(a) for a in inputs(case))
    strategy = QuantizationStrategy.CHANNEL if case.group is None else QuantizationStrategy.GROUP
    args = QuantizationArgs(
        num_bits=case.bits,
        type="int",
        symmetric=case.symmetric,
        strategy=strategy,
        group_size=case.group,
        actorder="static" if case.act_order else None,
    )
    groups = w.reshape(w.shape[0], -1, case.group or w.shape[1])
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)  # [M, N/g]
    h = 2.0 * x.T @ x / x.shape[0]
    q, loss, fallback = quantize_weight(
        w[None].clone(), h[None].clone(), scale[None], zero[None], None, args
    )
    assert not fallback.any()
    width = case.group or w.shape[1]
    spread = [a.to(torch.float32).repeat_interleave(width, dim=1) for a in (scale, zero)]
    codes = q[0] / spread[0] + spread[1]
    assert (codes - codes.round()).abs().max() < 1e-3
    return {
        "codes": codes.round().to(torch.int8).numpy(),
        "scale": scale.numpy(),
        "zero": zero.to(torch.int8).numpy(),
        "loss": np.float64(loss.double().sum()),
    }


def main() -> None:
    arrays = {
        f"{name}/{key}": value
        for name, case in CASES.items()
        for key, value in record(case).items()
    }
    np.savez_compressed(FILE, **arrays)
    print(f"{FILE}: {len(arrays)} arrays, {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
