"""What the engine returns at the end, and what it counts. (While it runs, it returns
``serve.plan.SequenceUpdate``.)

| finish_reason | stop_reason     | a sequence has finished because                               |
|---------------|-----------------|---------------------------------------------------------------|
| ``stop``      | None            | it generated an end token, which is not part of ``tokens``    |
| ``stop``      | the stop string | its text reached a stop string, which is not part of ``text`` |
| ``stop``      | the stop token  | it generated one of ``stop_token_ids``: not part of ``tokens``|
| ``stop``      | None            | it is complete in its grammar: nothing but an end token may   |
|               |                 | follow                                                        |
| ``length``    | None            | it has ``max_tokens``                                         |
| ``abort``     | None            | ``Engine.abort`` was called                                   |
| ``timeout``   | None            | its ``timeout`` has passed since ``submit``                   |
| ``error``     | None            | something of its own raised (``serve.isolation``): ``error``  |
|               |                 | says what, such as logits that are not finite                 |

The words are vLLM's. (It leaves the end token in ``tokens``.)
"""

from __future__ import annotations

from dataclasses import dataclass, field

from refllm.decode.completion import CompletionOutput
from refllm.decode.logprobs import PromptLogprobs
from refllm.kv.paged import PagedKVCache
from refllm.serve.base_scheduler import BaseScheduler
from refllm.serve.prefix_caching import RadixKVManager
from refllm.serve.request import Prompt, Request


@dataclass
class RequestOutput:
    """A finished request. ``outputs`` are in the order of their index; those of a beam search
    have the best first. Times are those of the engine's clock, in seconds.
    """

    request: Request  # its prompt is token ids
    outputs: list[CompletionOutput] = field(default_factory=list)
    prompt: Prompt | None = field(default=None, compare=False)  # as it was given
    preemptions: int = 0
    cached_tokens: int = field(default=0, compare=False)  # of the prompt, in the prefix cache
    computed_tokens: int = field(default=0, compare=False)  # through the network
    drafted_tokens: int = field(default=0, compare=False)  # verified
    accepted_tokens: int = field(default=0, compare=False)
    submitted_at: float = field(default=0.0, compare=False)
    first_token_at: float | None = field(default=None, compare=False)
    finished_at: float | None = field(default=None, compare=False)
    error: str | None = None
    prompt_logprobs: PromptLogprobs | None = None

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt)

    @property
    def generated_tokens(self) -> int:
        """Tokens of all outputs."""
        return sum(len(output.tokens) for output in self.outputs)

    @property
    def jumped_tokens(self) -> int:
        """Tokens of all outputs that ``jump_forward`` appended."""
        return sum(output.jumped_tokens for output in self.outputs)

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from ``submit`` to the first token; of a beam search to its end."""
        return None if self.first_token_at is None else self.first_token_at - self.submitted_at

    @property
    def tokens(self) -> list[int]:
        """The tokens of the first output."""
        return self.outputs[0].tokens

    @property
    def text(self) -> str:
        """The text of the first output."""
        return self.outputs[0].text

    @property
    def finish_reason(self) -> str:
        """Why the first output finished."""
        return self.outputs[0].finish_reason

    @property
    def stop_reason(self) -> int | str | None:
        """The stop string that ended the first output, if one did."""
        return self.outputs[0].stop_reason


class EngineStats:
    """Names for what scheduler, block pool and cache count while they work."""

    scheduler: BaseScheduler
    cache: PagedKVCache

    @property
    def steps(self) -> int:
        """Steps so far."""
        return self.scheduler.steps

    @property
    def computed_tokens(self) -> int:
        """Tokens that went through the network, recomputed ones included."""
        return self.scheduler.computed

    @property
    def sampled_tokens(self) -> int:
        """Tokens that were generated."""
        return self.scheduler.sampled

    @property
    def jumped_tokens(self) -> int:
        """Of these, the tokens that ``jump_forward`` appended: each saved a forward pass."""
        return self.scheduler.jumped

    @property
    def queried_tokens(self) -> int:
        """Prompt tokens of the requests that were admitted."""
        return self.scheduler.queried

    @property
    def cached_tokens(self) -> int:
        """Of these, the tokens that the prefix cache had."""
        return self.scheduler.cached

    @property
    def hit_rate(self) -> float:
        """cached_tokens / queried_tokens; 0 before the first request."""
        return self.cached_tokens / max(1, self.queried_tokens)

    @property
    def preemptions(self) -> int:
        """How often a sequence lost its memory."""
        return self.scheduler.preemptions

    @property
    def copied_blocks(self) -> int:
        """Blocks copied before a write, because another sequence shared them."""
        return self.cache.copied

    @property
    def peak_blocks(self) -> int:
        """The most blocks that were in use at the same time."""
        return self.cache.pool.peak

    @property
    def used_blocks(self) -> int:
        """Blocks that running sequences hold; a prefix cache can evict all others."""
        return -(-self.scheduler.memory.allocated // self.cache.pool.block_size)

    @property
    def cached_blocks(self) -> int:
        """Blocks that only a radix tree holds."""
        memory = self.scheduler.memory
        if isinstance(memory, RadixKVManager):
            return memory.cache.evictable // memory.block_size
        return 0
