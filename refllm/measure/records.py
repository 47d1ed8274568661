"""Values with their provenance: the JSON files that figures and tables are made from.

A record says which command made it, on what hardware, and how its values came about, by one
letter each. A reader must never take one for another:

| letter | meaning                                       |
|--------|-----------------------------------------------|
| A      | counted, the same on every machine            |
| B      | measured, with hardware, threads and versions |
| C      | projected for a named device by the roofline  |

Left out: a database, units in the file (the figure that draws a record names them).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from refllm.array_types import JsonView
from refllm.atomic import write_atomic
from refllm.errors import InputError

Values = JsonView  # the values of a record: a figure reads them and does not change them

KINDS = {"A": "counted", "B": "measured", "C": "projected"}


@dataclass(frozen=True)
class Record:
    """The values of a figure or table, and where they come from."""

    command: str  # what to type to make them again
    # "A", "B", "C", or several where a figure shows a measurement beside a projection: "B, C"
    kind: str
    hardware: str  # "none" for counted values
    values: Values

    def __post_init__(self) -> None:
        unknown = [k for k in self.kind.split(", ") if k not in KINDS]
        if unknown:
            raise InputError(
                f"record: kind {self.kind!r} is not made of A (counted), B (measured), C "
                "(projected)"
            )
        for name in ("command", "hardware"):
            if not getattr(self, name).strip():
                raise InputError(f"record: {name} is empty; say where the values come from")

    def provenance(self) -> str:
        """One sentence for a caption.

        >>> Record("make x", "B, C", "EPYC, 1 thread", {}).provenance()
        'Measured (B) and projected (C). EPYC, 1 thread. Made by: make x'
        """
        kinds = " and ".join(f"{KINDS[k]} ({k})" for k in self.kind.split(", "))
        where = ""
        if self.hardware != "none":
            where = f" {self.hardware.rstrip('.')}."
        return f"{kinds[0].upper()}{kinds[1:]}.{where} Made by: {self.command}"


def write(path: str | Path, record: Record) -> None:
    """Write a record as JSON: the same record gives the same bytes.

    Raises
    ------
    ValueError
        for a value that is not finite: JSON cannot spell it, and a figure cannot place it.
    """
    _require_finite(record.values, "values")
    text = json.dumps(vars(record), indent=1, ensure_ascii=False, allow_nan=False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text + "\n")


def read(path: str | Path) -> Record:
    """Read a record; ValueError, which names the file, if it is none."""
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
        return Record(**raw)
    except (TypeError, ValueError, AttributeError) as error:  # JSON's errors are ValueErrors
        raise InputError(
            f"{path}: not a record of command, kind, hardware and values: {error}"
        ) from error


def _require_finite(value: object, place: str) -> None:
    """ValueError, which names the place, for a NaN or infinity anywhere inside ``value``."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _require_finite(inner, f"{place}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            _require_finite(inner, f"{place}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"record: {place} is {value}")
