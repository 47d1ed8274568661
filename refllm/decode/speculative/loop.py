"""Speculative generation of one sequence: draft, compute all drafts in one step of the
target, keep those that it accepts.

Source: Leviathan et al. 2023, algorithm 1; Chen et al. 2023, algorithm 2.

A step, with tokens = prompt + output, of which [0, s) are cached and the last one is not:

1. the drafter drafts γ tokens; fewer near ``max_tokens``, as a step emits up to γ + 1, and where
   the grammar, if there is one, allows no more (``constrained``);
2. the target computes [last, x_1 … x_γ] at positions s … s + γ: one forward, γ + 1 rows of
   logits;
3. row i goes through the logits processors, with penalties, and the state of the grammar, for
   the tokens *and* x_1 … x_{i−1}, and ``verify`` accepts or rejects (temperature 0: by the argmax);
4. a drafts are accepted and one token follows: the cache is longer by 1 + a. The slots
   behind hold keys and values of rejected drafts, which no query sees and the next step
   overwrites (a quantised cache never keeps them).

A tree works the same way: a row sees its ancestors, and the keys and values of the accepted
path are moved together in the cache.

Left out: batches (``serve``), stop strings and end tokens (the caller's).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from refllm.backend import Array, asarray_like, finite_argmax, namespace, to_numpy
from refllm.decode.fast.captured_step import make_decode_step
from refllm.decode.generate import check_prompts, checked_policy, choose_tokens, prefill
from refllm.decode.jump_forward import JumpForward
from refllm.decode.logits_processors import LogitsProcessors, Row, process_rows
from refllm.decode.logprobs import LogprobsRecorder
from refllm.decode.sampling import distribution
from refllm.decode.sampling_params import SamplingParams
from refllm.decode.speculative.constrained import propose_legal
from refllm.decode.speculative.interface import (
    NO_DRAFTS,
    DraftConstraint,
    Drafter,
    DraftRequest,
    Proposal,
    TreeProposal,
)
from refllm.decode.speculative.tree import Tree
from refllm.decode.speculative.tree_verification import verify_tree, verify_tree_greedy
from refllm.decode.speculative.verification import verify, verify_greedy
from refllm.errors import InputError
from refllm.kv.interface import NO_TREES, CachePolicy
from refllm.model.config import ModelConfig
from refllm.model.llama import Weights, logits

# (p, q, draft, rng) → (accepted, token)
AcceptanceRule = Callable[
    [Array, Array | None, Sequence[int], np.random.Generator], tuple[int, int]
]


NO_LARGEST = "the logits of a step have no largest one: NaN, +inf or nothing but -inf"


class SpeculativeStep(NamedTuple):
    """The outcome of one step of the target: of its drafts the first ``accepted``, then
    ``token``.
    """

    drafts: list[int]
    accepted: int
    token: int
    judged: int | None = None  # levels of a tree that were verified
    # tokens that stand in the place of ``token`` (``decode.jump_forward``)
    replaced: list[int] | None = None

    @property
    def tokens(self) -> list[int]:
        """The tokens that the step emits."""
        last = [self.token] if self.replaced is None else self.replaced
        return [*self.drafts[: self.accepted], *last]

    @property
    def jumped(self) -> int:
        """Tokens that were appended without sampling."""
        return 0 if self.replaced is None else len(self.replaced) - 1


def speculate(
    weights: Weights,
    config: ModelConfig,
    prompt: Sequence[int],
    max_tokens: int,
    sampling: SamplingParams,
    rng: np.random.Generator,
    drafter: Drafter,
    rule: AcceptanceRule = verify,
    policy: CachePolicy | None = None,
    processors: LogitsProcessors | None = None,
    recorder: LogprobsRecorder | None = None,
    jump: JumpForward | None = None,
) -> Iterator[SpeculativeStep]:
    """Yield steps of ``max_tokens`` tokens in all; the first is the prefill's, without drafts.
    The arguments are checked at the call.

    Greedy output is that of ``generate_tokens``; at other temperatures the output
    distribution is. Under a cache ``policy`` this holds given the cache's contents at the
    beginning of each step: all tokens of a step attend to those. ``jump`` appends what the grammar
    of the ``processors`` forces, which changes the distribution; it cannot be recorded.

    ValueError for what ``generate_tokens`` rejects, and for a proposal that ``verify``
    rejects.
    """
    check_prompts([prompt], max_tokens, config)
    policy = checked_policy(policy)
    if getattr(drafter, "trees", False) and not policy.trees:
        raise InputError(NO_TREES)
    processors = processors or LogitsProcessors(sampling)
    processors.check_vocabulary(config.vocab_size)
    if max_tokens == 0:
        return iter(())
    return _speculate(
        weights,
        config,
        prompt,
        max_tokens,
        sampling,
        rng,
        drafter,
        rule,
        policy,
        processors,
        recorder,
        jump,
    )


def _speculate(
    weights: Weights,
    config: ModelConfig,
    prompt: Sequence[int],
    max_tokens: int,
    sampling: SamplingParams,
    rng: np.random.Generator,
    drafter: Drafter,
    rule: AcceptanceRule,
    policy: CachePolicy,
    processors: LogitsProcessors,
    recorder: LogprobsRecorder | None,
    jump: JumpForward | None,
) -> Iterator[SpeculativeStep]:
    """``speculate`` with arguments that were checked."""
    end = len(prompt) + max_tokens
    constraint = None
    if processors.constraint is not None:
        constraint = DraftConstraint(processors.constraint, len(prompt))
    cache = policy.new_cache(config, 1, end, like=weights["norm"], rng=rng)
    tokens = [int(t) for t in prompt]
    decode_step = make_decode_step(weights, config)
    raw = logits(weights, prefill(weights, config, [tokens], cache, recorder))  # [1, V]
    z = processed_logits(raw, processors, tokens, len(prompt))
    step = SpeculativeStep([], 0, choose_tokens(z, sampling, rng)[0])
    if recorder is not None:
        recorder.add([0], [0], step.tokens, raw, z, sampling)
    while True:
        if jump is not None:
            step = _with_jump(step, jump, tokens, len(prompt), end, rng)
        yield step
        tokens += step.tokens
        if len(tokens) == end:
            return
        # a step emits up to count + 1 tokens
        count = min(drafter.gamma, end - len(tokens) - 1)
        proposal: Proposal | TreeProposal = NO_DRAFTS
        if count > 0 and constraint is None:
            proposal = drafter.propose(tokens.copy(), count, sampling, rng)
        elif count > 0:
            request = DraftRequest(tokens.copy(), count, sampling, rng, 0, constraint)
            proposal = propose_legal(drafter, request)
        # the last token is not cached yet, nor what was jumped over before it
        pending = tokens[cache.lengths[0] :]
        if isinstance(proposal, TreeProposal):
            tree = proposal.tree
            if len(pending) > 1:
                counts = [len(pending) - 1]
                decode_step(pending[:-1], cache.positions(counts), cache.view(counts))
                cache.advance(counts)
            new = [tokens[-1], *proposal.tokens]
            positions = tree.positions(cache.lengths[0])
            raw = decode_step(new, positions, cache.view_tree(0, tree))  # [m+1, V]
            z = processed_logits(raw, processors, tokens, len(prompt), proposal.tokens, tree)
            z, failed = without_failed_rows(z)
            step, path = verify_tree_proposal(z, proposal, sampling, rng)
            step, path = before_failed_rows(step, path, failed)
            rows = [0, *(node + 1 for node in path)]  # that the tokens were drawn from
            cache.advance_path(0, path)
        else:
            new = [*pending, *proposal.tokens]
            positions = cache.positions([len(new)])
            raw = decode_step(new, positions, cache.view([len(new)]))
            raw = raw[len(pending) - 1 :]  # [γ+1, V]
            z = processed_logits(raw, processors, tokens, len(prompt), proposal.tokens)
            z, failed = without_failed_rows(z)
            step, best = verify_proposal(z, proposal, sampling, rng, rule)
            step, _ = before_failed_rows(step, range(step.accepted), failed)
            rows = list(range(step.accepted + 1))
            drafter.observe(best[: min(failed, default=len(best))], step.accepted)
            cache.advance([step.accepted + len(pending)])
        if recorder is not None:
            recorder.add([0] * len(rows), rows, step.tokens, raw, z, sampling)


def _with_jump(
    step: SpeculativeStep,
    jump: JumpForward,
    tokens: Sequence[int],
    prompt_length: int,
    end: int,
    rng: np.random.Generator,
) -> SpeculativeStep:
    """The step with what is forced after it, up to ``end`` tokens; each position of the output has
    a uniform of its own, drawn or not.
    """
    whole = [*tokens, *step.tokens]
    replaced = jump.replace_last(whole[prompt_length:], end - len(whole) + 1)
    if replaced == [step.token]:
        return step
    rng.random(len(replaced) - 1)
    return step._replace(replaced=replaced)


def verify_proposal(
    z: Array,
    proposal: Proposal,
    sampling: SamplingParams,
    rng: np.random.Generator,
    rule: AcceptanceRule = verify,
) -> tuple[SpeculativeStep, list[int]]:
    """Verify a proposal by its logits z[γ+1, V], after the logits processors → the step, and
    the argmax at each position.
    """
    drafts = proposal.tokens
    if sampling.temperature == 0:
        best = _checked_argmax(z)
        return SpeculativeStep(drafts, *verify_greedy(best, drafts)), best
    p = distribution(z, sampling)  # [γ+1, V]
    step = SpeculativeStep(drafts, *rule(p, proposal.q, drafts, rng))
    return step, to_numpy(namespace(z).argmax(z, axis=-1)).tolist()


def verify_tree_proposal(
    z: Array,
    proposal: TreeProposal,
    sampling: SamplingParams,
    rng: np.random.Generator,
) -> tuple[SpeculativeStep, list[int]]:
    """Verify a tree by its logits z[m+1, V], after the logits processors → the step, whose
    drafts begin with the accepted path, and the path.
    """
    nodes, q, tree = proposal
    if sampling.temperature == 0:
        path, token = verify_tree_greedy(_checked_argmax(z), tree, nodes)
    else:
        p = distribution(z, sampling)  # [m+1, V]
        path, token = verify_tree(p, q, tree, nodes, rng)
    # the path first, so that ``drafts[:accepted]`` are the accepted tokens
    kept = set(path)
    order = path + [node for node in range(len(nodes)) if node not in kept]
    end = path[-1] + 1 if path else 0  # the row where the path ends
    judged = len(path) + bool(tree.children[end])
    return SpeculativeStep([nodes[node] for node in order], len(path), token, judged), path


def processed_logits(
    z: Array,
    processors: LogitsProcessors,
    tokens: Sequence[int],
    prompt_length: int,
    drafts: Sequence[int] = (),
    tree: Tree | None = None,
) -> Array:
    """z[γ+1, V] after the logits processors: row i follows the tokens and the drafts before
    it, in a tree those above it. A row whose processor raises is -inf: it may follow a draft
    that is never accepted. Of row 0 the exception is raised.
    """
    if not processors.active:
        return z
    prompt = tokens[:prompt_length]
    output = tokens[prompt_length:]
    rows: list[Row | None] = []
    failed: list[int] = []
    for i in range(len(drafts) + 1):
        before = list(range(i)) if tree is None else tree.ancestors(i - 1)
        rows.append(Row(processors, prompt, [*output, *(drafts[j] for j in before)]))

    def fail(row: int, error: BaseException) -> None:
        if row == 0:
            raise error
        failed.append(row)

    z = process_rows(z, rows, fail)
    if failed:
        z[asarray_like(failed, z, "int64")] = -namespace(z).inf
    return z


def without_failed_rows(z: Array) -> tuple[Array, list[int]]:
    """z[γ+1, V] with zeros in the rows that give no token (NaN, +inf or nothing but -inf), and
    these rows. They follow drafts that may never be accepted. InputError if row 0 is one.
    """
    failed = [row for row, token in enumerate(finite_argmax(z)) if token < 0]
    if not failed:
        return z, failed
    if failed[0] == 0:
        raise InputError(NO_LARGEST)
    z = z.copy()
    z[asarray_like(failed, z, "int64")] = 0.0
    return z, failed


def before_failed_rows(
    step: SpeculativeStep, path: Sequence[int], failed: Sequence[int]
) -> tuple[SpeculativeStep, list[int]]:
    """The step up to the first failed row on its accepted path: the draft before that row is
    its last token, and the next step, where the row is row 0, decides.
    """
    for length, node in enumerate(path):
        if node + 1 in failed:
            token = step.drafts[length]
            return step._replace(accepted=length, token=token), list(path[:length])
    return step, list(path)


def _checked_argmax(z: Array) -> list[int]:
    """The argmax of each row on the host; ValueError if no logit of a row is the largest."""
    found = finite_argmax(z)
    if min(found) < 0:
        raise InputError(NO_LARGEST)
    return found
