"""Record the tensors that GPTQModel stores a few small weights as: ``layouts.npz``, read by
``test_layouts``.

    python -m venv env && env/bin/pip install torch==2.13.0 gptqmodel==7.6.0 optimum
    accelerate GPTQMODEL_CPU_WORKERS=2 env/bin/python tests/golden/make_layouts.py

Codes, scales, zero points and groups are drawn by NumPy from a seed, so the test draws the
same ones; GPTQModel is given the weight that they stand for. Recorded are its tensors, and
what its layer makes of them again: the weight.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FILE = Path(__file__).with_name("layouts.npz")


class Case(NamedTuple):
    """W[M, N] in ``bits`` bits, groups of ``group`` columns, in the layout ``layout``."""

    layout: str
    bits: int
    group: int
    symmetric: bool = False
    act_order: bool = False


CASES = {
    "gptq-4": Case("gptq_v2", 4, 32),
    "gptq-4-sym": Case("gptq_v2", 4, 32, symmetric=True),
    "gptq-4-g-idx": Case("gptq_v2", 4, 16, act_order=True),
    "gptq-3": Case("gptq_v2", 3, 32),
    "gptq-2": Case("gptq_v2", 2, 16),
    "gptq-8": Case("gptq_v2", 8, 64),
    "awq": Case("awq", 4, 32),
}
ROWS = 32
COLUMNS = 64


def draw(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Codes C[M, N], scales [M, G] (exact in float16, of three digits), zero points Z[M,
    G], g_idx[N].
    """
    rng = np.random.default_rng([case.bits, case.group, case.symmetric, case.act_order])
    groups = COLUMNS // case.group
    top = 1 << case.bits
    codes = rng.integers(0, top, (ROWS, COLUMNS), dtype=np.int32)
    scales = rng.integers(1, 200, (ROWS, groups)).astype(np.float32) / 1024
    zeros = rng.integers(0, top, (ROWS, groups), dtype=np.int32)
    if case.symmetric:
        zeros[:] = top // 2
    g_idx = (np.arange(COLUMNS) // case.group).astype(np.int32)
    return codes, scales, zeros, rng.permutation(g_idx) if case.act_order else g_idx


def weight_of(case: Case) -> np.ndarray:
    """The weight that the case's codes stand for, float32 [M, N]; exact."""
    codes, scales, zeros, g_idx = draw(case)
    return scales[:, g_idx] * (codes - zeros[:, g_idx]).astype(np.float32)


def record(case: Case) -> dict[str, np.ndarray]:
    """GPTQModel's tensors by suffix, and its own dequantised weight."""
    import torch
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    _, scales, zeros, g_idx = (torch.from_numpy(array) for array in draw(case))
    plain = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    plain.weight.data = torch.from_numpy(weight_of(case))
    shape: dict[str, Any] = {
        "bits": case.bits,
        "group_size": case.group,
        "sym": case.symmetric,
        "bias": False,
        "desc_act": case.act_order,
        "in_features": COLUMNS,
        "out_features": ROWS,
    }
    made = (AwqTorchLinear if case.layout == "awq" else TorchLinear)(**shape, register_buffers=True)
    if case.layout == "awq":
        made.pack(plain, scales, zeros.float())
        names = ("qweight", "qzeros", "scales")
        tensors = {name: getattr(made, name) for name in names}
        back = dequantize_gemm(*tensors.values(), bits=4, group_size=case.group)
    else:
        made.pack_original(plain, scales, zeros, g_idx)
        tensors = {name: getattr(made, name) for name in ("qweight", "qzeros", "scales", "g_idx")}
        made.post_init()
        back = made.dequantize_weight()
    return {name: t.numpy() for name, t in tensors.items()} | {
        "weight": back.float().T.contiguous().numpy()
    }


if __name__ == "__main__":
    found = {
        f"{name}/{key}": array
        for name, case in CASES.items()
        for key, array in record(case).items()
    }
    for name, case in CASES.items():
        off = np.abs(found[f"{name}/weight"] - weight_of(case)).max()
        print(f"{name}: {off:.2g} from the weight that it was given")
    np.savez_compressed(FILE, **found)
