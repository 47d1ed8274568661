"""A policy's name decides the order, the memory and the limits of its scheduler."""

from __future__ import annotations

import pytest

from refllm.kv.block_pool import BlockPool
from refllm.serve.admission import FirstCome, LongestPrefix, Priority
from refllm.serve.baselines.reservations import PaddedKVManager, ReservedKVManager
from refllm.serve.baselines.static_batching import StaticBatching
from refllm.serve.factory import CONTINUOUS, POLICIES, make
from refllm.serve.kv_manager import PagedKVManager
from refllm.serve.prefix_caching import HashKVManager, RadixKVManager
from refllm.serve.request import Request
from refllm.serve.scheduler import Scheduler

ORDERS = {"fcfs": FirstCome, "priority": Priority, "lpm": LongestPrefix}
MEMORIES = {"auto": HashKVManager, "hash": HashKVManager, "radix": RadixKVManager, None: None}


@pytest.mark.parametrize("policy", CONTINUOUS)
@pytest.mark.parametrize("cache", MEMORIES)
def test_a_continuous_policy_has_its_order_and_the_prefix_cache_that_was_asked_for(policy, cache):
    pool = BlockPool(10, 4)
    made = make(policy, pool, prefix_cache=cache, watermark=0.25)
    assert type(made) is Scheduler
    assert type(made.order) is ORDERS[policy]
    assert type(made.memory) is (MEMORIES[cache] or PagedKVManager)
    assert made.memory.pool is pool
    assert made.memory.watermark_blocks == 2
    assert (made.chunked, made.long_prefill) == (True, 0)
    assert (made.max_batch_tokens, made.max_sequences) == (2048, 128)


def test_options_reach_the_scheduler_and_its_memory():
    made = make(
        "fcfs",
        BlockPool(10, 4),
        prefix_cache="radix",
        eviction="lfu",
        max_batch_tokens=9,
        max_sequences=3,
        chunked=False,
        long_prefill=5,
    )
    assert (made.max_batch_tokens, made.max_sequences) == (9, 3)
    assert (made.chunked, made.long_prefill) == (False, 5)
    with pytest.raises(ValueError, match="sieve"):
        make("fcfs", BlockPool(10, 4), prefix_cache="radix", eviction="sieve")


@pytest.mark.parametrize("policy", [name for name in POLICIES if name not in CONTINUOUS])
def test_a_policy_that_reserves_memory_has_no_token_budget_and_no_chunks(policy):
    made = make(policy, BlockPool(1024, 4), max_batch_tokens=8, max_sequences=5)
    assert (made.max_batch_tokens, made.max_sequences) == (None, 5)
    assert made.memory.slots == 4096
    if policy == "static":
        assert type(made) is StaticBatching
        assert type(made.memory) is PaddedKVManager
        assert made.memory.longest == 4096  # the pool is the only limit
    else:
        assert type(made.memory) is ReservedKVManager
        assert not made.chunked
        assert made.memory.rule == policy.removeprefix("orca-")


@pytest.mark.parametrize(("longest", "reserved"), [(None, 2048), (100, 100)])
def test_orca_max_reserves_the_longest_sequence(longest, reserved):
    made = make("orca-max", BlockPool(1024, 4), longest=longest, buddy=False)
    made.submit(Request([1, 2], 3))
    made.plan()
    assert made.memory.allocated == reserved


def test_without_a_name_for_the_prefix_cache_there_is_none():
    assert type(make("fcfs", BlockPool(4, 4)).memory) is PagedKVManager
