"""``refllm figures``: draw, and check what is drawn."""

from __future__ import annotations

import json

from command_line import run
from conftest import ROOT


def test_figures_are_drawn_and_checked():
    result = run("figures", "--check", "--output", ROOT / "figures")
    assert result.exit_code in (0, 1)
    assert (result.exit_code == 0) == (result.stdout == "")


def test_a_figure_is_drawn_from_its_data(tmp_path):
    record = {
        "command": "x",
        "kind": "A",
        "hardware": "none",
        "values": {
            "devices": [{"name": "d", "peak_flops": 1e12, "peak_bandwidth": 1e11}],
            "points": [{"label": "p", "intensity": 2.0}],
        },
    }
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "roofline.json").write_text(json.dumps(record))
    result = run("figures", "--output", tmp_path)
    assert result.stdout == f"{tmp_path / 'roofline.png'}\n"
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")
    stale = run("figures", "--check", "--output", tmp_path)
    assert stale.exit_code == 1
    assert "roofline.png" not in stale.stdout  # the others have no data here
