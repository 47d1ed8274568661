"""The measurement of this machine: its arithmetic by a fake clock, its labels by their
words.
"""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from refllm.measure import device as device_module
from refllm.measure.device import DEVICES, DeviceSpec, measure_machine, processor, processor_details


def test_this_machine_is_measured_and_described(monkeypatch):
    device = measure_machine(1, size=64, megabytes=1, repeats=3)
    assert device.peak_flops > 1e6
    assert device.peak_bandwidth > 1e6
    assert "1 thread" in device.name
    assert all(
        word in device.source
        for word in ("sgemm 64³", "1 MB", "medians of 3", "NumPy", "1 threads")
    )
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


def test_named_devices_say_where_their_peaks_come_from():
    assert all(
        "data sheet" in d.source and d.peak_flops > 1e14 and d.overhead == 0
        for d in DEVICES.values()
    )


@pytest.mark.parametrize(
    "numbers", [(0, 1), (1, 0), (-1, 1), (1, float("nan")), (float("inf"), 1), (1, 1, -1)]
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
