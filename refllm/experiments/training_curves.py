"""Figures of how models were trained, from the records in their own directories; nothing is
computed again.

| figure           | from                                     | shows                                          |
|------------------|------------------------------------------|------------------------------------------------|
| training_curve   | curve.json, and the plan in card.json    | loss by tokens read, where the phases end      |
| bits_by_position | ``by context`` in card.json              | what more context buys                         |

Left out: models without a record (somebody else's checkpoints have none).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from refllm.checkpoints.loading import BUNDLED, bundled
from refllm.checkpoints.tensor_files import read_json
from refllm.measure.records import Record, write


def has_record(directory: Path) -> bool:
    """Does the directory hold what the figures are drawn from?"""
    return (directory / "curve.json").is_file() and (directory / "card.json").is_file()


def curve_values(directories: Sequence[Path]) -> dict[str, Any]:
    """Values of the figure ``training_curve``; the phases marked are those of the first
    directory's last run.
    """
    runs = {
        d.resolve().name: json.loads((d / "curve.json").read_text("utf-8")) for d in directories
    }
    phases = [
        p
        for p in read_json(directories[0] / "card.json")["training"]["plan"]["phases"]
        if p["steps"]
    ]
    end = next(iter(runs.values()))[-1]["tokens"]
    marks: list[list[Any]] = []
    for phase in reversed(phases):
        marks.insert(0, [end, f"{phase['batch']} × {phase['length']} tokens"])
        end -= phase["steps"] * phase["batch"] * phase["length"]
    if end > 0:
        marks.insert(0, [end, "earlier runs"])
    return {"runs": runs, "phases": marks}


def position_values(directories: Sequence[Path]) -> dict[str, Any]:
    """Values of the figure ``bits_by_position``."""
    lines = {}
    for directory in directories:
        bins = read_json(directory / "card.json")["measured"]["by context"]
        lines[directory.resolve().name] = [
            [b["from"], b["to"], b["tokens"], b["nats per token"], b["bits per byte"]] for b in bins
        ]
    return {"lines": lines}


def hardware(directories: Sequence[Path]) -> str:
    """Where the numbers were made, as the cards tell it."""
    made = [read_json(d / "card.json")["made with"] for d in directories]
    return "; ".join(dict.fromkeys(f"CPU, Python {m['python']}, NumPy {m['numpy']}" for m in made))


def main(folder: str = "figures/data") -> None:
    """Write the data of both figures for the bundled models that have a record."""
    directories = [BUNDLED / name for name in bundled() if has_record(BUNDLED / name)]
    if not directories:
        raise FileNotFoundError(f"no model in {BUNDLED} has a record")
    command = "python -m refllm.experiments.training_curves"
    where = hardware(directories)
    write(f"{folder}/training_curve.json", Record(command, "B", where, curve_values(directories)))
    # no clock is in it: bits of given weights on given text
    write(
        f"{folder}/bits_by_position.json", Record(command, "A", where, position_values(directories))
    )


if __name__ == "__main__":
    main()
