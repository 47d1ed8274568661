"""Which kernels are asked for, on which processor, and that NumPy then has them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from conftest import ROOT
from refllm import openblas
from refllm.openblas import AVX512_FLAGS, fast_kernels, is_zen4, prefer_fast_kernels

ZEN4 = "fpu sse2 avx2 fma " + " ".join(sorted(AVX512_FLAGS))


def cpuinfo(vendor: str, flags: str) -> str:
    """Two processors, as Linux describes them."""
    one = f"processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: X: Y\nflags\t\t: {flags}\n\n"
    return one + one.replace(": 0", ": 1")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (cpuinfo("AuthenticAMD", ZEN4), "SkylakeX"),
        (cpuinfo("AuthenticAMD", "fpu sse2 avx2 fma"), None),
        (cpuinfo("GenuineIntel", ZEN4), None),  # OpenBLAS chooses right by itself
        (cpuinfo("AuthenticAMD", ZEN4) + cpuinfo("GenuineIntel", ""), "SkylakeX"),  # the first
        ("Processor : ARMv8\nFeatures : asimd\n", None),
        ("", None),
    ],
)
def test_amd_with_avx512_gets_the_kernels_for_it(text, expected):
    assert fast_kernels(text) == expected


@pytest.mark.parametrize("flag", sorted(AVX512_FLAGS))
def test_every_instruction_that_the_kernels_use_is_required(flag):
    assert fast_kernels(cpuinfo("AuthenticAMD", ZEN4.replace(flag, ""))) is None


@pytest.mark.parametrize(
    ("vendor", "number", "flags", "expected"),
    [
        ("AuthenticAMD", 25, ZEN4, True),
        ("AuthenticAMD", 25, "avx2", False),  # Zen 3
        ("AuthenticAMD", 26, ZEN4, False),  # Zen 5
        ("GenuineIntel", 25, ZEN4, False),
    ],
)
def test_zen4_is_known_by_vendor_family_and_instructions(vendor, number, flags, expected):
    text = cpuinfo(vendor, flags).replace("model name", f"cpu family\t: {number}\nmodel name")
    assert is_zen4(text) == expected


@pytest.fixture
def before_numpy(monkeypatch, tmp_path):
    """An AMD processor with AVX-512, and a process that has not imported NumPy."""
    (tmp_path / "cpuinfo").write_text(cpuinfo("AuthenticAMD", ZEN4))
    monkeypatch.setattr(openblas, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.delitem(sys.modules, "numpy")
    return tmp_path / "cpuinfo"


def test_what_the_user_has_set_stays(before_numpy):
    environ = {"OPENBLAS_CORETYPE": "Haswell"}
    prefer_fast_kernels(environ)
    assert environ == {"OPENBLAS_CORETYPE": "Haswell"}
    environ = {"OPENBLAS_CORETYPE": ""}  # nothing, as OpenBLAS reads it
    prefer_fast_kernels(environ)
    assert environ == {"OPENBLAS_CORETYPE": "SkylakeX"}


def test_without_a_description_of_the_processor_nothing_is_set(before_numpy):
    before_numpy.unlink()
    environ = {}
    prefer_fast_kernels(environ)
    assert environ == {}


def test_nothing_is_set_once_numpy_is_loaded(before_numpy, monkeypatch):
    monkeypatch.setitem(sys.modules, "numpy", object())
    environ = {}
    prefer_fast_kernels(environ)
    assert environ == {}


def test_the_command_line_chooses_before_numpy_is_imported():
    """The order of imports, in a process of its own: at the choice there is no NumPy, and the
    commands run after it.
    """
    code = """
import sys
import refllm.openblas as openblas
openblas.prefer_fast_kernels = lambda: print("numpy" in sys.modules)
sys.argv = ["refllm", "--version"]
from refllm.__main__ import main
main()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    first, second = done.stdout.splitlines()
    assert first == "False"
    assert second.startswith("refllm ")
