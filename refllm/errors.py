"""``InputError``: what the caller did wrong, stated in one sentence.

Functions that document a ``ValueError`` raise this subclass of it, so that a program can
tell a wrong argument or a damaged file from a fault of refllm or of NumPy: the command
line prints the sentence of an ``InputError`` and exits with code 2, and shows the traceback
of any other exception.

Left out: wrong types in a call (``TypeError``), files that the system cannot open
(``OSError``), a backend that is not there (``refllm.backend.BackendUnavailable``).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """An argument, a file or an option that cannot be used; the message says what to do."""


class UnsupportedModel(InputError):
    """A configuration asks for something that refllm does not compute."""


def message(error: BaseException) -> str:
    """The message of an exception, whose class may be the caller's own."""
    try:
        return str(error)
    except Exception:
        return "(its message could not be read)"


def alternatives(name: object, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: what there is, and the nearest of it.

    >>> alternatives("gtpq", ["rtn", "gptq"])
    "choose one of rtn, gptq; did you mean 'gptq'?"
    >>> alternatives(8, ["rtn", "gptq"])
    'choose one of rtn, gptq'
    """
    listed = list(known)
    return f"choose one of {', '.join(listed)}{did_you_mean(name, listed)}"


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` where one of the names is near; letter case counts for nothing.

    >>> did_you_mean("Stdlb", ["stdlib", "smollm2"]), did_you_mean("x", ["stdlib"])
    ("; did you mean 'stdlib'?", '')
    """
    folded = {each.casefold(): each for each in reversed(list(known))}
    near = difflib.get_close_matches(str(name).casefold(), folded, n=1)
    return f"; did you mean {folded[near[0]]!r}?" if near else ""
