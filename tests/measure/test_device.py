"""The measurement of this machine: its arithmetic by a fake clock, its labels by their
words.
"""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import pytest

import refllm
from refllm.measure import device as device_module
from refllm.measure.device import (
    DEVICES,
    DeviceSpec,
    measure_machine,
    one_thread,
    processor,
    processor_details,
    versions,
)


def test_this_machine_is_measured_and_described(monkeypatch):
    monkeypatch.setattr(device_module, "processor", lambda: "Some CPU")
    device = measure_machine(1, size=64, megabytes=1, repeats=3)
    assert device.name == "Some CPU, float32, 1 thread"
    assert device.overhead == 0
    opening = f"sgemm 64³ and dot of 1 MB, medians of 3; NumPy {np.__version__}, "
    assert device.source.startswith(opening)
    assert device.source.endswith(", 1 threads")
    # of what the host can do, not more than 64 cores of 100 GFLOP/s and 1 TB/s of a cache each
    assert 1e6 < device.peak_flops < 64e11
    assert 1e6 < device.peak_bandwidth < 64e12
    # as many threads as asked for, whatever the library was set to
    two = measure_machine(2, size=8, megabytes=1)
    assert two.name == "Some CPU, float32, 2 threads"
    assert two.source.endswith(", 2 threads")
    # a clock that gives 2 s a call: the rate is 2·64³ / 2 s, and the measurement stops at
    # once
    ticks = iter(2.0 * i for i in range(100))
    monkeypatch.setattr(device_module.time, "perf_counter", lambda: next(ticks))
    slow = measure_machine(1, size=64, megabytes=1)
    assert slow.peak_flops == 2 * 64**3 / 2
    assert slow.peak_bandwidth == 1e6 / 2
    assert next(ticks) == 8.0  # one timed call each


def test_a_quiet_machine_gives_as_many_repeats_as_asked_for_and_their_median(monkeypatch):
    seconds = iter([0.1, 0.5, 0.2, 0.1, 0.1, 0.3])
    now = [0.0]

    def clock():
        clock.calls += 1
        if clock.calls % 2 == 0:  # every second reading ends a timed call
            now[0] += next(seconds)
        return now[0]

    clock.calls = 0
    monkeypatch.setattr(device_module.time, "perf_counter", clock)
    device = measure_machine(1, size=10, megabytes=1, repeats=3)
    assert abs(device.peak_flops - 2e3 / 0.2) < 1e-6
    assert abs(device.peak_bandwidth - 1e6 / 0.1) < 1e-3


@pytest.mark.parametrize(
    ("key", "flops", "bandwidth", "ridge"),
    [("h200", 1979e12 / 2, 4.8e12, 206), ("a100", 312e12, 2.039e12, 153)],
)
def test_named_devices_have_the_peaks_of_their_data_sheets(key, flops, bandwidth, ridge):
    """The H200's sheet prints the rate of sparse products, twice the dense one's."""
    device = DEVICES[key]
    assert device.peak_flops == pytest.approx(flops, rel=1e-3)
    assert device.peak_bandwidth == bandwidth
    assert device.overhead == 0
    assert device.ridge == pytest.approx(ridge, abs=0.5)
    assert device.name.split()[0].lower() == key
    assert f"NVIDIA {key.upper()} data sheet" in device.source


@pytest.mark.parametrize(
    "numbers",
    [
        (0, 1),
        (1, 0),
        (-1, 1),
        (1, float("nan")),
        (float("inf"), 1),
        (1, 1, -1),
        (1, 1, float("inf")),
        (1, float("inf")),
    ],
)
def test_a_device_without_speed_is_rejected(numbers):
    with pytest.raises(ValueError, match="a device needs finite peaks"):
        DeviceSpec("broken", *numbers)


# --- the name of the processor -----------------------------------------------------------

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


def test_without_linux_the_system_s_own_name_of_the_processor(described, monkeypatch):
    described(None)
    monkeypatch.setattr(platform, "processor", lambda: "arm")
    assert processor() == processor_details() == "arm"


def test_a_measurement_states_processor_threads_and_versions(described):
    described(CPUINFO)
    python = platform.python_version()
    numpy = np.__version__
    assert one_thread() == f"Some CPU: 2 GHz, one thread, NumPy {numpy}, Python {python}"
    assert versions() == {"refllm": refllm.__version__, "python": python, "numpy": numpy}
