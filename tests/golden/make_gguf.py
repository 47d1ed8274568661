"""Digests of ggml's own bytes for inputs on which encoders disagree: ``python
tests/golden/make_gguf.py``.

Needs llama-cpp-python, built for x86-64 without fused multiply-add in ggml-base (as its
default build is).
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import gguf_data  # noqa: E402 (the tests' own inputs)


def main() -> None:
    """Write ``gguf.json``: input → type → digests without and with importance."""
    made: dict[str, dict[str, list[str]]] = {}
    with mock.patch.object(
        gguf_data, "oracle", lambda name, install="": importlib.import_module(name)
    ):
        for name, x in gguf_data.edge_inputs().items():
            made[name] = {}
            for type in gguf_data.BLOCKS:
                weights = (None, gguf_data.golden_importance()) if name != "extreme" else (None,)
                made[name][type] = [
                    gguf_data.digest(gguf_data.ggml_quantize(x, type, w)) for w in weights
                ]
    made["peer"] = {"llama-cpp-python": [importlib.import_module("llama_cpp").__version__]}
    (HERE / "gguf.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
