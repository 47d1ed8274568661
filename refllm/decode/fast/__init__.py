"""Skip this package on a first reading: it computes nothing that ``model/llama.py`` does not.

How can a small model decode without spending more time in Python than in its matrix
products? The definition of every operation is ``model.llama.forward``; the two files repeat
it in the form that OpenBLAS and NumPy execute fastest, and the tests compare them with it.

1. ``captured_step``: a batch of few tokens, with all arrays and bound products prepared
   once per batch size, as a GPU captures a CUDA graph.
2. ``single_token``: one token of one sequence through a small draft model, with norm gains
   and RoPE folded into the weights.
"""

from refllm.decode.fast.captured_step import CapturedStep, DecodeStep, make_decode_step
from refllm.decode.fast.single_token import SingleTokenStep

__all__ = ["CapturedStep", "DecodeStep", "SingleTokenStep", "make_decode_step"]
