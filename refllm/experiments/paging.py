"""What paging buys, counted: mean batch and use of memory under full load, by how memory is
given out.

Source: Kwon et al. 2023, section 6 and figure 2: OPT-13B on a 40 GB card keeps 15,700
tokens; ShareGPT's lengths, at most 2,048 tokens; Orca's three variants as they are rebuilt
there, with a buddy allocator.

| policy     | memory of a request                                                    | batch in the paper |
|------------|------------------------------------------------------------------------|--------------------|
| Orca (Max) | 2,048 slots in one run                                                 | 7.00               |
| Orca (Pow2)| prompt + output rounded up to a power of two, at most 2,048, one run   | 9.81               |
| Oracle     | prompt + output in one run; buddies round it up, first fit does not    | 13.62              |
| paged      | blocks of 16, as they are needed; preemption by recompute              | 30.42              |

No model, no clock, no data set: lengths are drawn from a log-normal with ShareGPT's means
(``simulate.workload``), and the real scheduler runs as long as somebody waits. Kind A.

Left out: time. A larger batch takes longer a step: see ``experiments.batching`` for a
clock, ``experiments.unpadding`` for a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from refllm.kv.block_pool import BlockPool
from refllm.measure.records import Record, write
from refllm.serve.base_scheduler import Ledger
from refllm.serve.baselines.reservations import Rectangle, Reserved
from refllm.serve.baselines.static_batching import Static
from refllm.serve.kv_manager import Paged
from refllm.serve.request import Request
from refllm.serve.scheduler import Scheduler
from refllm.simulate.simulator import Run, Simulator, Ticks
from refllm.simulate.workload import ALPACA, SHAREGPT, requests

SLOTS = 15_700
LONGEST = 2048
PAPER = {"Orca (Max)": 7.00, "Orca (Pow2)": 9.81, "Orca (Oracle)": 13.62, "paged": 30.42}
BLOCKS = (1, 16, 32, 64, 128, 256)


class Capped(Reserved):
    """A reservation never exceeds the longest sequence that is allowed at all."""

    def size(self, request: Request) -> int:
        return max(
            len(request.prompt) + request.max_tokens, min(self.longest, super().size(request))
        )


def scheduler(
    name: str,
    slots: int,
    *,
    longest: int = LONGEST,
    block: int = 16,
    seats: int | None = None,
    pool: BlockPool | None = None,
) -> Ledger:
    """A policy of the table over ``slots``, computing prompts whole; ``pool`` is an
    engine's own.
    """
    limits: dict[str, Any] = {"max_batch_tokens": None, "max_sequences": seats}
    if name == "paged":
        return Scheduler(Paged(pool or BlockPool(slots // block, block)), **limits)
    if name == "static":
        batch = max(1, slots // longest)
        return Static(Rectangle(slots, longest=longest), max_sequences=min(batch, seats or batch))
    rule = {"Orca (Max)": "max", "Orca (Pow2)": "pow2"}.get(name, "oracle")
    return Scheduler(
        Capped(slots, rule, longest=longest, buddy="first fit" not in name), chunked=False, **limits
    )


def serve(name: str, asked: Sequence[Request], **options: Any) -> Run:
    """Everybody at once, counted in steps."""
    return Simulator(scheduler(name, **{"slots": SLOTS, **options}), Ticks()).run(asked)


def load(seed: int, count: int) -> list[Request]:
    """ShareGPT's lengths."""
    return requests(SHAREGPT, count, np.random.default_rng(seed))


def policies_data(seeds: Sequence[int], count: int) -> list[dict[str, Any]]:
    """A row a policy: what it did under full load, a number for each seed."""
    rows = []
    for name in ("Orca (Max)", "Orca (Pow2)", "Orca (Oracle)", "Orca (Oracle), first fit", "paged"):
        runs = [serve(name, load(seed, count)) for seed in seeds]
        rows.append(
            {
                "policy": name,
                "paper": PAPER.get(name),
                "batch": [run.saturated.batch for run in runs],
                "utilisation": [run.saturated.utilisation for run in runs],
                "filled": [run.saturated.filled for run in runs],
                "steps": [run.all.steps for run in runs],
                "preemptions": [run.preemptions for run in runs],
            }
        )
    return rows


def static_data(seeds: Sequence[int], count: int) -> dict[str, Any]:
    """Padded batches of at most seven, as the baselines of the paper's blog ran: steps and
    useful slots.
    """
    runs = [serve("static", load(seed, count)) for seed in seeds]
    return {
        "steps": [run.all.steps for run in runs],
        "useful": [run.all.rows / (run.all.rows + run.all.ghosts) for run in runs],
    }


def blocks_data(seeds: Sequence[int], count: int) -> list[dict[str, Any]]:
    """Paged with blocks of each size."""
    rows = []
    for block in BLOCKS:
        runs = [serve("paged", load(seed, count), block=block) for seed in seeds]
        rows.append(
            {
                "block": block,
                "batch": [run.saturated.batch for run in runs],
                "utilisation": [run.saturated.utilisation for run in runs],
            }
        )
    return rows


def plenty_data(count: int, seats: int = 32) -> list[dict[str, Any]]:
    """Where paging buys nothing: memory for everybody who has a seat (Alpaca's short
    answers, ten times the slots).
    """
    asked = requests(ALPACA, count, np.random.default_rng(0))
    runs = {name: serve(name, asked, slots=10 * SLOTS, seats=seats) for name in PAPER}
    return [{"policy": name, "batch": run.saturated.batch} for name, run in runs.items()]


def paging_data(seeds: Sequence[int] = range(5), count: int = 1000) -> dict[str, Any]:
    """Values of the figure ``paging``."""
    return {
        "slots": SLOTS,
        "seeds": list(seeds),
        "requests": count,
        "policies": policies_data(seeds, count),
        "static": static_data(seeds[:2], count // 2),
        "blocks": blocks_data(seeds[:2], count),
        "plenty": plenty_data(count),
    }


def main(folder: str = "figures/data") -> None:
    """Write the data of the figure ``paging``: two minutes."""
    write(
        f"{folder}/paging.json",
        Record("python -m refllm.experiments.paging", "A", "none", paging_data()),
    )


if __name__ == "__main__":
    main()
