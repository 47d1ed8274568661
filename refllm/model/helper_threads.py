"""Parts of one product at the same time, on threads that wait between products: skip on first
reading.

OpenBLAS divides large products among its threads, but the small ones of ``weight_layout.Blocks``
it leaves to the thread that calls. So the blocks of a weight are divided here: this thread
multiplies the first share, helper threads the others. NumPy releases the interpreter's lock
while it multiplies, so the shares really run at once. Handing a share over and waiting for it
takes about 20 microseconds; reading a weight of 1 MB from memory takes twice that.

Left out: dividing rows, elementwise work and attention; more helpers than BLAS has threads.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from functools import cache

from refllm.errors import InputError

Call = Callable[[], object]

PATIENCE = 1.0  # seconds to wait for a helper whose product was interrupted


class Helper:
    """A thread that runs one call at a time."""

    def __init__(self) -> None:
        self._call: Call | None = None
        self._error: BaseException | None = None
        # Both are held while nothing is to be done: a lock may be released by another thread.
        self._start = threading.Lock()
        self._done = threading.Lock()
        self._start.acquire()
        self._done.acquire()
        threading.Thread(target=self._run, name="refllm helper", daemon=True).start()

    def start(self, call: Call | None) -> None:
        """Run a call; None ends the thread."""
        self._call = call
        self._start.release()

    def wait(self, timeout: float = -1) -> None:
        """Wait for the call that was started; raises what it raised."""
        self._done.acquire(timeout=timeout)
        if self._error is not None:
            error = self._error
            self._error = None
            raise error

    def _run(self) -> None:
        while True:
            self._start.acquire()
            if self._call is None:
                return
            try:
                self._call()
            except BaseException as error:
                self._error = error
            self._call = None  # what it refers to may be freed
            self._done.release()


class HelperThreads:
    """``count`` helpers and the thread that calls ``run``."""

    def __init__(self, count: int):
        self.count = count
        self._free = threading.Lock()
        self._helpers: list[Helper] = []
        self._process = -1

    def run(self, calls: Sequence[Call]) -> None:
        """Run all calls, the first one in this thread, and return when all have ended.

        If another thread is using the helpers, this one runs all calls itself. The first
        exception is raised again. After an exception, Ctrl-C included, new helpers are made:
        nothing says that the old ones have ended their calls.
        """
        if len(calls) > self.count + 1:
            raise InputError(f"{len(calls)} calls for {self.count} helpers")
        if not self._free.acquire(blocking=False):
            for call in calls:
                call()
            return
        try:
            self._run(calls)
        finally:
            self._free.release()

    def _run(self, calls: Sequence[Call]) -> None:
        if self._process != os.getpid():  # first use, or a fork, which copies no threads
            self._helpers = [Helper() for _ in range(self.count)]
            self._process = os.getpid()
        used = self._helpers[: len(calls) - 1]
        try:
            for helper, call in zip(used, calls[1:], strict=True):
                helper.start(call)
            calls[0]()
            for helper in used:
                helper.wait()
        except BaseException:
            self._process = -1
            for helper in used:
                _retire(helper)
            raise


def _retire(helper: Helper) -> None:
    """End a helper after its present call, which may still write its share of a result."""
    try:
        helper.wait(PATIENCE)
        helper.start(None)
    except BaseException:  # the helper's own error is not the first one
        return


@cache
def helper_threads(count: int) -> HelperThreads:
    """The process's helpers for ``count`` + 1 threads; they start when they are first used."""
    return HelperThreads(count)
