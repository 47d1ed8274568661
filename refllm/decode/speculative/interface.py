"""The interface between drafting and verification: what a drafter is, what it is asked for,
and what it returns.

| name             | meaning                                                               |
|------------------|-----------------------------------------------------------------------|
| ``Proposal``     | a chain of drafted tokens, and what each was really sampled from      |
| ``TreeProposal`` | the same for a tree, whose nodes share their prefixes                 |
| ``DraftRequest`` | what a drafter is asked for, for one of several sequences             |
| ``DraftConstraint`` | which drafts the grammar of the sequence allows                    |
| ``Drafter``      | the protocol of ``ngram_drafter``, ``model_drafter`` and the others   |

Left out: how drafts are made (the drafters), and the acceptance rules that verify them
(``decode.speculative.verification``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from refllm.backend import Array
from refllm.checkpoints.tokenizer import Tokenizer
from refllm.decode.constraint import ConstraintStates, Mask, count_legal
from refllm.decode.sampling_params import SamplingParams
from refllm.decode.speculative.tree import Tree
from refllm.errors import InputError
from refllm.model.config import ModelConfig
from refllm.model.llama import Weights


class Proposal(NamedTuple):
    """Drafted tokens, and row for row what they were sampled from: q[len(tokens), V]; None
    means one-hot rows.
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


NO_DRAFTS = Proposal([], None)


class DraftConstraint(NamedTuple):
    """The grammar of a sequence whose prompt has ``prompt_length`` tokens."""

    states: ConstraintStates
    prompt_length: int

    def mask(self, tokens: Sequence[int]) -> Mask | None:
        """Which tokens may follow prompt and output, bool[V] on the host; None for none."""
        mask = self.states.mask(tokens[self.prompt_length :])
        if mask is None or not count_legal(mask):
            return None
        return mask

    def legal_length(self, tokens: Sequence[int], drafts: Sequence[int]) -> int:
        """How many of the ``drafts`` may follow prompt and output one after another."""
        return self.states.legal_length(tokens[self.prompt_length :], drafts)


class DraftRequest(NamedTuple):
    """The arguments of ``propose`` for one sequence, where a batch of them is asked for. A drafter
    that draws from a distribution of its own restricts it to what ``constraint`` allows.
    """

    tokens: Sequence[int]
    max_drafts: int
    sampling: SamplingParams
    rng: np.random.Generator
    sequence: int
    constraint: DraftConstraint | None = None


class ModelLike(Protocol):
    """A network with its tokenizer, such as ``refllm.api.Model``."""

    config: ModelConfig
    weights: Weights
    tokenizer: Tokenizer


class Drafter(Protocol):
    """What generation and engine ask of a drafter. One that may propose a tree says so by
    ``trees = True``; a ``ConstrainedDrafter`` by ``constrains = True``. Of what other drafters
    propose under a grammar the legal part is used (``constrained.legal_part``).
    """

    gamma: int  # drafts per step, unless fewer are asked for

    def propose(
        self, tokens: Sequence[int], count: int, sampling: SamplingParams, rng: np.random.Generator
    ) -> Proposal | TreeProposal:
        """At most ``count`` drafts of what follows ``tokens``, where the target samples
        with ``sampling``.
        """

    def observe(self, best: Sequence[int], accepted: int) -> None:
        """Learn the outcome of a chain: the target's argmax at each position, and how many
        drafts were accepted.

        It is not called after a tree, nor after an empty proposal.
        """


class ConstrainedDrafter(Drafter, Protocol):
    """A drafter that knows grammars: its ``constrains`` is True."""

    def propose(
        self,
        tokens: Sequence[int],
        count: int,
        sampling: SamplingParams,
        rng: np.random.Generator,
        *,
        constraint: DraftConstraint | None = None,
    ) -> Proposal | TreeProposal:
        """Drafts that the constraint allows, and the q that is restricted to such."""


def common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first tokens two sequences share.

    >>> common_prefix_length([5, 6, 7], [5, 6, 8, 9])
    2
    """
    n = min(len(a), len(b))
    same = max(0, n - 16)  # they differ near the end, if at all: compare the rest at once
    if list(a[:same]) != list(b[:same]):
        same = 0
    while same < n and a[same] == b[same]:
        same += 1
    return same


def checked_gamma(gamma: int) -> int:
    """γ as an int; ValueError if it is not an integer of 1 or more."""
    if not isinstance(gamma, (int, np.integer)) or gamma < 1:
        raise InputError(f"gamma, the number of drafts per step, must be 1 or more, got {gamma!r}")
    return int(gamma)


def check_vocabulary(target: ModelLike, draft: ModelLike) -> None:
    """ValueError if a draft model does not share the target's vocabulary: the same ids for
    the same text.
    """
    sizes = target.config.vocab_size, draft.config.vocab_size
    if sizes[0] != sizes[1]:
        raise InputError(
            f"the draft model has a vocabulary of {sizes[1]} tokens and the target of {sizes[0]}: "
            "a draft model needs the target's tokenizer"
        )
    if not (target.tokenizer.available and draft.tokenizer.available):
        return  # ids alone: equal sizes are all that can be compared
    ours, theirs = (m.tokenizer.inner.get_vocab(with_added_tokens=True) for m in (target, draft))
    if ours != theirs:
        word = min(w for w in {*ours, *theirs} if ours.get(w) != theirs.get(w))
        raise InputError(
            f"the draft model's vocabulary is not the target's: {word!r} is token "
            f"{theirs.get(word)} in the draft and {ours.get(word)} in the target"
        )
