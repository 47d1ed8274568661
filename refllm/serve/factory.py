"""Schedulers by the name of their policy, over the memory and the prefix cache that they need.

| name                     | batch                               | memory                |
|--------------------------|-------------------------------------|-----------------------|
| fcfs, priority, lpm      | changes per step; prompts in chunks | blocks, prefix caches |
| orca-max, -pow2, -oracle | changes per step; prompts whole     | one range per request |
| static                   | padded, runs to its end             | a row of a rectangle  |

All are a ``BaseScheduler`` and are used in the same way: ``submit``, ``plan``, ``update``,
``abort``. Engine and simulator both make theirs here, so they run the same one.

Left out: policies of your own need no name: make a ``Scheduler`` from any ``KVManager`` and
``Order``.
"""

from __future__ import annotations

from typing import TypedDict

from refllm.errors import InputError, alternatives
from refllm.kv.block_pool import BlockPool
from refllm.serve.base_scheduler import BaseScheduler
from refllm.serve.baselines.reservations import PaddedKVManager, ReservedKVManager
from refllm.serve.baselines.static_batching import StaticBatching
from refllm.serve.kv_manager import KVManager, PagedKVManager
from refllm.serve.prefix_caching import HashKVManager, RadixKVManager
from refllm.serve.scheduler import Scheduler

CONTINUOUS = ("fcfs", "priority", "lpm")
ORCA = ("orca-max", "orca-pow2", "orca-oracle")
POLICIES = (*CONTINUOUS, *ORCA, "static")
PREFIX_CACHES = ("auto", "hash", "radix", None)


class PolicyOptions(TypedDict, total=False):
    """What ``make`` takes beside the limits of a batch, for those who pass it on."""

    chunked: bool
    long_prefill: int
    watermark: float
    eviction: str
    longest: int | None
    buddy: bool


def make(
    policy: str,
    pool: BlockPool,
    *,
    prefix_cache: str | None = None,
    max_batch_tokens: int | None = 2048,
    max_sequences: int | None = 128,
    chunked: bool = True,
    long_prefill: int = 0,
    watermark: float = 0.0,
    eviction: str = "lru",
    longest: int | None = None,
    buddy: bool = True,
    window: int | None = None,
) -> BaseScheduler:
    """A scheduler for the slots of ``pool``.

    Parameters
    ----------
    prefix_cache
        ``"hash"``, ``"radix"`` (``eviction`` is the order in which its tree evicts) or None;
        ``"auto"`` is ``"hash"`` where memory is in blocks. Policies that reserve memory have
        none.
    max_batch_tokens
        the token budget of a step; policies that compute prompts whole (``orca-…``,
        ``static``) have none.
    watermark
        share of the blocks that stays free when a request is admitted beside others.
    longest
        tokens of the longest sequence: what ``orca-max`` reserves for each (default 2048),
        and the widest row of ``static`` (default: no limit). ``buddy`` rounds reservations
        to powers of two.
    window
        the sliding window of the model's layers: blocks behind it are freed, except in a
        radix tree.

    ValueError for a name that is not in the table, or a cache where there can be none.
    """
    if policy not in POLICIES:
        raise InputError(f"unknown policy {policy!r}; {alternatives(policy, POLICIES)}")
    if prefix_cache == "auto":
        prefix_cache = "hash" if policy in CONTINUOUS else None
    if prefix_cache not in PREFIX_CACHES:
        raise InputError(f"unknown prefix cache {prefix_cache!r}; choose hash, radix or None")
    if prefix_cache is not None and policy not in CONTINUOUS:
        raise InputError(
            f"policy {policy!r} reserves its memory: it can share no prefixes, "
            "so prefix_cache is None"
        )
    slots = pool.num_blocks * pool.block_size
    if policy == "static":
        rectangle = PaddedKVManager(slots, longest=longest)
        return StaticBatching(rectangle, max_sequences=max_sequences)
    if policy in ORCA:
        rule = policy.removeprefix("orca-")
        reserved = ReservedKVManager(slots, rule, longest=longest or 2048, buddy=buddy)
        return Scheduler(
            reserved, chunked=False, max_batch_tokens=None, max_sequences=max_sequences
        )
    memory: KVManager
    if prefix_cache == "radix":
        memory = RadixKVManager(pool, watermark=watermark, policy=eviction)
    elif prefix_cache == "hash":
        memory = HashKVManager(pool, watermark=watermark, window=window)
    else:
        memory = PagedKVManager(pool, watermark=watermark, window=window)
    return Scheduler(
        memory,
        order=policy,
        chunked=chunked,
        long_prefill=long_prefill,
        max_batch_tokens=max_batch_tokens,
        max_sequences=max_sequences,
    )
