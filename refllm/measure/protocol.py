"""The protocol behind a figure of bits per byte, and what may be claimed of the text.

Two figures of one model are comparable if both were measured on the same text with the same
windows, so each says both: which documents, how many tokens of them, the Python they come
from, the window and the stride.

| part    | `refllm eval`, `refllm quantize`, model cards                              |
|---------|----------------------------------------------------------------------------|
| text    | the held-out modules of the running Python, in order, or their first tokens |
| windows | 1,024 tokens (or the model's positions), every half of a window             |
| claim   | "held out" only if the model's own manifest lists every document so         |

Left out: text that a model has seen under another name; checkpoints without a manifest, of
which nothing is claimed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

MANIFEST = "manifest.json"  # written beside the weights by ``refllm train``
_NAMED = 3  # documents that are named at most


def is_held_out(model: str | Path, documents: Iterable[str]) -> bool:
    """Whether the manifest in the directory ``model`` lists each of the named documents as
    held out from training, and none as trained on; False without a readable manifest.
    """
    try:
        manifest = json.loads((Path(model) / MANIFEST).read_text(encoding="utf-8"))
        held_out = set(manifest["held out"])
        trained_on = {name for stream in manifest["trained on"].values() for name in stream}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return set(documents) <= held_out - trained_on


def describe_text(tokens: int, documents: Sequence[str], python: str) -> str:
    """The scored text, by the names of its documents.

    >>> describe_text(20_000, ["argparse.py"], "3.11.7")
    '20,000 tokens of argparse.py, Python 3.11.7'
    """
    text = f"{len(documents)} documents"
    if len(documents) <= _NAMED:
        text = ", ".join(documents)
    return f"{tokens:,} tokens of {text}, Python {python}"


def describe_windows(window: int, stride: int) -> str:
    """The windows: how many tokens the model reads at once, and how far they move.

    >>> describe_windows(1024, 512)
    '1,024 tokens every 512'
    """
    return f"{window:,} tokens every {stride:,}"
