"""GPTQ of one weight by refllm."""

from __future__ import annotations

import time

from common import Channel

from engines.gptq import Task, draw
from refllm.formats.uniform import Scheme
from refllm.quant.gptq import gptq


def main() -> None:
    channel = Channel()
    known = {}
    channel.send(engine="refllm")
    while (request := channel.receive()) is not None:
        task = Task(**request)
        if task not in known:
            known = {task: draw(task)}
        weight, h = known[task]
        began = time.perf_counter()
        computing = time.process_time()
        made = gptq(weight, h, Scheme(task.bits, "half_integer_unsigned", "group", task.group))
        channel.send(
            seconds=time.perf_counter() - began, cpu=time.process_time() - computing, loss=made.loss
        )


if __name__ == "__main__":
    main()
