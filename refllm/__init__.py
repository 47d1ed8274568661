"""refllm: the deployment stack of a language model in readable NumPy, on a GPU through
CuPy.

``refllm.load(path_or_name)`` gives a ``Model``; everything else is imported from where it
lives, for example ``from refllm.decode.sampling import process_logits``. ``ARCHITECTURE.md`` is the
map.

Importing this package imports nothing else: ``load`` is resolved when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refllm.api import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from refllm.api import load

        return load
    raise AttributeError(f"module 'refllm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
