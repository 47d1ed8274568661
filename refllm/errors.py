"""``InputError``: what the caller did wrong, stated in one sentence.

Functions that document a ``ValueError`` raise this subclass of it, so that a program can
tell a wrong argument or a damaged file from a fault of refllm or of NumPy: the command
line prints the sentence of an ``InputError`` and exits with code 2, and shows the traceback
of any other exception.

Left out: wrong types in a call (``TypeError``), files that the system cannot open
(``OSError``), a backend that is not there (``refllm.backend.BackendUnavailable``).
"""

from __future__ import annotations


class InputError(ValueError):
    """An argument, a file or an option that cannot be used; the message says what to do."""


class UnsupportedModel(InputError):
    """A configuration asks for something that refllm does not compute."""
