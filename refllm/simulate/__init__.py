"""How would this server behave on that traffic? The real scheduler and its memory, with a
clock in place of the network.

| file          | read it for                                                      |
|---------------|------------------------------------------------------------------|
| ``simulator`` | the loop: arrivals, plans, time; jumps over steady steps (first) |
| ``clock``     | how long a step takes                                            |
| ``totals``    | what the steps add up to                                         |
| ``workload``  | lengths and arrivals of measured traffic                         |
| ``programs``  | requests that share prefixes                                     |
| ``metrics``   | TTFT, TPOT, ITL, goodput, capacity                               |
| ``timeline``  | a run as values to draw                                          |
"""

from refllm.simulate.clock import Clock, UnitClock
from refllm.simulate.metrics import Limits, Recorder, Summary, Timeline, attainment, capacity
from refllm.simulate.programs import Program, best_hit_rate
from refllm.simulate.simulator import Simulator
from refllm.simulate.timeline import Trace
from refllm.simulate.totals import ExecutedStep, SimulationResult, StepTotals
from refllm.simulate.workload import TRAFFIC, LogNormal, Traffic, arrivals, requests

__all__ = [
    "TRAFFIC",
    "Clock",
    "ExecutedStep",
    "Limits",
    "LogNormal",
    "Program",
    "Recorder",
    "SimulationResult",
    "Simulator",
    "StepTotals",
    "Summary",
    "Timeline",
    "Trace",
    "Traffic",
    "UnitClock",
    "arrivals",
    "attainment",
    "best_hit_rate",
    "capacity",
    "requests",
]
