"""What a cache and its policy are: the protocols by which generation, speculation and
evaluation use every cache alike.

| name           | meaning                                                                |
|----------------|------------------------------------------------------------------------|
| ``Cache``      | keys and values of a batch of sequences                                |
| ``CachePolicy``| settings that make a cache, such as ``Kivi(2, 2)`` or ``h2o(256)``     |
| ``CacheUsage`` | how much memory a policy needs, in bytes and in words                  |
| ``TokenTree``  | the shape of a tree of drafts, as far as a cache needs it              |

A step is: ``view(counts)``, an ``attend`` that the network calls once per layer; the
forward pass; ``advance(counts)``. Rollback is an ``advance`` by fewer tokens than the view
had: what it leaves out has never been part of the cache.

Callers never ask which kind of cache they have: the attributes of a cache say what it needs
of its caller, those of a policy what it cannot do.

Left out: the paged cache, whose sequences are block tables that come and go
(``kv.paged``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Protocol

import numpy as np

from refllm.backend import Array
from refllm.model.attention import Attend
from refllm.model.config import ModelConfig

# The message of what rejects a tree of drafts: ``CachePolicy.trees`` and ``Cache.view_tree``.
NO_TREES = "a tree of drafts is verified in a cache that keeps everything: draft chains instead"


class TokenTree(Protocol):
    """A tree of m drafts below the last token; row 0 is that token, row i + 1 is node i."""

    def __len__(self) -> int:
        """m."""

    def positions(self, start: int) -> list[int]:
        """Positions of the rows where row 0 stands at ``start``."""

    def mask(self) -> list[list[bool]]:
        """[m+1][m+1]: whether row i sees row j."""


class Cache(Protocol):
    """Keys and values of B sequences; ``lengths[b]`` tokens of sequence b are committed.

    ``chunked_prefill`` says whether a prompt is read in several passes: True for must, False
    for must not, None where the result is the same either way.
    """

    lengths: list[int]
    chunked_prefill: ClassVar[bool | None]

    @property
    def nbytes(self) -> int:
        """Bytes that are allocated now."""

    def positions(self, counts: Sequence[int]) -> list[int]:
        """Positions of the next ``counts[b]`` tokens of every sequence, in the order of the
        ragged batch.
        """

    def view(self, counts: Sequence[int]) -> Attend:
        """An ``attend`` for a step in which sequence b contributes ``counts[b]`` new tokens
        (0 is allowed). ValueError if a sequence would outgrow the cache.
        """

    def advance(self, counts: Sequence[int]) -> None:
        """Commit the first ``counts[b]`` tokens of the last view."""

    def finish_prompt(self) -> None:
        """The prompts have been read: called once, between prefill and decode."""

    def view_tree(self, sequence: int, tree: TokenTree) -> Attend:
        """An ``attend`` for one step of one sequence with a tree of drafts; ValueError where
        the policy has ``trees = False``.
        """

    def advance_path(self, sequence: int, path: Sequence[int]) -> None:
        """Commit row 0 and the nodes ``path`` of the last ``view_tree``."""


class CacheUsage(NamedTuple):
    """Memory of one sequence: ``nbytes`` with full precision in float32, or None where
    nothing was left out; ``kept`` says in words what is in the cache.
    """

    nbytes: int | None
    kept: str


class CachePolicy(Protocol):
    """What a cache keeps, and how; ``trees`` says whether its caches can verify a tree of
    drafts.
    """

    trees: ClassVar[bool]

    def new_cache(
        self,
        config: ModelConfig,
        sequences: int,
        capacity: int,
        *,
        like: Array,
        rng: np.random.Generator | None = None,
    ) -> Cache:
        """An empty cache for ``sequences`` sequences of up to ``capacity`` tokens each.

        ``like`` is any array of the library and type to live in; ``rng`` is for a policy that
        drops tokens at random.
        """

    def usage(self, config: ModelConfig, prompt: int, new: int) -> CacheUsage:
        """The memory of one sequence after a prompt of ``prompt`` tokens and ``new`` more."""
