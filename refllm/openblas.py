"""Which kernels OpenBLAS uses, where NumPy's own choice is not the fastest: set before NumPy is
imported.

OpenBLAS has kernels for many processors and chooses by the processor's model. On AMD processors
with AVX-512 some versions, and any version that does not know the model, take those for AVX2
(``Haswell``). The kernels for AVX-512 (``SkylakeX``) multiply a few rows without copying the
weight: on an AMD EPYC (Zen 4) a step of SmolLM2 takes 0.9 times as long for one token and 0.5
times for eight (``benchmarks/real.py`` records both families).

``OPENBLAS_CORETYPE`` is read when NumPy is imported, so only the command line sets it
(``refllm/__main__.py``), never the library; a value that the user has set stays. Versions that
take these kernels by themselves, or were built without them, are not changed by it.

Left out: Intel (OpenBLAS chooses right there), Arm, other libraries than OpenBLAS.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping
from pathlib import Path

VARIABLE = "OPENBLAS_CORETYPE"
AVX512_KERNELS = "SkylakeX"
# what these kernels use, by Linux's names
AVX512_FLAGS = frozenset({"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"})
CPUINFO = Path("/proc/cpuinfo")


def prefer_fast_kernels(environ: MutableMapping[str, str] = os.environ) -> None:
    """Ask OpenBLAS for the kernels of ``fast_kernels``, unless the user has asked for others
    or NumPy is loaded already.
    """
    if "numpy" in sys.modules or environ.get(VARIABLE):
        return
    kernels = fast_kernels(read_cpuinfo())
    if kernels is not None:
        environ[VARIABLE] = kernels


def fast_kernels(cpuinfo: str) -> str | None:
    """The kernels to ask for on the processor that Linux's ``/proc/cpuinfo`` describes; None
    where OpenBLAS's own choice stays.

    >>> fast_kernels("vendor_id : GenuineIntel\\nflags : avx2 avx512f") is None
    True
    """
    return AVX512_KERNELS if _is_amd_with_avx512(_facts(cpuinfo)) else None


def is_zen4(cpuinfo: str) -> bool:
    """Whether Linux's ``/proc/cpuinfo`` describes an AMD processor of the generation Zen 4."""
    facts = _facts(cpuinfo)
    return facts.get("cpu family") == "25" and _is_amd_with_avx512(facts)


def _facts(cpuinfo: str) -> dict[str, str]:
    """The names and values of the first processor."""
    facts: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        facts.setdefault(name.strip(), value.strip())
    return facts


def _is_amd_with_avx512(facts: dict[str, str]) -> bool:
    flags = facts.get("flags", "").split()
    return facts.get("vendor_id") == "AuthenticAMD" and AVX512_FLAGS.issubset(flags)


def read_cpuinfo() -> str:
    """``/proc/cpuinfo``, empty where there is none."""
    try:
        return CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
