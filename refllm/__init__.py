"""refllm: the deployment stack of a language model in readable NumPy, on a GPU through CuPy.

``refllm.load("stdlib")`` loads a bundled model, ``refllm.load(path)`` a Hugging Face
directory or a GGUF file, ``refllm.load("org/name")`` one of the Hugging Face Hub; all return a
``refllm.Model`` with ``logits``, ``generate``, ``stream`` and ``chat``. Everything else is
imported from its package, for example ``from refllm.quant import gptq``. ``ARCHITECTURE.md`` is
the map.

The packages in reading order; ``help(refllm.model)`` names the file to read first:

- ``backend``      which array library owns an array: NumPy or CuPy
- ``model``        the network: configuration, layers, attention, weights
- ``decode``       which token comes next: sampling, speculative decoding, conversations
- ``api``          ``load`` and ``Model``
- ``formats``      how a value becomes bits: integers, small floats, GGUF blocks
- ``quant``        which code each weight gets: RTN, GPTQ, AWQ, SmoothQuant, LLM.int8(), FP8
- ``kv``           where keys and values live: paged, shared by prefix, quantised, sparse
- ``serve``        which request runs when: the engine and its scheduler
- ``simulate``     the same scheduler with a clock instead of a model
- ``measure``      perplexity, KL divergence, bootstrap intervals, the roofline
- ``checkpoints``  files in and out: safetensors, Hugging Face directories, GGUF, tokenizers,
                   chat templates
- ``corpus``       the text that every Python installation carries
- ``train``        backward pass, optimizers, distillation
- ``experiments``  one file per experiment; ``figures`` draws the results
- ``jobs``         long work with progress and resume: quantise, train, publish
- ``tour``, ``cli``  the command line

``import refllm`` imports nothing else: ``load`` and ``Model`` are resolved on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from refllm.api import Model as Model
    from refllm.api import load as load

__version__ = "0.1.0"
__all__ = ["Model", "__version__", "load"]


def __getattr__(name: str) -> object:
    """Resolve ``load`` and ``Model`` when they are first used."""
    if name == "load":
        from refllm.api import load

        return load
    if name == "Model":
        from refllm.api import Model

        return Model
    raise AttributeError(f"module 'refllm' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, so that they can be completed before they are resolved."""
    return sorted(__all__)
