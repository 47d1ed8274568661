"""Where are keys and values stored, and which of them are kept? Every cache hands the network
an ``attend``: it stores the new keys and values of a step, and returns what the queries
read. Read ``contiguous`` first.

1. ``contiguous``: one preallocated buffer per sequence; ``interface``: what every cache and
   every policy offers.
2. ``batched_attention``: the arithmetic that contiguous and paged caches share.
3. ``block_pool``: reference-counted blocks and block tables, in Python integers.
4. ``paged``: keys and values in blocks (PagedAttention).
5. ``hash_prefix``: prefix caching by a chain of block hashes.
6. ``radix_tree``, ``radix_node``: prefix caching by a radix tree (RadixAttention).
7. ``kivi``, ``kivi_attend``, ``kivi_cache``: keys and values in few bits (KIVI).
8. ``sparse``, ``sparse_cache``: caches that evict tokens (StreamingLLM, H2O, TOVA, SnapKV,
   PyramidKV).
9. ``contiguous_allocator``: slot ranges as before paging, for the baselines of ``serve``.
"""

from refllm.kv.block_pool import BlockPool, BlockTable, OutOfBlocks
from refllm.kv.contiguous import ContiguousCache, ContiguousPolicy
from refllm.kv.contiguous_allocator import BuddyAllocator, FirstFitAllocator
from refllm.kv.hash_prefix import PrefixCache, sha256_key
from refllm.kv.interface import Cache, CachePolicy, CacheUsage
from refllm.kv.kivi import Kivi
from refllm.kv.kivi_attend import KiviAttend
from refllm.kv.kivi_cache import KiviCache
from refllm.kv.paged import PagedKVCache, split_attention
from refllm.kv.radix_node import Match, Node
from refllm.kv.radix_tree import RadixCache
from refllm.kv.sparse import (
    SparsePolicy,
    at_random,
    h2o,
    pyramidkv,
    recent_only,
    snapkv,
    streaming,
    tova,
)
from refllm.kv.sparse_cache import SparseCache

__all__ = [
    "BlockPool",
    "BlockTable",
    "BuddyAllocator",
    "Cache",
    "CachePolicy",
    "CacheUsage",
    "ContiguousCache",
    "ContiguousPolicy",
    "FirstFitAllocator",
    "Kivi",
    "KiviAttend",
    "KiviCache",
    "Match",
    "Node",
    "OutOfBlocks",
    "PagedKVCache",
    "PrefixCache",
    "RadixCache",
    "SparseCache",
    "SparsePolicy",
    "at_random",
    "h2o",
    "pyramidkv",
    "recent_only",
    "sha256_key",
    "snapkv",
    "split_attention",
    "streaming",
    "tova",
]
