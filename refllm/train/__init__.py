"""How is a network trained? From documents to a trained checkpoint on NumPy or CuPy, with the
backward pass written by hand. Read ``loop`` first: ``train`` is the whole procedure.

In reading order:

- ``loop``: initial weights, data-parallel steps, evaluation, resume
- ``schedule``: the phases of a run, and the token windows of each step
- ``data``: from documents to token streams
- ``loss``: cross-entropy and its gradients, with few logits in memory
- ``backward``: the gradients of the network
- ``optimizer``: AdamW, Muon, learning rates, gradient clipping
- ``state``: the checkpoint of a run
- ``distill``: a larger network as the teacher of a smaller one
- ``fp8``: training with 8-bit matrix products
"""

from refllm.train.backward import Product, loss_and_gradients, mean_loss
from refllm.train.distill import make_teacher
from refllm.train.fp8 import Fp8
from refllm.train.loop import initialize, train
from refllm.train.loss import cross_entropy, cross_entropy_and_gradients
from refllm.train.optimizer import AdamW, Muon, clip_by_global_norm, learning_rate, orthogonalize
from refllm.train.schedule import Phase, Plan
from refllm.train.state import State, load_state, save_state

__all__ = [
    "AdamW",
    "Fp8",
    "Muon",
    "Phase",
    "Plan",
    "Product",
    "State",
    "clip_by_global_norm",
    "cross_entropy",
    "cross_entropy_and_gradients",
    "initialize",
    "learning_rate",
    "load_state",
    "loss_and_gradients",
    "make_teacher",
    "mean_loss",
    "orthogonalize",
    "save_state",
    "train",
]
