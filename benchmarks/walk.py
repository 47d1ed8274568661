"""How many files a reader must open to follow one way through refllm, counted while it runs.

    python benchmarks/walk.py              a table: files and functions per way
    python benchmarks/walk.py --files      and the files, in the order of their first call

| way      | what runs                                                                       |
|----------|---------------------------------------------------------------------------------|
| generate | ``Model.generate(text, 8)``                                                     |
| drafter  | the same, with the bundled draft model proposing 4 tokens per step              |
| engine   | ``Engine(model, num_blocks=64)``: submit one request, run, decode its tokens    |
| quantize | ``refllm quantize --method gptq --max-tokens 2000`` on the bundled model        |

A way runs once unobserved, so that imports and caches are done, and then under
``sys.setprofile``, in all threads. A function counts if it is called; module and class
bodies do not count. The numbers are counted and depend on no hardware.

Left out: the model is loaded beforehand, so loading counts only where a way does it itself.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import refllm

PACKAGE = Path(refllm.__file__).resolve().parent
PROMPT = "def f("
Way = Callable[[], object]
Trace = dict[str, set[str]]  # file relative to the package -> qualified names of functions


def trace(way: Way) -> Trace:
    """Run ``way`` and return the functions of refllm that it calls, files in the order of
    their first call.

    >>> from refllm.terminal import format_bytes
    >>> trace(lambda: format_bytes(1000))
    {'terminal.py': {'format_bytes'}}
    """
    called: Trace = {}

    def observe(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        # the bodies of modules and classes are not "optimized" code
        if event != "call" or not code.co_flags & inspect.CO_OPTIMIZED:
            return
        if code.co_filename.startswith(f"{PACKAGE}/"):
            file = Path(code.co_filename).relative_to(PACKAGE).as_posix()
            called.setdefault(file, set()).add(code.co_qualname)

    threading.setprofile(observe)
    sys.setprofile(observe)
    try:
        way()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return called


def ways() -> dict[str, Way]:
    """The ways by name, ready to run on the bundled model."""
    from refllm.cli import app
    from refllm.decode.speculative.model_drafter import ModelDrafter
    from refllm.serve.engine import Engine
    from refllm.serve.request import Request

    model = refllm.load("stdlib", "numpy")
    drafter = ModelDrafter(refllm.load("stdlib-draft", "numpy"))

    def engine() -> str:
        server = Engine(model, num_blocks=64)
        name = server.submit(Request(model.tokenizer.encode(PROMPT), 8))
        return model.tokenizer.decode(server.run()[name].tokens)

    def quantize() -> None:
        printed = io.StringIO()
        with (
            tempfile.TemporaryDirectory() as folder,
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
        ):
            options = ["--method", "gptq", "--max-tokens", "2000"]
            try:
                app(["quantize", "--output", f"{folder}/quantized", *options])
            except SystemExit as ended:
                if ended.code:
                    raise RuntimeError(printed.getvalue()) from ended

    return {
        "generate": lambda: model.generate(PROMPT, 8),
        "drafter": lambda: model.generate(PROMPT, 8, drafter=drafter),
        "engine": engine,
        "quantize": quantize,
    }


def main() -> None:
    """Print the table, and with ``--files`` the files."""
    parser = argparse.ArgumentParser(description="Count the files and functions of each way.")
    parser.add_argument("ways", nargs="*", help="generate, drafter, engine, quantize; default: all")
    parser.add_argument("--files", action="store_true", help="list the files of each way")
    chosen = parser.parse_args()
    known = ways()
    print(f"{'way':10}{'files':>6}{'functions':>11}")
    for name in chosen.ways or known:
        known[name]()
        called = trace(known[name])
        print(f"{name:10}{len(called):6}{sum(map(len, called.values())):11}")
        for file, functions in called.items() if chosen.files else ():
            print(f"    {file:40}{len(functions):4}")


if __name__ == "__main__":
    main()
