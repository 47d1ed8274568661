"""The smallest engine that serves: continuous batching over a paged cache, first come first
served, greedy. Read it before ``serve.engine``; the engine's tests use it as their oracle.

Sources: Yu et al. 2022 (Orca), section 3 (iteration-level scheduling: the batch is formed
again before every step); Kwon et al. 2023 (vLLM), section 4 (blocks and block tables).

| symbol | name                                                      | shape  |
|--------|-----------------------------------------------------------|--------|
| T      | tokens of a step: whole prompts, and one token per decode |        |
| B      | sequences of a step                                       |        |
| z      | logits of each sequence's last token                      | [B, V] |

One step:

1. ``admit``: requests leave the queue as long as the pool has blocks for all the tokens
   that they can ever hold. Nothing is preempted, because nothing can run out of blocks.
2. ``batch``: each running sequence brings the tokens whose keys and values are not cached:
   its prompt in its first step (prefill), its newest token in every later one (decode).
3. ``forward`` over the ragged batch; the cache's ``view`` says which block each key is in.
4. The largest logit of each sequence's last row is its next token. A sequence that has
   ``max_tokens``, or whose token is an end token, leaves at once and frees its blocks: the
   next step's batch has room for others.

Left out, and found in ``serve.engine``: sampling, preemption, chunked prefill, prefix
caching, speculative drafts, beams, streaming, priorities.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from refllm.backend import asarray_like, to_numpy
from refllm.decode.speculative.interface import ModelLike
from refllm.errors import InputError
from refllm.kv.block_pool import BlockTable
from refllm.kv.paged import PagedKVCache
from refllm.model.llama import forward, logits
from refllm.serve.request import Request
from refllm.serve.request_state import validate_request


@dataclass
class Running:
    """One request: its tokens so far, and the table of the blocks that hold its keys."""

    request_id: int
    tokens: list[int]  # prompt, then output
    prompt_length: int
    max_tokens: int
    table: BlockTable

    @property
    def output(self) -> list[int]:
        """The tokens that were generated."""
        return self.tokens[self.prompt_length :]

    @property
    def blocks(self) -> int:
        """Blocks that the request can need in all: its last token is never cached."""
        longest = self.prompt_length + self.max_tokens - 1
        return -(-longest // self.table.block_size)


@dataclass
class MinimalEngine:
    """Serves greedy requests from one pool of ``num_blocks`` blocks.

    >>> import refllm
    >>> engine = MinimalEngine(refllm.load("stdlib-draft"), num_blocks=8)
    >>> first, second = engine.submit([5, 9, 2], 4), engine.submit([7], 2)
    >>> outputs = engine.run()
    >>> len(outputs[first]), len(outputs[second])
    (4, 2)
    """

    model: ModelLike
    num_blocks: int
    block_size: int = 16
    computed: int = 0  # tokens that went through the network
    waiting: deque[Running] = field(default_factory=deque)
    running: list[Running] = field(default_factory=list)
    outputs: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        like = self.model.weights["norm"]
        self.cache = PagedKVCache(self.model.config, self.num_blocks, self.block_size, like=like)

    def submit(self, prompt: Sequence[int], max_tokens: int) -> int:
        """Queue a request of at least one token to read and one to write; returns its id.

        ValueError if it can never be served: ids, length, or the whole pool is too small.
        """
        number = len(self.outputs) + len(self.waiting) + len(self.running)
        checked = Request(prompt, max_tokens, number)
        validate_request(checked, self.model.config)
        tokens = list(checked.prompt_ids)
        one = Running(number, tokens, len(tokens), max_tokens, self.cache.table())
        if max_tokens < 1 or one.blocks > self.num_blocks:
            raise InputError(f"needs max_tokens >= 1, and {one.blocks} of {self.num_blocks} blocks")
        self.waiting.append(one)
        return number

    def run(self) -> dict[int, list[int]]:
        """Step until every request has ended; id -> output tokens, without the end token."""
        while self.waiting or self.running:
            self.step()
        return self.outputs

    def step(self) -> None:
        """Admit, compute one ragged batch, append one token per sequence, retire."""
        self.admit()
        counts = [len(one.tokens) - one.table.length for one in self.running]
        tables = [one.table for one in self.running]
        tokens = [t for one in self.running for t in one.tokens[one.table.length :]]  # [T]
        positions = self.cache.positions(tables, counts)  # [T]
        last_rows = [sum(counts[: i + 1]) - 1 for i in range(len(counts))]  # [B]

        for table, count in zip(tables, counts, strict=True):
            self.cache.reserve(table, count)
        view = self.cache.view(tables, counts)
        config = self.model.config
        weights = self.model.weights
        like = weights["norm"]
        x, p, rows = (asarray_like(ids, like, "int64") for ids in (tokens, positions, last_rows))
        hidden = forward(weights, config, x, p, view, rows)  # [B, N]
        z = to_numpy(logits(weights, hidden))  # [B, V]
        self.cache.advance(tables, counts)

        self.computed += len(tokens)
        for one, token in zip(list(self.running), z.argmax(axis=-1).tolist(), strict=True):
            one.tokens.append(token)
            ended = token in config.eos_token_ids
            if ended or len(one.output) == one.max_tokens:
                self.outputs[one.request_id] = one.output[:-1] if ended else one.output
                self.running.remove(one)
                one.table.free()

    def admit(self) -> None:
        """Move requests from the queue into the batch while their blocks are available."""
        promised = sum(one.blocks for one in self.running)  # held already, or needed later
        while self.waiting and promised + self.waiting[0].blocks <= self.num_blocks:
            one = self.waiting.popleft()
            promised += one.blocks
            self.running.append(one)
