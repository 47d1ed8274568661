"""refllm's training loop, as ``refllm.train.loop.train`` runs it: ``python -m
engines.train_refllm``.

The loop reports after every ``turn`` steps, and the report waits for the next request: so
the loop itself is what is measured, data, clipping, optimizer and all, with nothing of it
written a second time.
"""

from __future__ import annotations

import resource
import tempfile
import time
from pathlib import Path

from common import Channel

from engines.training import Task
from refllm.train.loop import train


def main() -> None:
    channel = Channel()
    channel.send()
    request = channel.receive()
    if request is None:
        return
    task = Task(**request)
    began = time.perf_counter()
    faults = page_faults()

    def report(record: dict[str, float]) -> None:
        nonlocal began, faults
        seconds = time.perf_counter() - began
        channel.send(
            rate=task.tokens_per_turn / seconds,
            loss=record["loss"],
            page_faults=page_faults() - faults,
        )
        if channel.receive() is None:
            raise SystemExit
        faults = page_faults()
        began = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        train(task.config(), [task.stream()], task.plan(), Path(folder), report=report)


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


if __name__ == "__main__":
    main()
