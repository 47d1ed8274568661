"""Trees from a draft model: a chain while the model is confident, and a fan where it is not.

Sources: the trade between depth and width is that of Chen et al. 2024 (Sequoia), section
3.1; that the draft's own probability tells which node will be accepted, Li et al. 2024
(EAGLE-2), section 3.1.

A step of the draft model costs the same for one draft or for several at the same position,
and on a processor a step of the target costs nearly the same for 2 to 4 tokens. So of a
budget of γ nodes, from the root down:

- max q ≥ ``confidence`` and more than one node left: one child, and drafting continues
  below it;
- else all nodes that are left become children here, and the draft is complete.

| temperature | children                         | q in the proposal  | verified by            |
|-------------|----------------------------------|--------------------|------------------------|
| 0           | the most likely tokens of q      | none               | ``verify_tree_greedy`` |
| above 0     | drawn from q without replacement | for each inner row | ``verify_tree``        |

How many children a node gets depends on q alone and not on what is drawn from it, so the
output distribution stays the target's.

Left out: expanding several nodes of a level at once (EAGLE-2), trees in the batches of
``serve``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from refllm.backend import Array, namespace
from refllm.decode.sampling import distribution
from refllm.decode.sampling_params import SamplingParams
from refllm.decode.speculative.interface import (
    NO_DRAFTS,
    DraftConstraint,
    DraftRequest,
    ModelLike,
    Proposal,
    TreeProposal,
)
from refllm.decode.speculative.model_drafter import ModelDrafter
from refllm.decode.speculative.tree import Tree
from refllm.decode.speculative.tree_verification import draw_children


class TreeDrafter(ModelDrafter):
    """A draft model that proposes trees of ``gamma`` nodes; below ``confidence`` it fans out."""

    trees = True  # only a cache that keeps everything can verify them

    def __init__(
        self,
        model: ModelLike,
        gamma: int = 3,
        *,
        confidence: float = 0.4,
        sampling: SamplingParams | None = None,
    ):
        super().__init__(model, gamma, confidence=confidence, sampling=sampling)

    def propose(  # type: ignore[override]  # it returns trees
        self,
        tokens: Sequence[int],
        count: int,
        sampling: SamplingParams,
        rng: np.random.Generator,
        sequence: int = 0,
        constraint: DraftConstraint | None = None,
    ) -> Proposal | TreeProposal:
        """See ``Drafter.propose``; ``sequence`` says whose cache to use."""
        request = DraftRequest(tokens, count, sampling, rng, sequence, constraint)
        sampling = self.sampling or sampling
        count = min(count, self.cache.capacity - len(tokens))
        parents: list[int] = []
        nodes: list[int] = []
        rows: dict[int, Array] = {}  # q[V] by the row whose children were drawn from it
        parent = -1
        feed = self._roll_back(tokens, sequence) if count > 0 else []
        while len(nodes) < count:
            z = self._constrained(self._feed(feed, sequence), request, nodes)  # [V]
            if z is None:
                break
            left = count - len(nodes)
            if sampling.temperature == 0:
                children = self._likeliest(z, left)
            else:
                q = distribution(z, sampling)
                rows[parent + 1] = q
                # decided by q, before anything is drawn from it
                if float(namespace(q).max(q)) >= self.confidence:
                    left = 1
                children = draw_children(q, left, rng)
            parents += [parent] * len(children)
            parent = len(nodes)
            nodes += children
            if len(children) > 1:  # a fan ends the tree
                break
            feed = children
        if nodes:
            return TreeProposal(nodes, _stacked(rows, 1 + len(nodes)), Tree(parents))
        return NO_DRAFTS

    def _likeliest(self, z: Array, left: int) -> list[int]:
        """The argmax of z[V] alone where its probability reaches ``confidence``, else the
        ``left`` largest.
        """
        xp = namespace(z)
        best = [int(xp.argmax(z))]
        if left == 1 or float(xp.sum(xp.exp(z - z[best[0]]))) * self.confidence <= 1:
            return best
        z = z * 1.0
        # A few passes over z, one for each child, cost less than a sort.
        while len(best) < min(left, z.shape[0]):
            z[best[-1]] = -math.inf
            best.append(int(xp.argmax(z)))
        return best


def _stacked(rows: dict[int, Array], count: int) -> Array | None:
    """q[m+1, V] with zeros in the rows of leaves; None if nothing was sampled."""
    if not rows:
        return None
    first = rows[0]
    xp = namespace(first)
    return xp.stack([rows.get(i, xp.zeros_like(first)) for i in range(count)])
