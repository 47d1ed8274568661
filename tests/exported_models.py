"""What the tests of exported checkpoints share: a model's logits, and those of transformers
for the same files.
"""

from __future__ import annotations

import numpy as np

from conftest import oracle, to_host
from networks import VOCAB
from refllm.model.attention import CausalAttend
from refllm.model.llama import PROJECTIONS, forward, logits

IDS = np.random.default_rng(7).integers(0, VOCAB, (12, 8))


def output(model, weights=None, ids=IDS) -> np.ndarray:
    """Logits [B, S, V]."""
    weights = model.weights if weights is None else weights
    positions = np.tile(np.arange(ids.shape[1]), len(ids))
    attend = CausalAttend([ids.shape[1]] * len(ids), model.config.sliding_window)
    hidden = forward(weights, model.config, ids.reshape(-1), positions, attend)
    return to_host(logits(weights, hidden)).reshape(*ids.shape, -1)


def their_model(path):
    torch = oracle("torch")
    transformers = oracle("transformers")
    oracle("compressed_tensors")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report  # nothing missing, unexpected or of another shape
    return model.eval()


def products_of(theirs, ids):
    """Logits of a model of transformers, and of each of its linears (layer, key) → the
    input and what it made.
    """
    torch = oracle("torch")
    seen: dict[tuple[int, str], tuple[np.ndarray, np.ndarray]] = {}
    for index, layer in enumerate(theirs.model.layers):
        for key, place in PROJECTIONS.items():

            def note(module, inputs, made, at=(index, key)):
                seen[at] = inputs[0].numpy(), made.numpy()

            layer.get_submodule(place).register_forward_hook(note)
    with torch.no_grad():
        return theirs(torch.from_numpy(ids)).logits.numpy(), seen
