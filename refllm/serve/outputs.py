"""What the engine gives back: pieces while it runs, a result at the end, and what it
counted.

| reason      | a sequence has ended because                                                                  |
|-------------|---------------------------------------------------------------------------------------------|
| ``end``     | it said an end token, which is not part of ``tokens``                                       |
| ``stop``    | its text came to a stop string, which is not part of ``text``                               |
| ``length``  | it has ``max_tokens``                                                                       |
| ``aborted`` | somebody asked for that                                                                     |
| ``error``   | its logits were no numbers, or its listener raised: ``RequestOutput.error`` says what              |
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from refllm.kv.paged import PagedKVCache
from refllm.serve.base_scheduler import BaseScheduler
from refllm.serve.prefix_caching import RadixKVManager
from refllm.serve.request import Request


@dataclass(frozen=True)
class StreamChunk:
    """What is new of one sequence. ``text`` may lag behind ``tokens``: whole characters, no
    part of a stop string.
    """

    id: Hashable
    index: int
    tokens: list[int]
    text: str
    reason: str | None  # None: more will come


@dataclass(frozen=True)
class CompletionOutput:
    """One whole continuation. ``score`` is a beam's."""

    index: int
    tokens: list[int]
    text: str
    reason: str
    score: float | None = None


@dataclass
class RequestOutput:
    """A request that has ended. ``outputs`` by index; of a beam search the best first."""

    request: Request
    outputs: list[CompletionOutput] = field(default_factory=list)
    preemptions: int = 0
    error: str | None = None

    @property
    def tokens(self) -> list[int]:
        """The tokens of the first output."""
        return self.outputs[0].tokens

    @property
    def text(self) -> str:
        """The text of the first output."""
        return self.outputs[0].text

    @property
    def reason(self) -> str:
        """Why the first output ended."""
        return self.outputs[0].reason


class EngineStats:
    """Counted by scheduler, pool and cache while they work; here they have names."""

    scheduler: BaseScheduler
    cache: PagedKVCache

    @property
    def steps(self) -> int:
        """Steps taken."""
        return self.scheduler.steps

    @property
    def computed_tokens(self) -> int:
        """Tokens that went through the network, those that were computed anew included."""
        return self.scheduler.computed

    @property
    def sampled_tokens(self) -> int:
        """Tokens that were chosen."""
        return self.scheduler.sampled

    @property
    def queried_tokens(self) -> int:
        """Prompt tokens of the requests that were admitted."""
        return self.scheduler.queried

    @property
    def cached_tokens(self) -> int:
        """Those of them that were found in the prefix cache."""
        return self.scheduler.cached

    @property
    def hit_rate(self) -> float:
        """cached / queried; of nothing it is 0."""
        return self.cached_tokens / max(1, self.queried_tokens)

    @property
    def preemptions(self) -> int:
        """How often a sequence lost its memory."""
        return self.scheduler.preemptions

    @property
    def copied_blocks(self) -> int:
        """Blocks copied before a write, because somebody else read them too."""
        return self.cache.copied

    @property
    def peak_blocks(self) -> int:
        """The most blocks that were in use at a time."""
        return self.cache.pool.peak

    @property
    def used_blocks(self) -> int:
        """Blocks that running sequences hold (a prefix cache lets go of the others when it
        must).
        """
        return -(-self.scheduler.memory.allocated // self.cache.pool.block_size)

    @property
    def cached_blocks(self) -> int:
        """Blocks that nobody runs in and that a radix tree keeps."""
        memory = self.scheduler.memory
        if isinstance(memory, RadixKVManager):
            return memory.cache.evictable // memory.block_size
        return 0
