"""Drafts of a constrained sequence: only what its grammar allows is proposed.

Every row of the target's distribution is masked with the state after its prefix
(``decode.logits_processors``), so an illegal draft would be rejected anyway: proposing it only
costs time. What a proposal loses here must not change the output distribution.

| proposal                 | its legal part                                                   |
|--------------------------|------------------------------------------------------------------|
| not sampled (q is None)  | the drafts before the first illegal one; of a tree the nodes     |
|                          | without illegal ancestors                                        |
| sampled from q           | the same drafts, with q restricted to legal tokens: given that a |
|                          | draft is legal, it was drawn from q′ = q · mask / Σ q · mask     |

The second is lossless too, although it looks at what was drawn. Whether draft i is illegal depends
on q_i alone, and if it is, the token at its place comes from the target's own row; if it is not,
it was drawn from q′_i, which it is verified against. Of siblings that were drawn without
replacement the legal ones, in their order, are drawn without replacement from q′.

Left out: drafts for tokens that are illegal by bad words or ``min_tokens``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from refllm.backend import Array, asarray_like, namespace
from refllm.decode.constraint import Mask
from refllm.decode.speculative.interface import (
    NO_DRAFTS,
    ConstrainedDrafter,
    DraftConstraint,
    Drafter,
    DraftRequest,
    Proposal,
    TreeProposal,
)
from refllm.decode.speculative.tree import Tree


def propose_legal(drafter: Drafter, request: DraftRequest) -> Proposal | TreeProposal:
    """What a drafter proposes: with the constraint if it takes one, else the legal part."""
    tokens, count, sampling, rng, _, constraint = request
    if constraint is None:
        return drafter.propose(tokens, count, sampling, rng)
    if getattr(drafter, "constrains", False):
        knowing = cast(ConstrainedDrafter, drafter)
        return knowing.propose(tokens, count, sampling, rng, constraint=constraint)
    return legal_part(drafter.propose(tokens, count, sampling, rng), request)


def legal_part(proposal: Proposal | TreeProposal, request: DraftRequest) -> Proposal | TreeProposal:
    """The part of a proposal that the constraint allows; the same object if that is all of it."""
    constraint = request.constraint
    if constraint is None or not proposal.tokens:
        return proposal
    if isinstance(proposal, TreeProposal):
        return _legal_tree(proposal, request.tokens, constraint)
    tokens, q = proposal
    count = constraint.legal_length(request.tokens, tokens)
    if q is not None:
        masks = [constraint.mask([*request.tokens, *tokens[:i]]) for i in range(count)]
        q = restricted(q[:count], masks) if count else None
    elif count == len(tokens):
        return proposal
    return Proposal(list(tokens[:count]), q)


def masked_logits(z: Array, mask: Mask) -> Array:
    """z[V] with -inf where the mask is False."""
    xp = namespace(z)
    return xp.where(asarray_like(mask, z), z, xp.asarray(-xp.inf, dtype=z.dtype))


def restricted(q: Array, masks: Sequence[Mask | None]) -> Array:
    """q[rows, V] without what the masks forbid, each row divided by its sum; None leaves a row as
    it is.
    """
    xp = namespace(q)
    rows = []
    for i, mask in enumerate(masks):
        row = q[i, ...]
        if mask is not None:
            row = xp.where(asarray_like(mask, q), row, xp.zeros_like(row))
            total = float(xp.sum(row))
            row = row / total if total > 0 else q[i, ...]
        rows.append(row)
    return xp.stack(rows)


def _legal_tree(
    proposal: TreeProposal, tokens: Sequence[int], constraint: DraftConstraint
) -> Proposal | TreeProposal:
    """The nodes of a tree that have no illegal ancestors and are legal themselves."""
    nodes, q, tree = proposal
    place = {-1: -1}  # a node that stays → its new number
    for node, parent in enumerate(tree.parents):
        if parent in place:
            above = [*tokens, *(nodes[i] for i in tree.ancestors(parent))]
            if constraint.legal_length(above, [nodes[node]]):
                place[node] = len(place) - 1
    kept = list(place)[1:]
    if not kept:
        return NO_DRAFTS
    parents = [place[tree.parents[node]] for node in kept]
    smaller = Tree(parents)
    if q is not None:
        rows = [0, *(node + 1 for node in kept)]
        masks: list[Mask | None] = []
        for row, below in zip(rows, smaller.children, strict=True):
            above = [*tokens, *(nodes[i] for i in tree.ancestors(row - 1))]
            masks.append(constraint.mask(above) if below else None)
        q = restricted(q[asarray_like(rows, q, "int64")], masks)
    elif len(kept) == len(nodes):
        return proposal
    return TreeProposal([nodes[node] for node in kept], q, smaller)
