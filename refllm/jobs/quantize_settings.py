"""What the options of ``refllm quantize`` amount to: a scheme, a dtype, a layout of the files,
and calibration tokens, each checked before anything is written.

| function               | decides                                                            |
|------------------------|--------------------------------------------------------------------|
| ``scheme_for``         | bits, rule and groups of the codes                                 |
| ``stored_dtype``       | the dtype of scales and unquantised tensors                        |
| ``export_spec``        | the layout of the files                                            |
| ``calibration_tokens`` | the windows of text that a method sees                             |

Left out: choosing a method or a scheme by its loss (``experiments.quantization_quality`` has
the table).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from refllm.checkpoints.tensor_files import tensor_shapes
from refllm.checkpoints.tokenizer import Tokenizer
from refllm.corpus import Document
from refllm.formats.float_layouts import layout_for as float_layout_for
from refllm.formats.layouts import layout_for
from refllm.formats.uniform import Scheme
from refllm.model.config import ModelConfig
from refllm.model.llama import PROJECTIONS
from refllm.quant.calibration_data import calibration_windows
from refllm.quant.export import ExportSpec, default_layout
from refllm.quant.fp8 import fp8
from refllm.quant.recipe import default_scheme

# of a document: characters that are encoded per token of a window, to see whether it is long enough
ENCODED_CHARACTERS = 16
_PROJECTION_WEIGHTS = tuple(f"{path}.weight" for path in PROJECTIONS.values())


def scheme_for(
    method: str, bits: int | None, group_size: int | None, symmetric: bool | None
) -> Scheme:
    """A method's default scheme, changed by what is not None; a group of 0 or −1 columns is
    one scale per row.

    >>> print(scheme_for("rtn", bits=3, group_size=0, symmetric=None))
    Scheme(bits=3, rule='half_integer', granularity='channel', group_size=None)
    """
    usual = default_scheme(method)
    group = usual.group_size
    if group_size is not None:
        group = group_size if group_size > 0 else None
    rule = usual.rule
    if symmetric is not None and symmetric != usual.symmetric:
        rule = "half_integer" if symmetric else "asymmetric"
    if method == "fp8" and symmetric is False:
        raise ValueError("fp8 has no zero points: its codes are floats, leave --asymmetric out")
    if bits == 1 and rule != "asymmetric":
        raise ValueError(
            "one bit around zero has no other level than 0: take --bits 2, or --asymmetric"
        )
    granularity = "channel"
    if group is not None:
        granularity = "block" if usual.granularity == "block" else "group"
    return Scheme(usual.bits if bits is None else bits, rule, granularity, group)


def stored_dtype(source: Path) -> str:
    """The dtype of the source where it has two bytes, else float16."""
    raw = json.loads((source / "config.json").read_text("utf-8"))
    dtype = raw.get("dtype", raw.get("torch_dtype"))
    return str(dtype) if dtype in ("float16", "bfloat16") else "float16"


def export_spec(
    config: ModelConfig,
    method: str,
    scheme: Scheme,
    layout: str | None,
    dtype: str,
    options: Mapping[str, object],
) -> ExportSpec:
    """How the quantised model is stored; ``layout`` None is the usual one for its weights.

    Raises
    ------
    ValueError
        if the layout cannot hold such weights.
    """
    if method == "fp8":
        # one block stands for all: the layout depends on the scheme alone
        side = scheme.block[0] if scheme.granularity == "block" else 1
        block = fp8(np.zeros((side, side), np.float32), scheme)
        stored = float_layout_for(block, layout)
    else:
        activations = method == "smoothquant"
        act_order = bool(options.get("act_order")) and not options.get("static_groups")
        act_order = act_order and scheme.granularity == "group"
        usual = default_layout(scheme, activations=activations, act_order=act_order)
        stored = layout_for(scheme, layout or usual, activations=activations, act_order=act_order)
    keep = options.get("keep", ())
    assert isinstance(keep, tuple)
    spec = ExportSpec(stored, dtype, keep)
    spec.plan(config)  # raises for shapes that the layout cannot hold
    return spec


def calibration_tokens(
    config: ModelConfig,
    tokenizer: Tokenizer,
    method: str,
    texts: Sequence[Document] | None,
    samples: int,
    length: int | None,
    seed: int,
) -> np.ndarray:
    """Windows of calibration text, [samples, length]; ``length`` None is 512, or the context.

    Raises
    ------
    ValueError
        for windows that the model cannot read, that the text cannot fill, or that are too
        few for GPTQ's Hessians.
    """
    longest = config.max_position_embeddings
    length = min(512, longest) if length is None else length
    if length > longest:
        raise ValueError(
            f"calibration: windows of {length} tokens are longer than the model's {longest} "
            "positions"
        )
    if texts is not None:
        _check_text(tokenizer, texts, length)
    columns = max(
        shape[1] for name, shape in tensor_shapes(config) if name.endswith(_PROJECTION_WEIGHTS)
    )
    if method == "gptq" and samples * length < columns:
        raise ValueError(
            f"calibration: {samples} windows of {length} tokens are too few for inputs of "
            f"{columns} columns: gptq needs at least {-(-columns // length)} (--samples)"
        )
    return calibration_windows(tokenizer, samples, length, seed, documents=texts)


def _check_text(tokenizer: Tokenizer, texts: Sequence[Document], length: int) -> None:
    """ValueError if all texts together do not fill a window."""
    tokens = 0
    for text in texts:
        tokens += len(tokenizer.encode(text.text[: ENCODED_CHARACTERS * length]))
        if tokens >= length:
            return
    raise ValueError(
        f"calibration: the text has {tokens} tokens, too few for a window of {length}: give more "
        "text, or shorter windows (--length)"
    )
