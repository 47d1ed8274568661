"""The allocator's setting, in a process of its own: it lasts as long as the process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from conftest import ROOT

PROGRAM = """
import resource, sys
import numpy as np
from refllm.cli.main import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
for _ in range(3):
    np.ones(1 << 23)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    np.ones(1 << 23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(setting: str) -> int:
    command = [sys.executable, "-c", PROGRAM, setting]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_memory_that_is_freed_serves_the_next_array_without_a_page_fault():
    kept = page_faults("keep")
    assert kept < 20
    # 64 MiB arrays: above glibc's own highest threshold, 32 MiB
    assert kept < page_faults("default")
