"""Which other family of OpenBLAS kernels this processor can run.

    python -m tests.kernel_families

OpenBLAS chooses its kernels by the processor, and two families round the same product
differently. A test that asserts equality of floating-point results may hold under one and fail
under the other, so CI runs those tests, and the notebooks, under both. The variable
``OPENBLAS_CORETYPE`` overrides the choice, as long as the processor has the instructions.

Prints the value of the variable that selects another family than the present one, or nothing
where there is none: another BLAS than OpenBLAS, or a processor with one family.
"""

from __future__ import annotations

import os
import subprocess
import sys

CANDIDATES = ("SkylakeX", "Haswell", "NEOVERSEN1", "ARMV8")
QUESTION = """
import numpy, threadpoolctl
print(*(p.get("architecture") for p in threadpoolctl.threadpool_info() if p["user_api"] == "blas"))
"""


def family(core_type: str | None = None) -> str:
    """The kernels that a new process uses under ``OPENBLAS_CORETYPE`` = ``core_type``."""
    environment = dict(os.environ)
    if core_type is not None:
        environment["OPENBLAS_CORETYPE"] = core_type
    command = [sys.executable, "-c", QUESTION]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.stdout.strip()  # nothing if the process died of an instruction it does not have


def another() -> str | None:
    """A value of ``OPENBLAS_CORETYPE`` that selects another family; None if there is none."""
    present = family()
    for candidate in CANDIDATES:
        if family(candidate) not in ("", present):
            return candidate
    return None


if __name__ == "__main__":
    print(another() or "")
