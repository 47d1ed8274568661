"""Which of several choices does a model find likeliest? Three rules over the log-probabilities
of their tokens.

Source: SGLang's ``choices_method`` (python/sglang/lang/choices.py); the third rule is the
"unconditional likelihood" of Gao, "Multiple Choice Normalization in LM Evaluation" (2021).

| rule                                  | the choice with the largest                        |
|---------------------------------------|----------------------------------------------------|
| ``token_length_normalized``           | mean of log p(token | text, tokens before it)      |
| ``greedy_token_selection``            | log p of its first token; of equal ones the second |
|                                       | … A choice that has ended counts on with its mean  |
| ``unconditional_likelihood_normalized`` | mean of log p(token | text, …) − log p(token | …): |
|                                       | what the text adds to the choice alone             |

The mean makes choices of unequal length comparable, and prefers those whose later tokens are
forced by the earlier ones. The greedy rule follows the tokens that greedy decoding would take,
as a grammar of these choices does, and never looks past the first difference. The third
discounts choices that are likely after any text.

Of equal choices the first wins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import fsum

Logprobs = Sequence[Sequence[float]]  # [choices][tokens]


@dataclass(frozen=True)
class Decision:
    """The choice that was made, and what decided it: a score per choice, the larger the
    better; ``logprobs`` are those of each choice's tokens.
    """

    choice: str
    index: int
    scores: tuple[float, ...]
    logprobs: tuple[tuple[float, ...], ...]


def token_length_normalized(logprobs: Logprobs, alone: Logprobs | None = None) -> list[float]:
    """The mean log-probability of each choice.

    >>> token_length_normalized([[-1.0, -2.0], [-1.25]])
    [-1.5, -1.25]
    """
    return [_mean(tokens) for tokens in logprobs]


def greedy_token_selection(logprobs: Logprobs, alone: Logprobs | None = None) -> list[float]:
    """The number of tokens for which each choice was among the best: the winner has the most.

    >>> greedy_token_selection([[-1.0, -9.0], [-1.0, -8.0], [-2.0, -0.1]])
    [1.0, 2.0, 0.0]
    """
    longest = max(map(len, logprobs))
    remaining = list(range(len(logprobs)))
    kept = [0.0] * len(logprobs)
    for place in range(longest):
        column = {
            i: logprobs[i][place] if place < len(logprobs[i]) else _mean(logprobs[i])
            for i in remaining
        }
        best = max(column.values())
        remaining = [i for i in remaining if column[i] == best]
        for i in remaining:
            kept[i] += 1
        if len(remaining) == 1:
            break
    return kept


def unconditional_likelihood_normalized(
    logprobs: Logprobs, alone: Logprobs | None = None
) -> list[float]:
    """The mean of what the text adds to each token's log-probability; ``alone`` are those of
    the same tokens without the text.

    >>> unconditional_likelihood_normalized([[-1.0], [-2.0]], [[-1.5], [-4.0]])
    [0.5, 2.0]
    """
    assert alone is not None, "this rule needs the choices' log-probabilities without the text"
    return [
        _mean([p - p_alone for p, p_alone in zip(tokens, without, strict=True)])
        for tokens, without in zip(logprobs, alone, strict=True)
    ]


RULES: dict[str, Callable[[Logprobs, Logprobs | None], list[float]]] = {
    "token_length_normalized": token_length_normalized,
    "greedy_token_selection": greedy_token_selection,
    "unconditional_likelihood_normalized": unconditional_likelihood_normalized,
}
NEEDS_ALONE = "unconditional_likelihood_normalized"


def decide(
    choices: Sequence[str], rule: str, logprobs: Logprobs, alone: Logprobs | None = None
) -> Decision:
    """The first choice with the largest score."""
    scores = RULES[rule](logprobs, alone)
    index = max(range(len(choices)), key=scores.__getitem__)
    return Decision(
        choices[index], index, tuple(scores), tuple(tuple(tokens) for tokens in logprobs)
    )


def _mean(values: Sequence[float]) -> float:
    return fsum(values) / len(values)
