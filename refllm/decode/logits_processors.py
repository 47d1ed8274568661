"""What changes the logits of a request before temperature and filters: a grammar's mask, other
masks, biases, the user's own functions, penalties.

Sources: the order of application and the rules of ``min_tokens`` and ``bad_words``, vLLM's V1
sampler (vllm/v1/sample/sampler.py, logits_processor/builtin.py, ops/bad_words.py, and
``SamplingParams.update_from_tokenizer``); the penalties, ``decode.penalties``.

| step | setting                                    | the logits z of the next token             |
|------|--------------------------------------------|--------------------------------------------|
| 1    | ``grammar``                                | -inf for every token that may not follow   |
|      |                                            | the output (``decode.constraint``)         |
| 2    | ``bad_words``                              | -inf for the last token of a word whose    |
|      |                                            | other tokens are the end of the output     |
| 3    | ``min_tokens``                             | -inf for every end token and stop token    |
|      |                                            | while the output is shorter                |
| 4    | ``logit_bias``                             | z + bias, for the tokens that have one     |
| 5    | ``logits_processors``                      | f(output, z), or f(prompt, output, z)      |
| 6    | ``grammar``                                | step 1 again, if there are any of step 5   |
| 7    | ``repetition_penalty``                     | of tokens of prompt and output             |
| 8    | ``frequency_penalty``, ``presence_penalty``| of tokens of the output                    |

The user's functions see which tokens are legal, and cannot make another one legal: -inf stays
-inf. Where steps 1 to 3 leave no token, the request ends with one sentence (``NoTokenLeft``): as
where a grammar is complete before the output has ``min_tokens``.

Temperature, top-k, top-p and min-p follow (``decode.sampling``).

Each row is processed after *its own* prefix: where drafts are verified, row i has seen the
first i drafts, in a tree the drafts above it. Each rule is a function of the prefix alone, so
verification stays lossless.

| symbol | name                                            | shape           |
|--------|-------------------------------------------------|-----------------|
| z      | logits                                          | [R, V]          |
| counts | how often each token occurred, in one row each  | int32[rows, V]  |

Differences to vLLM: a bias is not clamped to ±100, penalties are not limited to ±2; a bad word
may also be given as token ids.

vLLM's raw log-probabilities are those after the grammar's mask; here they are before it.

Left out: a list of allowed tokens, n-gram penalties, DRY.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from refllm.backend import Array, asarray_like, namespace, scatter_add
from refllm.checkpoints.tokenizer import Tokenizer
from refllm.decode.constraint import (
    ConstraintFailure,
    ConstraintStates,
    Mask,
    NoTokenLeft,
    count_legal,
    stacked,
)
from refllm.decode.penalties import apply_count_penalties, apply_repetition_penalty
from refllm.decode.sampling_params import SamplingParams
from refllm.errors import InputError


@dataclass(frozen=True)
class LogitsProcessors:
    """The settings of one request that change logits. ``end_tokens`` are what ``min_tokens``
    masks; ``constraint`` follows the request's grammar.

    >>> LogitsProcessors(SamplingParams(temperature=0.8)).active
    False
    >>> LogitsProcessors(SamplingParams(), min_tokens=2, end_tokens=frozenset([5])).active
    True
    """

    sampling: SamplingParams
    min_tokens: int = 0
    end_tokens: frozenset[int] = frozenset()
    constraint: ConstraintStates | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if any(isinstance(word, str) for word in self.sampling.bad_words):
            raise InputError(
                "bad_words that are text need a tokenizer: see with_token_ids, or give token ids"
            )

    @property
    def active(self) -> bool:
        """Whether any row can change."""
        s = self.sampling
        return bool(
            s.repetition_penalty != 1
            or s.frequency_penalty
            or s.presence_penalty
            or s.logit_bias
            or s.bad_words
            or s.logits_processors
            or (self.min_tokens and self.end_tokens)
            or self.constraint is not None
        )

    def check_vocabulary(self, vocabulary: int) -> None:
        """InputError for a token outside the vocabulary, which no row of logits has."""
        words = [word for word in self.sampling.bad_words if not isinstance(word, str)]
        named = {
            "logit_bias": list(self.sampling.logit_bias or ()),
            "bad_words": [token for word in words for token in word],
        }
        for name, tokens in named.items():
            if tokens and max(tokens) >= vocabulary:
                raise InputError(
                    f"{name}: token {max(tokens)} is outside the vocabulary of {vocabulary}"
                )


class Row(NamedTuple):
    """What a row of logits follows: its request's settings, the prompt, and the output so far,
    drafts before the row included.
    """

    processors: LogitsProcessors
    prompt: Sequence[int]
    output: Sequence[int]


def with_token_ids(sampling: SamplingParams, tokenizer: Tokenizer) -> SamplingParams:
    """The same settings with ``bad_words`` as token ids.

    A word is banned as it is spelled at the beginning of a text and, where that is another
    token, with a space before it; leading spaces of the word do not count. InputError for a
    word without tokens.
    """
    if all(not isinstance(word, str) for word in sampling.bad_words):
        return sampling
    found: list[tuple[int, ...]] = []
    for word in sampling.bad_words:
        if not isinstance(word, str):
            found.append(tuple(word))
            continue
        plain = tuple(tokenizer.encode(word.lstrip()))
        if not plain:
            raise InputError(f"bad_words: {word!r} has no tokens")
        spaced = tuple(tokenizer.encode(" " + word.lstrip()))
        found.append(plain)
        if spaced and spaced[0] != plain[0] and len(spaced) == len(plain):
            found.append(spaced)
    return replace(sampling, bad_words=tuple(found))


def process_rows(
    z: Array,
    rows: Sequence[Row | None],
    on_error: Callable[[int, BaseException], object] | None = None,
) -> Array:
    """z[R, V] after the processors of each row, in a new array; None leaves a row alone.

    An exception in a grammar or in a user's own processor is passed to ``on_error(row, error)``,
    and the row's remaining processors of the user are skipped; without ``on_error`` it is raised.

    >>> import numpy as np
    >>> banned = LogitsProcessors(SamplingParams(bad_words=[(7, 2)], logit_bias={0: 1.5}))
    >>> process_rows(np.zeros((2, 3)), [Row(banned, [], [7]), None]).tolist()
    [[1.5, 0.0, -inf], [0.0, 0.0, 0.0]]
    """
    busy = [(i, row) for i, row in enumerate(rows) if row is not None and row.processors.active]
    if not busy:
        return z
    index = asarray_like([i for i, _ in busy], z, "int64")
    part = z[index]  # a copy, [rows, V]
    legal = _legal_tokens(busy, on_error)
    part = _mask_illegal(part, legal)
    part = _mask_and_bias(part, [row for _, row in busy])
    changed: dict[int, Mask] = {}  # rows of a grammar and of functions of the user
    for at, (i, row) in enumerate(busy):
        if at in legal and row.processors.sampling.logits_processors:
            changed[at] = legal[at]
        for function in row.processors.sampling.logits_processors:
            try:
                part[at] = call_processor(function, row.prompt, row.output, part[at, ...])
            except BaseException as error:
                if on_error is None or isinstance(error, (KeyboardInterrupt, SystemExit)):
                    raise
                on_error(i, error)
                break
    part = _mask_illegal(part, changed)
    part = _penalize(part, [row for _, row in busy])
    out = z.copy()
    out[index] = part
    return out


def call_processor(
    function: Callable[..., Array], prompt: Sequence[int], output: Sequence[int], z: Array
) -> Array:
    """z[V] after a user's own processor: ``f(output, z)`` or ``f(prompt, output, z)``, with
    lists of token ids.

    It may change z in place, and returns the logits. InputError for another shape.
    """
    if takes_prompt(function):
        new = function(list(prompt), list(output), z)
    else:
        new = function(list(output), z)
    if getattr(new, "shape", None) != z.shape:
        raise InputError(
            f"a logits processor must return logits of shape {tuple(z.shape)}, "
            f"got {type(new).__name__} of shape {getattr(new, 'shape', None)}"
        )
    return new


def takes_prompt(function: Callable[..., Array]) -> bool:
    """Whether a processor takes three arguments, the first of them the prompt; InputError for
    other numbers of arguments than two and three.
    """
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some functions written in C
        return False
    given = [p for p in parameters if p.kind in kinds]
    required = [p for p in given if p.default is inspect.Parameter.empty]
    most = len(given)
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        most = 3
    if most >= 3 and len(required) <= 3 and len(required) != 2:
        return True
    if len(required) > 2 or most < 2:
        raise InputError(
            f"a logits processor takes (output, logits) or (prompt, output, logits): {function!r}"
        )
    return False


def _legal_tokens(
    busy: Sequence[tuple[int, Row]], on_error: Callable[[int, BaseException], object] | None
) -> dict[int, Mask]:
    """Place in ``busy`` → the tokens that the row's grammar allows. A row without any that its
    other masks leave, or that follows an illegal draft, is an error.
    """
    legal: dict[int, Mask] = {}
    for at, (i, row) in enumerate(busy):
        constraint = row.processors.constraint
        if constraint is None:
            continue
        try:
            mask = constraint.mask(row.output)
            if mask is None:
                raise NoTokenLeft("the grammar does not allow the tokens of the output")
            _check_some_left(mask, row)
            legal[at] = mask
        except (ConstraintFailure, NoTokenLeft) as error:
            if on_error is None:
                raise
            on_error(i, error)
    return legal


def _check_some_left(mask: Mask, row: Row) -> None:
    """NoTokenLeft if bad words and ``min_tokens`` forbid every token that the grammar allows."""
    forbidden = {*banned_tokens(row.processors.sampling.bad_words, row.output)}
    early = len(row.output) < row.processors.min_tokens
    if early:
        forbidden |= row.processors.end_tokens
    legal = count_legal(mask)
    if legal > count_legal(mask, forbidden):
        return
    reason = "the grammar allows none"
    if legal:
        who = "bad_words forbid"
        if early and row.processors.end_tokens:
            who = f"bad_words or min_tokens, {row.processors.min_tokens}, forbid"
        reason = f"{who} all {legal} that the grammar allows"
    raise NoTokenLeft(f"no token may follow the {len(row.output)} of the output: {reason}")


def _mask_illegal(z: Array, legal: dict[int, Mask]) -> Array:
    """z[rows, V] with -inf where a row's mask is False; the masks are moved in one transfer."""
    if not legal:
        return z
    xp = namespace(z)
    masks = asarray_like(stacked(list(legal.values())), z)  # bool[masked, V]
    never = xp.asarray(-xp.inf, dtype=z.dtype)
    if len(legal) == z.shape[0]:  # mutate: equivalent (no copy of the rows)
        return xp.where(masks, z, never)
    index = asarray_like(list(legal), z, "int64")
    z[index] = xp.where(masks, z[index], never)
    return z


def _mask_and_bias(z: Array, rows: Sequence[Row]) -> Array:
    """Steps 2 to 4, in place: masked tokens and biases are host data, moved as one index."""
    masked: set[tuple[int, int]] = set()  # (row, token)
    bias: dict[tuple[int, int], float] = {}
    for i, (processors, _, output) in enumerate(rows):
        sampling = processors.sampling
        masked.update((i, token) for token in banned_tokens(sampling.bad_words, output))
        if len(output) < processors.min_tokens:
            masked.update((i, token) for token in processors.end_tokens)
        if sampling.logit_bias:
            bias |= {(i, token): value for token, value in sampling.logit_bias.items()}
    xp = namespace(z)
    if bias:
        at = asarray_like(list(bias), z, "int64")  # [biases, 2], each place once
        values = asarray_like(list(bias.values()), z, "float64")
        z[at[:, 0], at[:, 1]] = z[at[:, 0], at[:, 1]] + xp.astype(values, z.dtype)
    if masked:  # a finite bias leaves -inf as it is, so the order of the two does not matter
        at = asarray_like(sorted(masked), z, "int64")
        z[at[:, 0], at[:, 1]] = -xp.inf
    return z


def banned_tokens(words: Sequence[Sequence[int] | str], output: Sequence[int]) -> list[int]:
    """The tokens that would complete a bad word after ``output``.

    >>> banned_tokens([(7,), (1, 2), (3, 4, 5)], [9, 3, 4]), banned_tokens([(1, 2)], [])
    ([7, 5], [])
    """
    banned = []
    for word in words:
        assert not isinstance(word, str)
        before = len(word) - 1
        if before <= len(output) and list(output[len(output) - before :]) == list(word[:-1]):
            banned.append(word[-1])
    return banned


def _penalize(z: Array, rows: Sequence[Row]) -> Array:
    """Steps 7 and 8 for all rows at once."""
    settings = [row.processors.sampling for row in rows]
    repetition = [one.repetition_penalty for one in settings]
    if any(theta != 1 for theta in repetition):
        texts = [[*prompt, *output] for _, prompt, output in rows]
        z = apply_repetition_penalty(z, _counts(z, texts) > 0, repetition)
    frequency = [one.frequency_penalty for one in settings]
    presence = [one.presence_penalty for one in settings]
    if any(frequency) or any(presence):
        counts = _counts(z, [row.output for row in rows])
        z = apply_count_penalties(z, counts, presence, frequency)
    return z


def _counts(z: Array, texts: Sequence[Sequence[int]]) -> Array:
    """How often each token occurs in each text, int32[rows, V]; only the tokens are moved."""
    xp = namespace(z)
    vocabulary = z.shape[-1]
    flat = [i * vocabulary + token for i, text in enumerate(texts) for token in text]
    counts = xp.zeros(z.shape[0] * vocabulary, dtype=xp.int32)
    index = asarray_like(flat, z, "int64")
    scatter_add(counts, index, xp.ones(len(flat), dtype=xp.int32))
    return counts.reshape(z.shape)
