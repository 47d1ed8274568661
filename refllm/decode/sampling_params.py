"""Sampling parameters: what a user sets, the checks, and the form that the filters compute with.

``SamplingParams`` holds the settings of one request. What users call (``Model.generate``,
``serve.request.Request``) takes ``sampling=SamplingParams(…)`` or, as a shorthand, its fields
as keywords; ``sampling_params`` makes a record of either. The functions of ``decode.sampling``
also take lists, with one value per row of logits[B, V]: a batch of requests with their own
settings. ``validate_params`` checks either form on the host, by the same ``RULES``, rewrites
"off" and "greedy" as values that need no case of their own, and places them beside the logits:

| given         | used                                                                    |
|---------------|-------------------------------------------------------------------------|
| temperature 0 | top_k 1 at temperature 1: one token stays, the lowest id of the largest |
|               | logit                                                                   |
| top_k 0       | V                                                                       |
| top_p 1       | 2, a share that no prefix reaches (a prefix's mass may *round* to 1)    |
| min_p 0       | 0: every weight is at least that                                        |

Left out: device arrays as parameters: they are settings, and live on the host; a seed, stop
strings and ``ignore_eos``, which vLLM has here: they are not about the next token's
distribution, which is all that a drafter and ``decode.sampling`` need to know.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import NamedTuple, TypedDict, TypeGuard

import numpy as np

from refllm.backend import Array, DType, Operand, namespace
from refllm.errors import InputError

Parameter = float | Sequence[float]  # one value, or a list or NumPy array of B values

# Below it even neighbouring float32 logits are infinitely far apart; and 1/τ stays finite.
_COLDEST = 1e-200


class Rule(NamedTuple):
    """Which numbers a parameter may be, as a predicate and in words."""

    allowed: Callable[[float], bool]
    words: str
    integer: bool = False


# The only place that says what is allowed, for single parameters and for lists of them.
RULES = {
    "temperature": Rule(lambda x: 0 <= x < math.inf, "0 (greedy) or finite and above"),
    "top_k": Rule(lambda x: 0 <= x == x // 1, "0 (off) or a positive integer", integer=True),
    "top_p": Rule(lambda x: 0 < x <= 1, "within (0, 1]"),
    "min_p": Rule(lambda x: 0 <= x <= 1, "within [0, 1]"),
    "repetition_penalty": Rule(lambda x: 0 < x < math.inf, "finite and above 0"),
    "bias": Rule(math.isfinite, "finite"),
    "presence": Rule(math.isfinite, "finite"),
    "frequency": Rule(math.isfinite, "finite"),
    "presence_penalty": Rule(math.isfinite, "finite"),
    "frequency_penalty": Rule(math.isfinite, "finite"),
}


def _check(name: str, value: object, where: str = "") -> float:
    """A parameter's value as a plain number; ValueError unless it may have this value.

    Any real number is converted here, once: a Fraction, a NumPy scalar or a huge integer that
    passed this check must not fail in the arithmetic of a step.
    """
    rule = RULES[name]
    if not _is_number(value):
        raise InputError(f"{name} must be a number, got {value!r}{where}")
    try:
        number = float(value)
    except Exception as error:  # an integer beyond all floats; a class of the caller's
        raise InputError(
            f"{name} must be {rule.words}: float() of this {type(value).__name__} raised "
            f"{type(error).__name__}{where}"
        ) from error
    if not rule.allowed(number):
        raise InputError(f"{name} must be {rule.words}, got {value}{where}")
    if rule.integer or isinstance(value, int):
        return int(value)
    return number


def _is_number(value: object) -> TypeGuard[float]:
    # float and int come first: asking the abstract class Real takes ten times as long
    return isinstance(value, (float, int, Real)) and not isinstance(value, bool)


def _checked_bias(bias: Mapping[int, float] | None) -> dict[int, float] | None:
    """Token id → a finite number, as a copy; ValueError for anything else."""
    if bias is None:
        return None
    if not isinstance(bias, Mapping):
        raise InputError(f"logit_bias must map token ids to numbers, got {bias!r}")
    for token in bias:
        if not is_token(token):
            raise InputError(f"logit_bias must map token ids, 0 or more, to numbers, got {token!r}")
    return {int(t): float(_check("bias", v, f" for token {t}")) for t, v in bias.items()}


def _checked_words(words: Sequence[str | Sequence[int]]) -> tuple[str | tuple[int, ...], ...]:
    """Bad words as text or as tuples of ids; ValueError for an empty one."""
    if isinstance(words, str) or not isinstance(words, Sequence):
        raise InputError(f"bad_words must be a list of words, got {words!r}")
    for word in words:
        is_ids = isinstance(word, Sequence) and all(is_token(token) for token in word)
        if not word or not (isinstance(word, str) or is_ids):
            raise InputError(
                f"bad_words must be words, or lists of token ids, that are not empty, got {word!r}"
            )
    return tuple(w if isinstance(w, str) else tuple(int(t) for t in w) for w in words)


def _checked_functions(
    functions: Sequence[Callable[..., Array]],
) -> tuple[Callable[..., Array], ...]:
    """Logits processors as a tuple; ValueError for what cannot be called."""
    if not isinstance(functions, Sequence) or not all(callable(f) for f in functions):
        raise InputError(f"logits_processors must be a list of functions, got {functions!r}")
    return tuple(functions)


def is_token(x: object) -> TypeGuard[int]:
    """Whether x may be a token id."""
    if isinstance(x, bool) or not isinstance(x, Integral):
        return False
    return int(x) >= 0


@dataclass(frozen=True)
class SamplingParams:
    """How the next token of one request is chosen; the defaults are greedy.

    See ``decode.sampling.process_logits`` for the meaning of the first four, and
    ``decode.logits_processors`` for that of the others. ValueError names a parameter that is
    no number, or outside its range.

    >>> SamplingParams(temperature=0.8, top_p=0.9) == SamplingParams(0.8, 0, 0.9)
    True
    >>> SamplingParams(top_p=1.5)
    Traceback (most recent call last):
    refllm.errors.InputError: top_p must be within (0, 1], got 1.5
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = field(default=None, repr=False, hash=False)
    bad_words: Sequence[str | Sequence[int]] = field(default=(), repr=False)
    logits_processors: Sequence[Callable[..., Array]] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name in RULES:
                object.__setattr__(self, name, _check(name, value))
        # copies, past the frozen record's __setattr__
        vars(self).update(
            logit_bias=_checked_bias(self.logit_bias),
            bad_words=_checked_words(self.bad_words),
            logits_processors=_checked_functions(self.logits_processors),
        )


GREEDY = SamplingParams()


def as_generator(rng: object, name: str = "rng") -> np.random.Generator:
    """A Generator from one, from a seed, or, of None, from a fresh seed; InputError for
    anything else.
    """
    if isinstance(rng, np.random.Generator):
        return rng
    try:
        if isinstance(rng, bool):
            raise TypeError("a bool")
        return np.random.default_rng(rng)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{name} must be a numpy.random.Generator, a seed (an integer, 0 or more) or None, "
            f"got {rng!r:.80}"
        ) from error


class SamplingOptions(TypedDict, total=False):
    """The fields of ``SamplingParams`` as keywords: the shorthand for ``sampling=``."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    bad_words: Sequence[str | Sequence[int]]
    logits_processors: Sequence[Callable[..., Array]]


def sampling_params(sampling: SamplingParams | None, shorthand: SamplingOptions) -> SamplingParams:
    """``sampling``, or the parameters that were given as keywords, or greedy.

    ValueError if both were given, or ``sampling`` is something else.

    >>> sampling_params(None, {}) == GREEDY
    True
    >>> sampling_params(None, {"temperature": 0.8}).temperature
    0.8
    >>> sampling_params(GREEDY, {"temperature": 0.8})  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    refllm.errors.InputError: give either sampling=SamplingParams(…) or its shorthand ...
    """
    if sampling is None:
        return SamplingParams(**shorthand) if shorthand else GREEDY
    if not isinstance(sampling, SamplingParams):
        raise InputError(f"sampling must be a SamplingParams(…), got {sampling!r}")
    if shorthand:
        names = ", ".join(shorthand)
        raise InputError(
            f"give either sampling=SamplingParams(…) or its shorthand ({names}), not both"
        )
    return sampling


class ValidatedParams(NamedTuple):
    """The parameters of ``process_logits`` as it computes with them: Python numbers, or
    columns [B, 1].
    """

    temperature: Array | float
    top_k: Array | float
    top_p: Array | float
    min_p: Array | float
    filtering: bool  # whether any row can lose a token


def validate_params(
    logits: Array, temperature: Parameter, top_k: Parameter, top_p: Parameter, min_p: Parameter
) -> ValidatedParams:
    """Check the parameters for logits[..., V] and rewrite them as the table above says.

    ValueError names the parameter, its range and the row; or says that the logits have no
    tokens.
    """
    xp = namespace(logits)
    V = logits.shape[-1] if logits.ndim else 0
    if V == 0:
        raise InputError(f"logits of shape {logits.shape} have no tokens to choose from")
    t = _checked("temperature", temperature, logits)
    k = _checked("top_k", top_k, logits)
    p = _checked("top_p", top_p, logits)
    m = _checked("min_p", min_p, logits)
    rows = max(len(t), len(k))  # one of the two may be a single value
    stay = [1 if t[i % len(t)] == 0 else int(min(k[i % len(k)] or V, V)) for i in range(rows)]
    return ValidatedParams(
        temperature=_placed([max(x, _COLDEST) if x > 0 else 1.0 for x in t], logits, xp.float64),
        top_k=_placed(stay, logits, xp.int64),
        top_p=_placed([x if x < 1 else 2.0 for x in p], logits, xp.float64),
        min_p=_placed(m, logits, xp.float64),
        filtering=min(stay) < V or min(p) < 1 or max(m) > 0,
    )


def column(name: str, value: Parameter, logits: Array) -> Array | float:
    """A checked parameter in the logits' dtype: a Python number, or a column [B, 1]."""
    return _placed(_checked(name, value, logits), logits, logits.dtype)


def _checked(name: str, value: Parameter, logits: Array) -> list[float]:
    """The value or values of a parameter as a list; ValueError names one outside its range."""
    # NumPy's arrays and scalars
    values: Operand = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(values, (int, float, Real)):
        values = [values]
    elif logits.ndim != 2 or len(values) != logits.shape[0]:
        raise InputError(
            f"{name} is a list of {len(values)}: that needs logits[B, V] with B rows, "
            f"got {logits.shape}"
        )
    return [
        _check(name, x, where=f" in row {row}" if len(values) > 1 else "")
        for row, x in enumerate(values)
    ]


def _placed(values: Sequence[float], logits: Array, dtype: DType) -> Array | float:
    """One value as a Python number, several as a column [B, 1] beside the logits."""
    if len(values) == 1:
        return values[0]  # a Python number takes no transfer and decides no dtype
    return namespace(logits).asarray(values, dtype=dtype)[:, None]
