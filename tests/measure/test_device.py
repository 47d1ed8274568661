"""The measurement of this machine: its arithmetic by a fake clock, its labels by their
words.
"""

from __future__ import annotations

import pytest

from refllm.measure import device as device_module
from refllm.measure.device import DEVICES, DeviceSpec, measure_machine


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
