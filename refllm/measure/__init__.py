"""How good, how large and how fast: what is measured, counted or projected of a model?

Read first: ``perplexity``. In reading order:

windows         which token is predicted from which context
perplexity      loss, perplexity and bits per byte of a text
protocol        the text and windows of a figure, and whether a model has seen the text
bootstrap       confidence intervals for means over tokens
comparison      KL divergence and top-1 agreement with a reference model
sampled_loss    bits per byte from a random sample of windows
memory          bytes of weights and KV cache, counted, and what fits
roofline        operations and bytes of a step, and the time that a device needs at least
device          peaks of named devices, and of this machine, measured
roofline_clock  the roofline's time as the clock of simulated serving
latency         TTFT, ITL and TPOT of one streamed answer
step_time       seconds of one step, measured
records         values with their provenance: the JSON files behind figures and tables
plotting        the style that all figures share

The names below are resolved when they are first used: ``refllm quantize`` loads
``perplexity`` and ``windows`` alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from refllm.measure.bootstrap import Interval, bootstrap_intervals
    from refllm.measure.comparison import (
        Comparison,
        PrecomputedReference,
        compare,
        kl_divergence,
        precompute_reference,
    )
    from refllm.measure.device import DEVICES, DeviceSpec, measure_machine
    from refllm.measure.latency import Stopwatch
    from refllm.measure.memory import kv_bytes, max_sequences, max_tokens, weight_bytes
    from refllm.measure.perplexity import Score, bits_by_position, evaluate
    from refllm.measure.records import Record
    from refllm.measure.roofline import Cost, mbu, mfu, projected_seconds, step_cost
    from refllm.measure.roofline_clock import RooflineClock
    from refllm.measure.sampled_loss import SampledLoss, sample_bits_per_byte
    from refllm.measure.step_time import time_step

__all__ = [
    "DEVICES",
    "Comparison",
    "Cost",
    "DeviceSpec",
    "Interval",
    "PrecomputedReference",
    "Record",
    "RooflineClock",
    "SampledLoss",
    "Score",
    "Stopwatch",
    "bits_by_position",
    "bootstrap_intervals",
    "compare",
    "evaluate",
    "kl_divergence",
    "kv_bytes",
    "max_sequences",
    "max_tokens",
    "mbu",
    "measure_machine",
    "mfu",
    "precompute_reference",
    "projected_seconds",
    "sample_bits_per_byte",
    "step_cost",
    "time_step",
    "weight_bytes",
]

_FILES = {
    "bootstrap": ["Interval", "bootstrap_intervals"],
    "comparison": [
        "Comparison",
        "PrecomputedReference",
        "compare",
        "kl_divergence",
        "precompute_reference",
    ],
    "device": ["DEVICES", "DeviceSpec", "measure_machine"],
    "latency": ["Stopwatch"],
    "memory": ["kv_bytes", "max_sequences", "max_tokens", "weight_bytes"],
    "perplexity": ["Score", "bits_by_position", "evaluate"],
    "records": ["Record"],
    "roofline": ["Cost", "mbu", "mfu", "projected_seconds", "step_cost"],
    "roofline_clock": ["RooflineClock"],
    "sampled_loss": ["SampledLoss", "sample_bits_per_byte"],
    "step_time": ["time_step"],
}


def __getattr__(name: str) -> object:
    """Resolve a public name when it is first used."""
    for file, names in _FILES.items():
        if name in names:
            return getattr(import_module(f"refllm.measure.{file}"), name)
    raise AttributeError(f"module 'refllm.measure' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, so that they can be completed before they are resolved."""
    return sorted(__all__)
