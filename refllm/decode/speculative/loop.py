"""Speculative generation of one sequence: draft, compute all drafts in one step of the
target, keep what it agrees to.

Source: Leviathan et al. 2023, algorithm 1; Chen et al. 2023, algorithm 2.

A step, with text = prompt + output, of which [0, s) are cached and the last token is not:

1. the drafter guesses γ tokens; fewer near ``max_tokens``, as a step emits up to γ + 1;
2. the target computes [last, x_1 … x_γ] at positions s … s + γ: one forward, γ + 1 rows of
   logits;
3. row i is penalised for the text *with* x_1 … x_{i−1}, warped, and ``verify`` judges
   (temperature 0: the argmax);
4. a drafts are accepted and one token follows: the cache is longer by 1 + a. What lies
   behind, keys and values of rejected drafts, is garbage that no query sees and the next
   step overwrites (a cache of codes never keeps it).

A tree takes the same way: the rows see their ancestors, and of its nodes the accepted path
is moved together.

Left out: batches (``serve``), stop strings and end tokens (whoever reads the tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from refllm.backend import Array, asarray_like, namespace, to_numpy
from refllm.decode.fast.captured_step import stepper
from refllm.decode.generate import (
    CachePolicy,
    check_policy,
    check_prompts,
    choose,
    new_cache,
    prefill,
)
from refllm.decode.sampling import apply_repetition_penalty, best, distribution
from refllm.decode.sampling_params import SamplingParams
from refllm.decode.speculative.interface import NOTHING, Drafter, Proposal, TreeProposal
from refllm.decode.speculative.tree import Tree, TreeView, compact, verify_tree, verify_tree_greedy
from refllm.decode.speculative.verification import verify, verify_greedy
from refllm.kv.contiguous import ContiguousCache
from refllm.model.config import ModelConfig
from refllm.model.llama import Weights, logits

Law = Callable[[Array, Array | None, Sequence[int], np.random.Generator], tuple[int, int]]


class Step(NamedTuple):
    """What a step of the target brought: of its drafts the first ``accepted``, then
    ``token``.
    """

    drafts: list[int]
    accepted: int
    token: int
    judged: int | None = None  # levels of a tree that were looked at

    @property
    def tokens(self) -> list[int]:
        """What is emitted."""
        return [*self.drafts[: self.accepted], self.token]


def speculate(
    weights: Weights,
    config: ModelConfig,
    prompt: Sequence[int],
    max_tokens: int,
    sampling: SamplingParams,
    rng: np.random.Generator,
    drafter: Drafter,
    law: Law = verify,
    policy: CachePolicy | None = None,
) -> Iterator[Step]:
    """Yield steps of ``max_tokens`` tokens in all; the first is the prefill's, without
    drafts.

    The tokens have the law that ``generate_tokens`` draws them from; at temperature 0 they
    are the same tokens. Under a ``policy`` for the cache this holds given what the cache
    held when each step began: all tokens of a step read that.

    ValueError for what ``generate_tokens`` refuses, and for a proposal that ``verify``
    refuses.
    """
    check_prompts([prompt], max_tokens, config)
    check_policy(policy)
    if policy is not None and getattr(drafter, "trees", False):
        raise ValueError(
            "a tree of drafts is verified in a cache that keeps everything: draft chains instead"
        )
    if max_tokens == 0:
        return
    like = weights["norm"]
    cache = new_cache(config, 1, len(prompt) + max_tokens, like, policy, rng)
    text = [int(t) for t in prompt]
    end = len(prompt) + max_tokens
    compute = stepper(weights, config)
    z = logits(weights, prefill(weights, config, [text], cache))
    step = Step([], 0, choose(penalised(z, text, [], sampling.repetition_penalty), sampling, rng)[0])
    while True:
        yield step
        text += step.tokens
        if len(text) == end:
            return
        count = min(drafter.gamma, end - len(text) - 1)
        if count > 0:
            proposal = drafter.propose(text, count, sampling, rng)
        else:
            proposal = NOTHING
        tokens = [text[-1], *proposal.tokens]
        if not isinstance(proposal, TreeProposal):
            z = compute(tokens, cache.positions([len(tokens)]), cache.view([len(tokens)]))
            step, best = judge(z, text, proposal, sampling, rng, law)
            drafter.observe(best, step.accepted)
            cache.advance([step.accepted + 1])
        else:
            assert isinstance(cache, ContiguousCache), (
                "the drafter proposes trees, and did not say so"
            )
            tree = proposal.tree
            z = compute(tokens, tree.positions(cache.lengths[0]), TreeView(cache, 0, tree))
            step, path = judge_tree(z, text, proposal, sampling, rng)
            compact(cache, 0, path)


def judge(
    z: Array,
    text: Sequence[int],
    proposal: Proposal,
    sampling: SamplingParams,
    rng: np.random.Generator,
    law: Law = verify,
) -> tuple[Step, list[int]]:
    """Verify a proposal after ``text`` by its logits z[γ+1, V]: the step, and the target's
    argmax in each place.
    """
    drafts = proposal.tokens
    z = penalised(z, text, drafts, sampling.repetition_penalty)
    if sampling.temperature == 0:
        found = _sound(z)
        return Step(drafts, *verify_greedy(found, drafts)), found
    p = distribution(z, sampling)
    return Step(drafts, *law(p, proposal.q, drafts, rng)), to_numpy(
        namespace(z).argmax(z, axis=-1)
    ).tolist()


def judge_tree(
    z: Array, text: Sequence[int], proposal: TreeProposal, sampling: SamplingParams, rng: np.random.Generator
) -> tuple[Step, list[int]]:
    """Verify a tree after ``text`` by its logits z[m+1, V]: the step, its path first among
    the drafts, and the path.
    """
    nodes, q, tree = proposal
    z = penalised(z, text, nodes, sampling.repetition_penalty, tree)
    if sampling.temperature == 0:
        path, token = verify_tree_greedy(_sound(z), tree, nodes)
    else:
        p = distribution(z, sampling)
        path, token = verify_tree(p, q, tree, nodes, rng)
    kept = set(path)
    order = path + [node for node in range(len(nodes)) if node not in kept]
    judged = len(path) + bool(tree.children[path[-1] + 1 if path else 0])
    return Step([nodes[node] for node in order], len(path), token, judged), path


def penalised(
    z: Array, text: Sequence[int], drafts: Sequence[int], penalty: float, tree: Tree | None = None
) -> Array:
    """z[γ+1, V] with the repetition penalty: row i pays for the text and the drafts before
    it, in a tree above it.
    """
    if penalty == 1:
        return z
    seen = np.zeros(z.shape, dtype=bool)
    seen[:, list(text)] = True
    above = np.asarray((tree or Tree.chain(len(drafts))).mask())  # [γ+1, γ+1], of itself too
    for i, token in enumerate(drafts):
        seen[above[:, i + 1], token] = True
    return apply_repetition_penalty(z, asarray_like(seen, z), penalty)


def _sound(z: Array) -> list[int]:
    """The argmax of each row on the host; ValueError if one is no largest number."""
    found = best(z)
    if min(found) < 0:
        raise ValueError("the logits of a step have no largest one: NaN, +inf or nothing but -inf")
    return found
