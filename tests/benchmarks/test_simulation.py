"""The benchmark of the simulator runs, and its record keeps to the schema. Nothing here
looks at a speed.
"""

from __future__ import annotations

import json
import subprocess
import sys

from test_benchmarks import BENCHMARKS, check_record


def test_the_simulator_is_timed_with_and_without_jumps(tmp_path):
    output = tmp_path / "simulation.json"
    command = [
        sys.executable,
        str(BENCHMARKS / "simulation.py"),
        "--requests",
        "20",
        "--rounds",
        "1",
        "--output",
        output,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    record = json.loads(output.read_text())
    check_record(record, "simulation")
    assert len(record["results"]) == 3
    assert all(
        set(row["token_steps_per_second"]) == {"wall", "processor"} for row in record["results"]
    )
    assert "target 200,000 token-steps a second" in done.stdout
