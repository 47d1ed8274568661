"""The data of the roofline figures: parts sum to the projected time, points stand where their
intensity is.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refllm.experiments.roofline import decode_cost_data, plot_roofline, roofline_data
from refllm.measure.device import DEVICES, DeviceSpec
from refllm.measure.memory import LLAMA_8B
from refllm.measure.roofline import projected_seconds, step_cost

batches = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4)


@given(
    batches.filter(lambda b: any(new for _, new in b)), st.floats(1e12, 1e16), st.floats(0, 1e-3)
)
def test_parts_of_a_step_sum_to_its_projected_time(batch, flops, overhead):
    device = DeviceSpec("a device", flops, 4.8e12, overhead)
    cost = step_cost(LLAMA_8B, batch)
    (row,) = decode_cost_data("a step", device, {"the step": cost})["rows"]
    assert sum(row["parts"].values()) == pytest.approx(1e3 * projected_seconds(cost, device))
    assert min(row["parts"].values()) > 0


def test_a_roofline_needs_a_device_and_steps_that_do_something():
    for devices, batch in (([], [(0, 1)]), ([DEVICES["h200"]], [])):
        with pytest.raises(ValueError, match="roofline: needs"):
            roofline_data(devices, {"a step": step_cost(LLAMA_8B, batch)})


def test_the_figure_has_the_devices_and_the_points():
    points = {
        "decode": step_cost(LLAMA_8B, [(100, 1)]),
        "prefill": step_cost(LLAMA_8B, [(0, 1000)]),
    }
    figure = plot_roofline(list(DEVICES.values()), points)
    texts = {t.get_text() for t in figure.axes[0].texts}
    assert texts == set(points)
    data = roofline_data(list(DEVICES.values()), points)
    assert [p["intensity"] for p in data["points"]] == [c.intensity for c in points.values()]
