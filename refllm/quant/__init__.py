"""Which code does each value get? Calibration, rounding, transforms, and whole models.

Read ``gptq`` first, with its naive twin ``obq`` and ``hessian``; then ``recipe``, which runs
every method over a whole model. Each technique is one file: its function on one weight (or
layer), and its class for whole models.

| file             | what it answers                                                   |
|------------------|-------------------------------------------------------------------|
| rtn              | round to nearest                                                  |
| column_quantizer | scales of weights; rounding one column at a time                  |
| obq              | GPTQ in its plain form, with the explicit inverse                 |
| hessian          | the Hessian of the output error, and its triangular factor        |
| gptq             | GPTQ                                                              |
| awq, awq_model   | AWQ: scale and clip search on one weight; on a decoder layer      |
| salience         | the experiment that AWQ starts from: keep 1 % of the channels     |
| smoothquant      | SmoothQuant: weights and activations in 8 bits                    |
| hadamard         | Hadamard matrices, and the fast transform by them                 |
| rotation         | QuaRot, SpinQuant without learning: rotate outliers away          |
| llm_int8         | LLM.int8(): outlier columns in floating point                     |
| fp8              | 8-bit floats, current and delayed scales                          |
| observers        | the range of a tensor from its batches                            |
| histogram        | where to cut a histogram of magnitudes                            |
| mse_range        | the range with the least error                                    |
| layer_inputs     | the tokens and the inputs of each projection, layer by layer      |
| taps             | the inputs of each projection, observed while a network runs      |
| methods          | the loop and the report that all methods share                    |
| recipe           | whole models: ``quantize_model``                                  |
| layer_io         | where layers are read from and kept, so that a killed run resumes |
| export           | quantised models as checkpoints for transformers and vLLM         |
| imatrix          | importance of columns, for the k-quants of llama.cpp              |
| to_gguf          | checkpoints to GGUF files                                         |
| worker_pool      | independent pieces of work on several processes, in order         |

``gptq``, ``hadamard``, ``hessian``, ``obq``, ``rtn``, ``fp8`` and ``export`` are here the
functions, not the modules of the same names: import from a module with
``from refllm.quant.gptq import …``.
"""

from refllm.quant.awq import search_clip, search_scale
from refllm.quant.column_quantizer import GPTQResult
from refllm.quant.export import export
from refllm.quant.fp8 import fp8
from refllm.quant.gptq import gptq
from refllm.quant.hadamard import hadamard, hadamard_transform
from refllm.quant.hessian import Hessian, hessian
from refllm.quant.imatrix import importance
from refllm.quant.layer_inputs import calibration_windows
from refllm.quant.llm_int8 import Int8Linear, OutlierStatistics, int8_matmul
from refllm.quant.methods import Report, TensorReport
from refllm.quant.mse_range import mse_range
from refllm.quant.obq import obq
from refllm.quant.observers import MSE, Entropy, MinMax, MovingAverage, Percentile
from refllm.quant.recipe import METHODS, quantize_layers, quantize_model
from refllm.quant.rotation import Rotations, rotate
from refllm.quant.rtn import rtn
from refllm.quant.smoothquant import migration_scale, smooth_layer, w8a8
from refllm.quant.to_gguf import convert

__all__ = [
    "METHODS",
    "MSE",
    "Entropy",
    "GPTQResult",
    "Hessian",
    "Int8Linear",
    "MinMax",
    "MovingAverage",
    "OutlierStatistics",
    "Percentile",
    "Report",
    "Rotations",
    "TensorReport",
    "calibration_windows",
    "convert",
    "export",
    "fp8",
    "gptq",
    "hadamard",
    "hadamard_transform",
    "hessian",
    "importance",
    "int8_matmul",
    "migration_scale",
    "mse_range",
    "obq",
    "quantize_layers",
    "quantize_model",
    "rotate",
    "rtn",
    "search_clip",
    "search_scale",
    "smooth_layer",
    "w8a8",
]
