"""Static batching: a padded batch runs until its longest member has finished; only then is
the next batch formed.

Sources: request-level scheduling as Yu et al. 2022 (Orca), section 3, describe it; the
padded batches that vLLM's benchmark of Hugging Face's generation forms (Kwon et al. 2023
compare with both).

| columns of the rectangle      | hold                                                          |
|-------------------------------|---------------------------------------------------------------|
| [0, longest prompt)           | prompts, padded on the left: ``pad`` positions are            |
|                               | computed and masked                                           |
| from there to the longest end | outputs; the row of a finished request is computed, too, as a |
|                               | ``PaddingRow``                                                |

Requests are taken in the order of submission until the next one does not fit into the
``PaddedKVManager``. The interface is that of ``serve.scheduler``: engine and simulator run
both in the same way.

Left out: sorting requests by length, which pads less and lets requests wait longer.
"""

from __future__ import annotations

from refllm.serve.admission import FirstCome
from refllm.serve.base_scheduler import BaseScheduler
from refllm.serve.baselines.reservations import PaddedKVManager
from refllm.serve.plan import PaddingRow, Plan, PlanBuilder
from refllm.serve.request import Request, SequenceStatus


class StaticBatching(BaseScheduler):
    """Padded batches over a ``PaddedKVManager``, of at most ``max_sequences`` rows."""

    memory: PaddedKVManager

    def __init__(self, memory: PaddedKVManager, *, max_sequences: int | None = None):
        """Build a scheduler without a token budget."""
        super().__init__(memory, FirstCome(), None, max_sequences)

    def rejection_reason(self, request: Request) -> str | None:
        """No row of a batch can jump ahead of the others."""
        if request.jump_forward:
            return "jumps forward, and the rows of a static batch advance one token at a time"
        return super().rejection_reason(request)

    def plan(self) -> Plan:
        """The whole prompts of a new batch, or one more token for each row of the old one."""
        step = self._begin_plan()
        if not self.running:
            self._form_batch(step)
        # By now the rectangle has its final width, and each row its place.
        for sequence in self.running:
            count = len(sequence.tokens) - sequence.computed
            pad = self.memory.pad(sequence)
            step.add(sequence, count, self.memory.blocks(sequence), [], pad)
        if self.running:
            first = self.running[0]
            past = self.memory.pad(first) + first.computed  # all outputs start in one column
            step.plan.padding_rows = [PaddingRow(past, 1, slot) for slot in self.memory.ended()]
        return self._finish_plan(step)

    def _form_batch(self, step: PlanBuilder) -> None:
        """Admit requests until the next one does not fit."""
        while self.waiting:
            if self.max_sequences is not None and len(self.running) >= self.max_sequences:
                return
            sequence = self.waiting[0]
            if not self.memory.admit(sequence, len(sequence.tokens), alone=not self.running):
                return
            self.waiting.remove(sequence)
            self.running.append(sequence)
            sequence.status = SequenceStatus.RUNNING
            self.queried += len(sequence.tokens)
            step.plan.admitted.append(sequence.key)
