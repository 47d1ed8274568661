"""Static batching: a padded batch runs until its longest member has ended; only then the
next one is formed.

Source: request-level scheduling as Yu et al. 2022 (Orca), section 3, describe the servers
before it; the padded batches that Kwon et al. 2023 compare with, as vLLM's benchmark of
Hugging Face's generation forms them.

| columns of the rectangle       | hold                                                                             |
|--------------------------------|----------------------------------------------------------------------------------|
| [0, longest prompt)            | prompts, padded on the left: ``pad`` positions of a row are computed and masked  |
| from there to the longest end  | outputs; a row that has ended is computed all the same, as one of the ``padding_rows`` |

Requests are taken in the order in which they came until the next one would not fit into
``memory.PaddedKVManager``. The same interface as ``serve.scheduler``: whoever executes plans, or
puts a clock to them, sees no difference.

Left out: sorting requests by length, with which a batch is padded less and requests wait
longer.
"""

from __future__ import annotations

from refllm.serve.admission import FirstCome
from refllm.serve.base_scheduler import BaseScheduler
from refllm.serve.baselines.reservations import PaddedKVManager
from refllm.serve.plan import PaddingRow, Plan
from refllm.serve.request import Status


class StaticBatching(BaseScheduler):
    """Padded batches over a ``PaddedKVManager``, at most ``max_sequences`` rows each."""

    memory: PaddedKVManager

    def __init__(self, memory: PaddedKVManager, *, max_sequences: int | None = None):
        super().__init__(memory, FirstCome(), None, max_sequences)

    def plan(self) -> Plan:
        step = self._begin()
        if not self.running:
            while self.waiting and (
                self.max_sequences is None or len(self.running) < self.max_sequences
            ):
                sequence = self.waiting[0]
                if not self.memory.admit(sequence, len(sequence.tokens), alone=not self.running):
                    break
                self.waiting.remove(sequence)
                self.running.append(sequence)
                sequence.status = Status.RUNNING
                self.queried += len(sequence.tokens)
                step.plan.admitted.append(sequence.key)
        # the rectangle has its final width by now, and the rows their places
        for sequence in self.running:
            count = len(sequence.tokens) - sequence.computed
            step.put(sequence, count, self.memory.blocks(sequence), [], self.memory.pad(sequence))
        if self.running:
            first = self.running[0]
            past = self.memory.pad(first) + first.computed  # all outputs stand in one column
            step.plan.padding_rows = [PaddingRow(past, 1, slot) for slot in self.memory.ended()]
        return self._finish(step)
