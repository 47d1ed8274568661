"""The seam between who guesses and who verifies: what a drafter is, what it is asked, and
what it returns.

| name             | what it is                                                  |
|------------------|-------------------------------------------------------------|
| ``Proposal``     | a chain of guesses, and what each was really sampled from   |
| ``TreeProposal`` | the same for a tree, whose nodes share their prefixes       |
| ``Ask``          | what a drafter is asked for one of several sequences        |
| ``Drafter``      | whoever proposes: ``decode.speculative.drafters``, ``decode.speculative.tree_drafter`` |

Left out: how anybody guesses (``decode.speculative.drafters``), and the laws that judge it
(``decode.speculative.verification``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from refllm.backend import Array
from refllm.decode.sampling_params import SamplingParams
from refllm.decode.speculative.tree import Tree


class Proposal(NamedTuple):
    """Drafted tokens, and row for row what they were sampled from: q[len(tokens), V]; None:
    one-hot.
    """

    tokens: list[int]
    q: Array | None


class TreeProposal(NamedTuple):
    """The nodes of a tree; row i of q[len(tokens) + 1, V] is what the children of row i
    were drawn from.
    """

    tokens: list[int]
    q: Array | None
    tree: Tree


NOTHING = Proposal([], None)


class Ask(NamedTuple):
    """What ``propose`` is asked for a sequence, where several are asked for at once."""

    tokens: Sequence[int]
    most: int
    sampling: SamplingParams
    rng: np.random.Generator
    sequence: int


class Drafter(Protocol):
    """What generation and engine ask of a drafter. One that may propose a tree says so:
    ``trees = True``.
    """

    gamma: int  # drafts a step, if nobody asks for fewer

    def propose(
        self, tokens: Sequence[int], count: int, sampling: SamplingParams, rng: np.random.Generator
    ) -> Proposal | TreeProposal:
        """At most ``count`` guesses of what follows ``tokens``, where the target samples as
        ``how`` says.
        """

    def observe(self, best: Sequence[int], accepted: int) -> None:
        """What came of a chain: the target's argmax in each place, and how many guesses
        were accepted.

        Nobody tells what came of a tree, or of no guess.
        """


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first tokens two sequences share."""
    n = min(len(a), len(b))
    same = max(0, n - 16)  # they differ near the end, if at all: the rest is compared at once
    if list(a[:same]) != list(b[:same]):
        same = 0
    while same < n and a[same] == b[same]:
        same += 1
    return same


def checked_gamma(gamma: int) -> int:
    """γ as an int; ValueError if it is no whole number, or below 1."""
    if not isinstance(gamma, (int, np.integer)) or gamma < 1:
        raise ValueError(f"gamma, the number of drafts a step, must be 1 or more, got {gamma!r}")
    return int(gamma)


def check_vocabulary(target: Any, draft: Any) -> None:
    """ValueError if a draft model does not speak the target's vocabulary: the same ids for
    the same text.
    """
    sizes = target.config.vocab_size, draft.config.vocab_size
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the draft model has a vocabulary of {sizes[1]} tokens and the target of {sizes[0]}: "
            "a draft needs the target's tokenizer"
        )
    ours, theirs = (m.tokenizer.inner.get_vocab(with_added_tokens=True) for m in (target, draft))
    if ours != theirs:
        word = min(w for w in {*ours, *theirs} if ours.get(w) != theirs.get(w))
        raise ValueError(
            f"the draft model's vocabulary is not the target's: {word!r} is token {theirs.get(word)} "
            f"in the draft and {ours.get(word)} in the target"
        )
