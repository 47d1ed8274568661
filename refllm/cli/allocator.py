"""Memory that a step frees is kept for the next one.

glibc gives large blocks back to the kernel when they are freed and asks for zeroed pages
again a moment later. A step of training or of a prefill frees and asks for the same arrays
hundreds of times: thousands of page faults a training step, against about 100 when the
memory is kept (``benchmarks/training.py`` measures both).

It changes the whole process, so it belongs to a command, not to the library.
"""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD = -1  # malloc.h
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3
_MOST = 2**31 - 1  # mallopt takes an int


def keep_freed_memory() -> bool:
    """Ask glibc to keep what is freed; False where there is no glibc, and nothing has
    changed.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # the pad is the whole heap of a worker thread: without it the threads gain nothing
    wanted = {_M_MMAP_THRESHOLD: _MOST, _M_TRIM_THRESHOLD: _MOST, _M_TOP_PAD: 64 << 20}
    return all(mallopt(option, value) == 1 for option, value in wanted.items())
