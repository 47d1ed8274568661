"""How much memory this process may still take, asked before a model is loaded.

| system  | free                                                                           |
|---------|--------------------------------------------------------------------------------|
| Linux   | the least of MemAvailable (``/proc/meminfo``) and, for the process's control   |
|         | group and each group above it, limit − usage + file cache (versions 1 and 2)   |
| Windows | ullAvailPhys of GlobalMemoryStatusEx                                           |
| others  | all memory of the machine, which is an upper bound                             |
| CuPy    | free memory of the current device                                              |

File cache counts as free, since the kernel gives it up when memory is needed.

Sources: proc(5); the kernel's documentation of cgroup-v1 and cgroup-v2 memory controllers.

Left out: swap, ``ulimit -v``, NUMA nodes.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from refllm.backend import NUMPY, Namespace

__all__ = ["free_memory"]

ROOT = Path("/")
# Version → folder of the controller, files of limit and usage, the file cache's line in
# memory.stat. A version 1 group counts its children's pages in "total_…".
_CGROUPS = {
    2: ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    1: (
        "sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
}


def free_memory(xp: Namespace = NUMPY, root: Path = ROOT) -> int | None:
    """Bytes that can still be taken on the host, or on the device of ``xp``; None if the
    system does not say.
    """
    if xp is not NUMPY:
        return _device_memory()
    known = [_meminfo(root / "proc/meminfo"), *_cgroups(root)]
    found = [free for free in known if free is not None]
    if found:
        return max(0, min(found))
    return _portable()


def _device_memory() -> int | None:
    """Free bytes of the current CUDA device."""
    try:
        from cupy.cuda import runtime
    except ImportError:
        return None
    return int(runtime.memGetInfo()[0])


def _meminfo(file: Path) -> int | None:
    """MemAvailable in bytes."""
    for name, rest in _lines(file, ":"):
        if name == "MemAvailable":
            return 1024 * int(rest.split()[0])  # the file counts in KiB
    return None


def _cgroups(root: Path) -> Iterator[int]:
    """What is left of the limit of each control group that the process is in."""
    for _, rest in _lines(root / "proc/self/cgroup", ":"):
        controllers, _, path = rest.partition(":")
        if controllers == "":
            version = 2
        elif "memory" in controllers.split(","):
            version = 1
        else:
            continue
        top, limit_file, usage_file, cache_name = _CGROUPS[version]
        inside = PurePosixPath(path.lstrip("/"))
        for group in (inside, *inside.parents):
            # within a container the path may be that of the host, which is not mounted here
            folder = root / top / group
            limit = _number(folder / limit_file)
            usage = _number(folder / usage_file)
            if limit is None or usage is None:  # "max": no limit
                continue
            cache = dict(_lines(folder / "memory.stat", " ")).get(cache_name, "0")
            yield limit - usage + int(cache)


def _lines(file: Path, separator: str) -> Iterator[tuple[str, str]]:
    """The lines of a file, each cut at the first ``separator``; none if it cannot be read."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError:
        return
    for line in text.splitlines():
        name, _, rest = line.partition(separator)
        yield name, rest


def _number(file: Path) -> int | None:
    """The integer that a file holds; None if there is none."""
    try:
        text = file.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _portable() -> int | None:
    """Free memory as Windows says it, or all memory as other systems do."""
    if sys.platform == "win32":
        return _windows()
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of the Windows API."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        ("total", ctypes.c_uint64),
        ("available", ctypes.c_uint64),
        ("rest", ctypes.c_uint64 * 5),
    )


def _windows() -> int | None:
    """ullAvailPhys: physical memory that can be taken without writing pages to disk."""
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    library = getattr(ctypes, "windll", None)
    if library is None or not library.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        return None
    return int(status.available)
