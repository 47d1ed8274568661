"""Formats: how a value becomes bits, and how a weight in few bits multiplies.

The lowest package of the data plane; it knows no model. Read ``uniform`` first: every
integer method of ``refllm.quant`` decides what goes into the scales, zero points and codes
that it defines.

| file                   | what it answers                                                       |
|------------------------|-----------------------------------------------------------------------|
| granularity            | which elements share a scale                                          |
| uniform                | ``Scheme``: which scale, zero point and codes a range gets            |
| packing                | codes of 1 to 8 bits as a bit stream; scales in fewer bits            |
| quantized_linear       | a weight in packed codes that multiplies                              |
| int_matmul             | exact integer products by floating-point units                        |
| w8a8_linear            | weights and activations in integers                                   |
| minifloat              | FP16, BF16, FP8, FP4 and E8M0, from float32's own bits                |
| block_float            | small floats in blocks that share a scale: FP8, MXFP4, NVFP4          |
| fp8_linear             | weights and activations in FP8, with a simulated accumulator          |
| layouts, float_layouts | the tensors of compressed-tensors, GPTQ, AWQ and DeepSeek checkpoints |
| quantization_config    | their entry in ``config.json``                                        |
| gguf/                  | llama.cpp's block formats and files                                   |
"""

from refllm.formats import gguf, minifloat
from refllm.formats.block_float import MXFP4, MXFP8, NVFP4, BlockFloatLinear, FloatScheme
from refllm.formats.fp8_linear import Accumulator, Fp8Linear
from refllm.formats.granularity import GRANULARITIES, Granularity
from refllm.formats.int_matmul import integer_matmul, scaled_matmul
from refllm.formats.layouts import LAYOUTS, WeightLayout, layout_for
from refllm.formats.packing import pack, unpack
from refllm.formats.quantized_linear import (
    ActOrderLinear,
    QuantizedLinear,
    effective_bits,
    fake_quantize,
    quantize,
)
from refllm.formats.uniform import RULES, Scheme, dequantize_codes, qparams, quantize_codes
from refllm.formats.w8a8_linear import W8A8Linear

__all__ = [
    "GRANULARITIES",
    "LAYOUTS",
    "MXFP4",
    "MXFP8",
    "NVFP4",
    "RULES",
    "Accumulator",
    "ActOrderLinear",
    "BlockFloatLinear",
    "FloatScheme",
    "Fp8Linear",
    "Granularity",
    "QuantizedLinear",
    "Scheme",
    "W8A8Linear",
    "WeightLayout",
    "dequantize_codes",
    "effective_bits",
    "fake_quantize",
    "gguf",
    "integer_matmul",
    "layout_for",
    "minifloat",
    "pack",
    "qparams",
    "quantize",
    "quantize_codes",
    "scaled_matmul",
    "unpack",
]
