"""How many threads a command computes with, and on which kernels.

BLAS would take one thread per core. On a machine whose cores are busy that is 2 to 10 times
slower than one thread: at the end of every product the threads wait for the one that another
process keeps from its core. A command takes the cores that are free when it starts:

    cores this process may use (affinity, container quota), at most ``MOST``
    minus the processes that run or wait to run, by the load average or at this moment

and at least one. One thread too few costs a decode step little, since it waits for memory
rather than for the processor; one too many can make it several times slower.

``--threads`` overrides that, and so does a variable such as ``OPENBLAS_NUM_THREADS``.

Left out: changing the number while a command runs; the threads of ``refllm train`` and the
processes of ``refllm convert``, which are workers with their own share of the work.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from threadpoolctl import threadpool_info, threadpool_limits

from refllm import openblas
from refllm.cli.options import opt

ThreadsOption = Annotated[
    int | None,
    opt("Threads to compute with.", "--threads", min=1, show_default="the cores that are free"),
]

MOST = 8  # by default: few threads saturate the memory that a decode step waits for
VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")
LOADAVG = Path("/proc/loadavg")
CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # cgroup v2: microseconds per period, or "max"
CFS = Path("/sys/fs/cgroup/cpu")  # cgroup v1


def use_threads(requested: int | None) -> str:
    """Let BLAS compute with ``requested`` threads until the command ends, by ``own_threads``
    (None: as many as are free, or what the user's environment says); returns "2 threads" for
    the summary line.
    """
    count = requested
    if count is None and not any(os.environ.get(name) for name in VARIABLES):
        count = free_cores()
    if count is not None:
        threadpool_limits(limits=count, user_api="blas")
    return "1 thread" if blas_threads() == 1 else f"{blas_threads()} threads"


@contextlib.contextmanager
def own_threads() -> Iterator[None]:
    """A command's process: at the end BLAS has the threads that it had before."""
    with threadpool_limits(limits=None, user_api="blas"):
        yield


def free_cores() -> int:
    """The cores that this process may use and no other process keeps busy, 1 to ``MOST``."""
    free = math.floor((os.cpu_count() or 1) - busy_processes() + 0.5)
    return max(1, min(free, usable_cores(), MOST))


def usable_cores() -> int:
    """The cores that affinity and the container's quota leave to this process, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, math.floor(min(cores, container_quota())))


def container_quota() -> float:
    """The cores' worth of time that the control group allows; infinite without a limit."""
    with contextlib.suppress(OSError, ValueError):
        quota, period = CPU_MAX.read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    with contextlib.suppress(OSError, ValueError):
        quota = (CFS / "cpu.cfs_quota_us").read_text()
        period = (CFS / "cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    return math.inf


def busy_processes() -> float:
    """The other processes that run or wait for a core: on average over the last minute, or
    at this moment, whichever is more.
    """
    average = now = 0.0
    with contextlib.suppress(OSError, AttributeError):  # Windows has no load average
        average = os.getloadavg()[0]
    with contextlib.suppress(OSError, ValueError, IndexError):
        # "0.20 0.18 0.12 1/80 11206": 1 of 80 runs, which is this process
        now = int(LOADAVG.read_text().split()[3].partition("/")[0]) - 1
    return max(average, now)


def blas_threads() -> int:
    """The threads that BLAS computes with at present."""
    return max(
        (pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"),
        default=1,
    )


def describe_blas() -> str:
    """The BLAS library, its kernels and who chose them, in one line."""
    named = os.environ.get(openblas.VARIABLE)
    chosen = f"{openblas.VARIABLE}={named}" if named else "its own choice"
    pools = [
        f"{pool['internal_api']} {pool['version']}, {pool.get('architecture', 'unknown')} kernels"
        for pool in threadpool_info()
        if pool["user_api"] == "blas"
    ]
    return f"{'; '.join(pools) or 'no BLAS library'} ({chosen})"
