"""Sampling parameters, checked on the host and placed beside the logits.

A parameter is one number for all rows, or a list with one for each row of logits[B, V]: a
batch of requests with their own settings. Off and greedy are rewritten here as numbers that
need no case of their own later:

| given           | used                                                                             |
|-----------------|----------------------------------------------------------------------------------|
| temperature 0   | top_k 1 at temperature 1: one token stays, the lowest id of the largest          |
| top_k 0         | V                                                                                |
| top_p 1         | 2, a share that no prefix reaches (the mass of a prefix may *round* to all of it) |
| min_p 0         | 0: every weight is at least that                                                 |

Left out: device arrays as parameters. They are settings, and live on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from refllm.backend import Array, namespace

Parameter = float | Sequence[float]  # a number, or a list or NumPy array of B

# below it even neighbouring float32 logits are infinitely far apart; and 1/τ stays finite
_COLDEST = 1e-200


class Knobs(NamedTuple):
    """The parameters of ``warp`` as it computes with them: Python numbers, or columns [B,
    1].
    """

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    filtering: bool  # can any row lose a token?


def knobs(
    logits: Array, temperature: Parameter, top_k: Parameter, top_p: Parameter, min_p: Parameter
) -> Knobs:
    """Check the parameters for logits[..., V] and rewrite them as the table above says.

    ValueError names the parameter, its range and the row; or says that the logits have no
    tokens.
    """
    xp = namespace(logits)
    V = logits.shape[-1] if logits.ndim else 0
    if V == 0:
        raise ValueError(f"logits of shape {logits.shape} have no tokens to choose from")
    t = _numbers(
        "temperature",
        temperature,
        logits,
        lambda x: 0 <= x < math.inf,
        "0 (greedy) or finite and above",
    )
    k = _numbers(
        "top_k", top_k, logits, lambda x: 0 <= x == x // 1, "0 (off) or a whole number above"
    )
    p = _numbers("top_p", top_p, logits, lambda x: 0 < x <= 1, "within (0, 1]")
    m = _numbers("min_p", min_p, logits, lambda x: 0 <= x <= 1, "within [0, 1]")
    rows = max(len(t), len(k))  # one of the two may be a single number
    stay = [1 if t[i % len(t)] == 0 else int(min(k[i % len(k)] or V, V)) for i in range(rows)]
    return Knobs(
        temperature=_placed([max(x, _COLDEST) if x > 0 else 1.0 for x in t], logits, xp.float64),
        top_k=_placed(stay, logits, xp.int64),
        top_p=_placed([x if x < 1 else 2.0 for x in p], logits, xp.float64),
        min_p=_placed(m, logits, xp.float64),
        filtering=min(stay) < V or min(p) < 1 or max(m) > 0,
    )


def column(
    name: str, value: Parameter, logits: Array, allowed: Callable[[float], bool], rule: str
) -> Array:
    """A checked parameter in the logits' dtype: a Python number, or a column [B, 1]."""
    return _placed(_numbers(name, value, logits, allowed, rule), logits, logits.dtype)


def _numbers(
    name: str, value: Parameter, logits: Array, allowed: Callable[[float], bool], rule: str
) -> list[float]:
    # NumPy's arrays and scalars
    numbers: Any = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(numbers, (int, float)):
        numbers = [numbers]
    elif logits.ndim != 2 or len(numbers) != logits.shape[0]:
        raise ValueError(
            f"{name} is a list of {len(numbers)}: that needs logits[B, V] with B rows, got {logits.shape}"
        )
    for row, x in enumerate(numbers):
        if not allowed(x):
            raise ValueError(
                f"{name} must be {rule}, got {x}" + (f" in row {row}" if len(numbers) > 1 else "")
            )
    return list(numbers)


def _placed(numbers: Sequence[float], logits: Array, dtype: Any) -> Array:
    if len(numbers) == 1:
        return numbers[0]  # a Python number takes no transfer and decides no dtype
    return namespace(logits).asarray(numbers, dtype=dtype)[:, None]
