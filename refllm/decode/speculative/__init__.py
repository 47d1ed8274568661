"""How does a target model emit several tokens per step? Drafters guess the next tokens, the
target computes all guesses in one forward pass, and an acceptance rule keeps a prefix so
that greedy output, or the output distribution at other temperatures, is unchanged. Read
``verification`` first: it holds the rule. A drafter is lossless if the q that it returns is
the distribution it sampled from.

1. ``verification``: token-wise, block, greedy and typical acceptance rules.
2. ``interface``: ``Proposal``, ``Drafter``.
3. ``loop``: speculative generation of one sequence; ``constrained``: drafts under a grammar.
4. ``ngram_drafter``, ``jacobi_drafter``: drafts that cost no model.
5. ``model_drafter``: a small model with its own cache.
6. ``tree``: token trees, and which node sees which.
7. ``tree_verification``: the acceptance rules for trees.
8. ``tree_drafter``: a draft model that fans out where it is not confident.
9. ``tree_shape``: the best static tree (Sequoia).
10. ``cascade``: several drafters in turn.
11. ``control_drafters``: all drafts right, all drafts wrong.
12. ``acceptance``: acceptance rate, α, acceptance length, and the speed-up that they predict.

| drafter                | drafts                             | q       | cost of a draft      |
|------------------------|------------------------------------|---------|----------------------|
| ``NGramDrafter``       | what followed the last tokens at   | one-hot | none                 |
|                        | an earlier occurrence              |         |                      |
| ``JacobiDrafter``      | the target's predictions after the | one-hot | none                 |
|                        | last drafts                        |         |                      |
| ``ModelDrafter``       | what a small model samples (or its | its own | a step of that model |
|                        | argmax)                            |         |                      |
| ``TreeDrafter``        | the same as a tree                 | its own | a step of that model |
| ``Cascade``            | those of the first drafter that    | its     | its                  |
|                        | has any                            |         |                      |
| ``PerfectDrafter``     | what the target will emit: a       | its own | a step of the target |
|                        | control                            |         |                      |
| ``AdversarialDrafter`` | the least likely tokens: the other | one-hot | a step of the target |
|                        | control                            |         |                      |
"""

from refllm.decode.speculative.acceptance import (
    Acceptance,
    acceptance_stats,
    best_gamma,
    expected_length,
    speedup,
)
from refllm.decode.speculative.cascade import Cascade, check_drafter
from refllm.decode.speculative.control_drafters import AdversarialDrafter, PerfectDrafter
from refllm.decode.speculative.interface import (
    NO_DRAFTS,
    Drafter,
    DraftRequest,
    Proposal,
    TreeProposal,
)
from refllm.decode.speculative.jacobi_drafter import JacobiDrafter
from refllm.decode.speculative.loop import AcceptanceRule, SpeculativeStep, speculate
from refllm.decode.speculative.model_drafter import ModelDrafter
from refllm.decode.speculative.ngram_drafter import NGramDrafter
from refllm.decode.speculative.tree import Tree
from refllm.decode.speculative.tree_drafter import TreeDrafter
from refllm.decode.speculative.tree_shape import best_tree, expected_path, optimal_tree
from refllm.decode.speculative.tree_verification import (
    draw_children,
    verify_tree,
    verify_tree_greedy,
)
from refllm.decode.speculative.verification import (
    residual,
    verify,
    verify_block,
    verify_greedy,
    verify_typical,
)

__all__ = [
    "NO_DRAFTS",
    "Acceptance",
    "AcceptanceRule",
    "AdversarialDrafter",
    "Cascade",
    "DraftRequest",
    "Drafter",
    "JacobiDrafter",
    "ModelDrafter",
    "NGramDrafter",
    "PerfectDrafter",
    "Proposal",
    "SpeculativeStep",
    "Tree",
    "TreeDrafter",
    "TreeProposal",
    "acceptance_stats",
    "best_gamma",
    "best_tree",
    "check_drafter",
    "draw_children",
    "expected_length",
    "expected_path",
    "optimal_tree",
    "residual",
    "speculate",
    "speedup",
    "verify",
    "verify_block",
    "verify_greedy",
    "verify_tree",
    "verify_tree_greedy",
    "verify_typical",
]
