"""A checkpoint quantised in this process: seconds by stage, and the most memory that it
ever held.
"""

from __future__ import annotations

import importlib
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import Channel

from refllm.formats.uniform import Scheme
from refllm.jobs import quantize
from refllm.quant import awq_model, layer_inputs, layer_io, methods
from refllm.quant.hessian import Hessian

# the modules; the room exports functions of these names
gptq = importlib.import_module("refllm.quant.gptq")
rtn = importlib.import_module("refllm.quant.rtn")

# what belongs to which stage; whatever is called inside another stage counts there and not
# here
STAGES = {
    "reading": [
        (layer_io.CheckpointSource, "layer"),
        (layer_io.CheckpointSource, "rows"),
    ],
    "calibration forward": [(layer_inputs.LayerRun, "_advance"), (layer_inputs.LayerRun, "_input")],
    "Hessian": [(Hessian, "add")],
    "factor": [(gptq, "factor")],
    "rounding": [(gptq, "gptq"), (rtn, "rtn"), (awq_model, "rtn")],
    "errors of the report": [(methods, "tensor_report")],
    "layer files": [(layer_io.LayerFiles, "put")],
    "writing": [(quantize, "assemble")],
}


class Stages:
    """Exclusive seconds of each stage."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self.open = [0.0]

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            self.open.append(0.0)
            try:
                return function(*arguments, **named)
            finally:
                whole = time.perf_counter() - began
                self.seconds[stage] += whole - self.open.pop()
                self.open[-1] += whole

        return run


def main() -> None:
    channel = Channel()
    stages = Stages()
    for stage, places in STAGES.items():
        for owner, name in places:
            setattr(owner, name, stages.timed(stage, getattr(owner, name)))
    channel.send(engine="refllm")
    request = channel.receive()
    assert request is not None
    source = Path(request["source"])
    output = Path(request["output"])
    began = time.perf_counter()
    computing = time.process_time()
    scheme = Scheme(4, "half_integer", "group", request["group"])
    job = quantize.prepare(
        source,
        output,
        request["method"],
        scheme,
        length=request["length"],
        samples=request["samples"],
    )
    record = quantize.run(job, measure=None)
    whole = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    cpu = time.process_time() - computing
    rest = whole - sum(stages.seconds.values())
    channel.send(
        seconds=whole,
        cpu=cpu,
        stages=stages.seconds | {"rest": rest},
        peak_bytes=peak,
        bits_per_weight=record["bits per weight"],
        bytes=record["bytes"],
    )


if __name__ == "__main__":
    main()
