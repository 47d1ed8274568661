"""The root of the command line: what ``refllm`` alone prints, what the user sees of an
exception, and what a command changes in its process.

| exception                                                    | what the user sees     | exit |
|--------------------------------------------------------------|------------------------|------|
| a wrong option; ``BackendUnavailable``; a missing file; too  | one sentence on stderr | 2    |
| little memory; an ``InputError``                             |                        |      |
| Ctrl-C                                                       | nothing                | 130  |
| ``BrokenPipeError``: the reader of a pipe is gone            | nothing                | 1    |
| anything else                                                | Python's traceback     | 1    |

A ``ValueError`` that NumPy raises inside refllm is a bug in refllm and shows its traceback;
what the user did wrong is an ``InputError`` (``refllm.errors``).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from refllm import __version__
from refllm.backend import BackendUnavailable
from refllm.cli.options import flag
from refllm.cli.threads import describe_blas, own_threads
from refllm.errors import InputError
from refllm.terminal import note

VersionOption = Annotated[bool, flag("Print the version and exit.", "--version")]
VerboseOption = Annotated[
    bool, flag("Say which BLAS library computes, on which kernels.", "--verbose")
]

_M_TRIM_THRESHOLD = -1  # malloc.h
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3
_LARGEST = 2**31 - 1  # mallopt takes an int


class Commands(TyperGroup):
    """The group of all commands; it turns exceptions into messages and exit codes."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command and exit by ``SystemExit``."""
        for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
            if getattr(sys, name) is None:  # closed by the caller, as by `>&-`
                null = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115 (stays open)
                setattr(sys, name, null)
        for stream in (sys.stdout, sys.stderr):
            # a terminal that is not UTF-8 shows '?' instead of an error
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        try:
            with own_threads():
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


def version_or_help(
    context: typer.Context, version: VersionOption = False, verbose: VerboseOption = False
) -> None:
    """The deployment stack of a language model in readable NumPy, on a GPU through CuPy.

    Every command takes --help, which shows examples. To begin: refllm tour
    """
    if verbose:
        note(describe_blas())
    if version:
        typer.echo(f"refllm {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def explain(error: Exception) -> str | None:
    """One sentence for bad input; None for a bug.

    >>> explain(FileNotFoundError(2, "No such file or directory", "notes.txt"))
    'notes.txt: No such file or directory'
    >>> explain(KeyError("w")) is None
    True
    """
    # a usage error of click, which newer versions of typer bundle under another name
    if hasattr(error, "format_message"):
        context = getattr(error, "ctx", None)
        hint = ""
        if context is not None:
            hint = f" (see {context.command_path} --help)"
        return f"{error.format_message().rstrip('.')}{hint}"
    if isinstance(error, BackendUnavailable):
        return str(error)
    if isinstance(error, MemoryError):  # NumPy and CuPy say how much was requested
        return f"out of memory: {error}".removesuffix(": ")
    if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
        return _explain_file_error(error)
    if isinstance(error, InputError):
        return str(error)
    return None


def _explain_file_error(error: OSError) -> str:
    """The file and the reason, in one sentence."""
    if error.errno == errno.ENOSPC:  # a failing write does not carry its file name
        file = error.filename or "the output"
        return f"{file}: no space is left on its disk: free some space, or choose another disk"
    if error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def keep_freed_memory() -> bool:
    """Ask glibc to keep freed memory; return whether it agreed. Without glibc, nothing changes.

    glibc returns large freed blocks to the kernel and requests zeroed pages again a moment
    later. A training step, or a prefill, frees and allocates the same arrays hundreds of
    times: thousands of page faults per step, against about 100 when the memory is kept
    (``benchmarks/training.py`` measures both). The setting holds for the whole process, so
    commands call this and the library does not.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # the pad is the whole heap of a worker thread: without it, threads gain nothing
    settings = {_M_MMAP_THRESHOLD: _LARGEST, _M_TRIM_THRESHOLD: _LARGEST, _M_TOP_PAD: 64 << 20}
    return all(mallopt(option, value) == 1 for option, value in settings.items())
