"""What the GGUF tests share: the golden input and digests, matrices of every kind, ggml's
own quantisers.
"""

from __future__ import annotations

import ctypes
import hashlib
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from hypothesis import strategies as st

from conftest import oracle
from refllm.formats.gguf.types import TYPES, row_bytes
from strategies import build, seeds

LEGACY = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
K_QUANTS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
BLOCKS = (*LEGACY, *K_QUANTS, "MXFP4", "IQ4_NL")
FLOATS = ("F32", "F16", "BF16")

# First 12 hex digits of the md5 of ggml's bytes for ``golden_input``, without and with
# ``golden_importance`` (x86-64, ggml 0.21 to 0.25 without fused multiply-add).
DIGESTS = {
    "Q4_0": ("21d428ccaa19", "257f49b01a50"), "Q4_1": ("d9c7928e3baa", "576d57cd1961"),
    "Q5_0": ("70627dbb76e7", "b8966de49616"), "Q5_1": ("1130ce4269dc", "e146f18438f9"),
    "Q8_0": ("ad2b80b972be", "ad2b80b972be"), "Q2_K": ("e64f815c48b5", "f1c3de1de134"),
    "Q3_K": ("a80db95e16b5", "36b0fd960769"), "Q4_K": ("745ec4eca4b6", "1c00e46920fd"),
    "Q5_K": ("46760c5e6b11", "0ea37fc73198"), "Q6_K": ("eddd68cc19c6", "0613ce6c6f2d"),
    "MXFP4": ("7211cba3d11b", "7211cba3d11b"), "IQ4_NL": ("82e1427381e2", "3db366cc87dc"),
}  # fmt: skip


def digest(x: np.ndarray) -> str:
    return hashlib.md5(np.ascontiguousarray(x).tobytes()).hexdigest()[:12]


def golden_input() -> np.ndarray:
    """float32 (4, 512): a sawtooth; small values; outliers; half zeros."""
    i = np.arange(2048)
    x = (((7919 * i + 104729) % 20011 - 10005) / 4096).astype(np.float32).reshape(4, 512)
    x[1] = x[1] * np.float32(0.015625) * np.abs(x[1])
    x[2, ::64] *= 8
    x[3, 256:] = 0
    return x


def golden_importance() -> np.ndarray:
    return (1 + ((31 * np.arange(512)) % 97) / 16).astype(np.float32)


SPECIAL = (
    "signed_zeros",
    "ties",
    "lone",
    "tiny_steps",
    "sign_runs",
    "near_float16_max",
    "equal_pairs",
    "sparse",
)


def tens(exponents: np.ndarray) -> np.ndarray:
    """10 to the power of each, float32, one by one: NumPy's own power differs by processor
    in the last bit.
    """
    return np.array([10.0 ** float(e) for e in exponents.ravel()], dtype=np.float32).reshape(
        exponents.shape
    )


def special(name: str, shape: tuple[int, int], seed: int) -> np.ndarray:
    """Inputs on which encoders disagree: ties, zeros of both signs, scales that round to 0,
    one value alone.
    """
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape).astype(np.float32)
    if name == "signed_zeros":
        x = np.where(rng.random(shape) < 0.5, np.float32(0), np.float32(-0.0)) * np.float32(1)
        x[:, ::97] = np.abs(rng.standard_normal(x[:, ::97].shape)).astype(np.float32)
    elif name == "ties":
        x = (rng.integers(-16, 17, shape) / 2).astype(np.float32)
    elif name == "lone":
        x[:] = 0
        x[np.arange(shape[0]), rng.integers(0, shape[1], shape[0])] = rng.standard_normal(shape[0])
    elif name == "tiny_steps":
        x *= tens(rng.uniform(-12, -5, (shape[0], 1)).astype(np.float32))
    elif name == "sign_runs":
        x = np.where(np.arange(shape[1]) // 16 % 2, np.abs(x), -np.abs(x))
    elif name == "near_float16_max":
        x *= tens(rng.uniform(4, 7, (shape[0], 1)).astype(np.float32))
    elif name == "equal_pairs":
        x = np.repeat(x[:, ::2], 2, axis=1) * np.where(
            np.arange(shape[1]) % 2, np.float32(-1), np.float32(1)
        )
    elif name == "offset":  # values a few units in the last place apart
        base = tens(rng.uniform(-3, 4.8, (shape[0], 1))) * rng.choice([-1, 1])
        x = base + rng.integers(0, rng.integers(2, 3000), shape) * np.spacing(np.abs(base))
    elif name == "sparse":
        x[rng.random(shape) < 0.9] = 0
    return x.astype(np.float32)


USUAL = ("normal", "outlier_column", "zero", "constant", "denormal", "one_sided")


@st.composite
def matrices(
    draw: st.DrawFn, columns: int = 512, kinds: tuple[str, ...] = (*USUAL, *SPECIAL)
) -> np.ndarray:
    """float32 [1 … 3, columns] of every kind."""
    kind = draw(st.sampled_from(kinds))
    rows = draw(st.integers(1, 3))
    seed = draw(seeds)
    return (
        special(kind, (rows, columns), seed)
        if kind in (*SPECIAL, "offset")
        else build(kind, (rows, columns), seed)
    )


@st.composite
def importances(draw: st.DrawFn, columns: int = 512) -> np.ndarray:
    """float32 [columns] ≥ 0, over six powers of ten, some of them 0."""
    rng = np.random.default_rng(draw(seeds))
    w = 10.0 ** rng.uniform(-4, 2, columns)
    return np.where(rng.random(columns) < draw(st.sampled_from([0.0, 0.1])), 0.0, w).astype(
        np.float32
    )


def edge_inputs() -> dict[str, np.ndarray]:
    """Named matrices (3, 512), every kind once; ``extreme`` is ± the largest float32."""
    made = {name: special(name, (3, 512), 1) for name in (*SPECIAL, "offset")}
    return made | {name: build(name, (3, 512), 1) for name in (*USUAL, "extreme")}


# --- ggml ---------------------------------------------------------------------------------


@cache
def _library(folder: Path) -> Any:
    lib = ctypes.CDLL(str(folder / "libggml-base.so"))
    floats = ctypes.POINTER(ctypes.c_float)
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        floats,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        floats,
    ]
    return lib


def ggml_quantize(x: np.ndarray, type: str, importance: np.ndarray | None = None) -> np.ndarray:
    """ggml's own bytes, uint8 [R, row_bytes]; to be called in a test that is marked
    ``llamacpp``.
    """
    package = oracle("llama_cpp", "pip install llama-cpp-python")
    lib = _library(Path(package.__file__).parent / "lib")
    x = np.ascontiguousarray(x, dtype=np.float32)
    out = np.empty((x.shape[0], row_bytes(type, x.shape[1])), dtype=np.uint8)
    floats = ctypes.POINTER(ctypes.c_float)
    weights = (
        None if importance is None else np.ascontiguousarray(importance).ctypes.data_as(floats)
    )
    written = lib.ggml_quantize_chunk(
        TYPES[type].id,
        x.ctypes.data_as(floats),
        out.ctypes.data,
        0,
        x.shape[0],
        x.shape[1],
        weights,
    )
    assert written == out.nbytes
    return out


def llama_cpp_logits(path: Path, ids: list[int]) -> np.ndarray:
    """llama.cpp's logits [T, V]: F32 cache, one thread; for a test that is marked ``llamacpp``."""
    llama_cpp = oracle("llama_cpp", "pip install llama-cpp-python")
    parameters = llama_cpp.llama_model_default_params()
    # weights repacked for AMX: 0.3.36 ends in a segmentation fault on small ones
    parameters.use_extra_bufts = False
    with mock.patch.object(
        llama_cpp.llama_cpp, "llama_model_default_params", return_value=parameters
    ):
        model = llama_cpp.Llama(
            str(path),
            logits_all=True,
            type_k=0,
            type_v=0,
            flash_attn=False,
            n_threads=1,
            n_threads_batch=1,
            n_ctx=max(64, len(ids)),
            verbose=False,
        )
    model.eval(ids)
    scores = np.array(model.scores[: len(ids)])
    model.close()
    return scores
