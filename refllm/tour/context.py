"""What the stops of the tour share: the model, the console, the folder for figures."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from refllm.api import Model, load
from refllm.measure.device import DeviceSpec, measure_machine
from refllm.measure.records import Record, Values
from refllm.measure.records import write as write_record

if TYPE_CHECKING:
    from rich.console import Console


@dataclass
class Tour:
    """The state of one tour; ``figures`` lists the pictures that its stops drew."""

    name: str
    backend: str
    output: Path
    out: Console
    figures: list[Path] = field(default_factory=list)

    @cached_property
    def model(self) -> Model:
        """The model, loaded at the first stop that needs it."""
        return load(self.name, self.backend)

    @cached_property
    def machine(self) -> DeviceSpec:
        """The measured limits of one core: the stops run on one BLAS thread, since on a busy
        machine two would wait for each other.
        """
        return measure_machine(threads=1)

    def say(self, text: str = "") -> None:
        """Print a paragraph."""
        self.out.print(text)

    def draw(self, name: str, values: Values, kind: str, hardware: str) -> None:
        """Record the values in ``output/data`` and draw the registered figure ``name``."""
        from refllm.figures import registry  # matplotlib takes a second to import

        record = Record(f"refllm tour --model {self.name}", kind, hardware, values)
        write_record(self.output / "data" / f"{name}.json", record)
        self.figures += registry.redraw([name], self.output)
