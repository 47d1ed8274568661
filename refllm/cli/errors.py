"""What becomes of an exception: one sentence and exit code 2 for bad input, a traceback for
a bug.

| what was raised                                              | what the user sees             | exit |
|--------------------------------------------------------------|--------------------------------|------|
| a wrong option; ``BackendUnavailable``; a file that is not   | one sentence on stderr         | 2    |
| there; too little memory; a ``ValueError`` that a ``raise``  |                                |      |
| in refllm made                                               |                                |      |
| Ctrl-C                                                       | nothing                        | 130  |
| the reader of a pipe went away                               | nothing                        | 1    |
| anything else                                                | Python's traceback             | 1    |

A ``ValueError`` that NumPy raises inside refllm is a bug in refllm, and is shown as one:
what tells the two apart is the source line that the traceback ends on.
"""

from __future__ import annotations

import errno
import linecache
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import typer
from typer.core import TyperGroup

from refllm.backend import BackendUnavailable

_PACKAGE = Path(__file__).resolve().parent.parent


class Commands(TyperGroup):
    """The group of all commands, with the table above as its policy."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command and leave by ``SystemExit``."""
        for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
            if getattr(sys, name) is None:  # closed by the caller, as by `>&-`
                setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (open to the end)
        for stream in (sys.stdout, sys.stderr):
            # a terminal that is not UTF-8 shows '?', and no error
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        try:
            code = super().main(*args, **{**kwargs, "standalone_mode": False})
        except (KeyboardInterrupt, typer.Abort):
            sys.exit(130)
        except Exception as error:
            sentence = explain(error)
            if sentence is None:
                raise
            print(f"Error: {sentence}", file=sys.stderr)
            sys.exit(2)
        sys.exit(code if isinstance(code, int) else 0)


def explain(error: Exception) -> str | None:
    """One sentence for bad input; None for a bug."""
    # a usage error of click, which newer typers bring along under another name
    if hasattr(error, "format_message"):
        context = getattr(error, "ctx", None)
        if context is not None:
            hint = f" (see {context.command_path} --help)"
        else:
            hint = ""
        return f"{error.format_message().rstrip('.')}{hint}"
    if isinstance(error, BackendUnavailable):
        return str(error)
    if isinstance(error, MemoryError):  # NumPy's and CuPy's say how much was asked for
        if str(error):
            return f"out of memory: {error}"
        return "out of memory"
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        if error.errno == errno.ENOSPC:  # a write does not know its file
            return f"{error.filename or 'the output'}: no space is left on its disk: make room, or choose another disk"
        if error.filename:
            return f"{error.filename}: {error.strerror}"
        return str(error)
    if isinstance(error, (ValueError, FloatingPointError)) and _raised_by_refllm(
        error.__traceback__
    ):
        return str(error)
    return None


def _raised_by_refllm(traceback: TracebackType | None) -> bool:
    """Does the traceback end on a ``raise`` statement in this package?"""
    if traceback is None:
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    file = traceback.tb_frame.f_code.co_filename
    line = linecache.getline(file, traceback.tb_lineno).strip()
    return Path(file).resolve().is_relative_to(_PACKAGE) and line.startswith("raise ")
