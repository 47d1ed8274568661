"""The processor's name, from Linux's own description and without it."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from refllm.measure.device import processor, processor_details

CPUINFO = """processor\t: 0
cpu family\t: 6
model\t\t: 143
model name\t: Some CPU: 2 GHz
flags\t\t: fpu avx2 avx512f

"""


@pytest.fixture
def described(monkeypatch):
    def by(text: str | None) -> None:
        def read(path: Path, *args: object, **kwargs: object) -> str:
            if text is None:
                raise FileNotFoundError(path)
            return text

        monkeypatch.setattr(Path, "read_text", read)
        monkeypatch.setattr(platform, "processor", lambda: "")
        monkeypatch.setattr(platform, "machine", lambda: "riscv64")

    return by


@pytest.mark.parametrize(
    ("text", "name", "details"),
    [
        (CPUINFO, "Some CPU: 2 GHz", "Some CPU: 2 GHz, family/model 6/143 avx512f"),
        (CPUINFO.replace("avx512f", "amx_tile avx512f"), "Some CPU: 2 GHz", "6/143 amx_tile"),
        (CPUINFO.replace("avx512f", ""), "Some CPU: 2 GHz", "6/143 avx2"),
        ("processor\t: 0\n", "riscv64", "riscv64, family/model ?/?"),
        ("", "riscv64", "riscv64"),
        (None, "riscv64", "riscv64"),
    ],
)
def test_the_name_and_what_virtual_machines_hide(described, text, name, details):
    described(text)
    assert processor() == name
    assert processor_details().endswith(details)
