"""KIVI: keys in few bits by channel, values in few bits by token, and the newest of both as
they came.

Source: Liu et al. 2024 (arXiv:2402.02750), section 3 and algorithm 1, and the code that
they published with it.

A few channels of the keys are large in every token, so a step that channels share is far
too wide for the others: keys share a step among g consecutive *tokens* of one channel,
after RoPE. Values have no such channels, and a value is read as a whole, weighted by one
probability: they share a step among g channels of one *token*. With b bits

    s = (max − min) / (2^b − 1),   q = rint((x − min) / s) in 0 … 2^b − 1,   x̂ = q s + min,
    |x̂ − x| ≤ s / 2,

up to rounding: in float16 and 8 bits, that of min alone may be more than a step. A group of
keys is complete only after g tokens, so the newest tokens wait in full precision. With s
cached tokens

| of s tokens | are quantised                    | wait as they came                 |
|-------------|----------------------------------|-----------------------------------|
| keys        | [0, ⌊s/R⌋ R): R tokens at a time | [⌊s/R⌋ R, s): 0 … R − 1 of them   |
| values      | [0, s − R): one token at a time  | [s − R, s): the last R, exactly   |

and the tokens of a step are read as they came by the queries of that step: a prompt that is
one step reads itself in full, as in the paper. Given K and V, what is in the cache is thus
a function of s alone, however the text was cut into steps; keys are quantised once and
never again. What a query reads depends on where its step began, and with it the keys and
values of the layers above.

| symbol | name                                  | shape              |
|--------|---------------------------------------|--------------------|
| K, V   | keys after RoPE, values               | [S, G, D]          |
| q      | codes                                 | as what they stand for |
| s, min | step and least number of a group      | [..., n / g]       |
| R      | ``residual``                          | a multiple of g    |

The cache that holds the codes is ``kivi_cache``; ``KiviAttend`` reads a whole text as it
would be read token by token.

Left out: KVQuant's keys before RoPE, its levels that are not uniform and its sparse
outliers; steps that are kept in fewer bits than what they multiply; cutting off extremes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from refllm.backend import Array, namespace
from refllm.formats.packing import words_per_row
from refllm.model.attention import causal_bias
from refllm.model.config import ModelConfig

__all__ = ["Kivi", "KiviAttend", "attend_as_decoded", "decode", "encode"]

QUERIES = 128  # at a time, in ``attend_as_decoded``


@dataclass(frozen=True)
class Kivi:
    """How many bits, how many numbers a step, how many tokens wait. The defaults are the
    paper's 2-bit setting.

    Raises
    ------
    ValueError
        for bits outside 1..8, and for a residual that is no multiple of the group or whose
        keys fill no whole words.
    """

    key_bits: int = 2
    value_bits: int = 2
    group: int = 32
    residual: int = 128

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            object.__setattr__(self, name, whole_number(f"Kivi: {name}", value, 1))
        if max(self.key_bits, self.value_bits) > 8:
            raise ValueError(
                f"Kivi: codes have 1 to 8 bits, got {self.key_bits} and {self.value_bits}"
            )
        unit = math.lcm(self.group, 32 // math.gcd(32, self.key_bits))
        near = unit * max(1, round(self.residual / unit))
        if self.residual % self.group:
            raise ValueError(
                f"Kivi: residual {self.residual} is no multiple of group {self.group}; take {near}"
            )
        if self.residual % unit:
            raise ValueError(
                f"Kivi: {self.residual} keys of {self.key_bits} bits fill no whole 32-bit words; take residual {near}"
            )

    def check(self, head_dim: int) -> None:
        """ValueError if groups of channels do not divide a value."""
        if head_dim % self.group:
            fits = max(g for g in range(1, min(self.group, head_dim) + 1) if not head_dim % g)
            raise ValueError(
                f"Kivi: a head of {head_dim} channels does not divide into groups of {self.group}; {fits} would fit"
            )

    def quantised_keys(self, tokens: int) -> int:
        """Of ``tokens`` cached ones, the first so many keys are codes."""
        return tokens // self.residual * self.residual

    def quantised_values(self, tokens: int) -> int:
        """Of ``tokens`` cached ones, the first so many values are codes."""
        return max(0, tokens - self.residual)

    def bits_per_number(self, *, full: int = 16) -> float:
        """Of what is quantised, keys and values together, a step and a minimum of ``full``
        bits a group included.
        """
        return (self.key_bits + self.value_bits) / 2 + 2 * full / self.group

    def nbytes(self, config: ModelConfig, tokens: int, *, full: int = 16) -> int:
        """Bytes of one sequence of ``tokens``: codes, steps and minima, and what waits, in
        ``full`` bits a number.
        """
        k = self.quantised_keys(tokens)
        v = self.quantised_values(tokens)
        dim = config.head_dim
        words = dim * (k * self.key_bits // 32) + v * words_per_row(dim, self.value_bits)
        numbers = 2 * (k + v) * dim // self.group + (2 * tokens - k - v) * dim
        return (
            config.num_hidden_layers
            * config.num_key_value_heads
            * (4 * words + full // 8 * numbers)
        )


def whole_number(what: str, value: Any, least: int) -> int:
    """``value`` as a Python int; ValueError naming ``what`` if it is none, or below
    ``least``.
    """
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= least:
        return int(value)
    raise ValueError(f"{what} is a whole number, {least} or more, got {value!r}")


# --- numbers ------------------------------------------------------------------------------


def encode(x: Array, bits: int, group: int, dtype: Any = None) -> tuple[Array, Array, Array]:
    """x[..., n] → codes uint8[..., n], s[..., n/g] and min[..., n/g], in ``dtype`` (that of
    x).

    Codes are made with s and min as they are stored, so that a ``dtype`` of fewer bits
    costs no more than its own rounding. A group of equal numbers has s = 1: it comes back
    exactly (the published code divides 0 by 0 there). So has a group whose step is too
    small for ``dtype``. The range of a group, max − min, must be finite.

    ValueError if n is no multiple of the group.
    """
    xp = namespace(x)
    if x.shape[-1] % group:
        raise ValueError(f"encode: rows of {x.shape[-1]} do not divide into groups of {group}")
    grouped = xp.reshape(x, (*x.shape[:-1], x.shape[-1] // group, group))
    low = xp.min(grouped, axis=-1, keepdims=True)
    most = (1 << bits) - 1
    step = (xp.max(grouped, axis=-1, keepdims=True) - low) / most
    low, step = (xp.astype(a, dtype or x.dtype) for a in (low, step))
    step = xp.where(step > 0, step, xp.ones_like(step))
    codes = xp.clip(xp.rint((grouped - low) / step), 0, most)
    return xp.reshape(xp.astype(codes, xp.uint8), x.shape), step[..., 0], low[..., 0]


def decode(codes: Array, step: Array, low: Array, dtype: Any = None) -> Array:
    """x̂ = q s + min, [..., n], computed in ``dtype`` (that of s)."""
    xp = namespace(codes, step, low)
    groups = int(step.shape[-1])
    width = int(codes.shape[-1]) // groups if groups else 1  # an empty cache has no groups
    grouped = xp.astype(xp.reshape(codes, (*step.shape, width)), dtype or step.dtype)
    grouped *= step[..., None]
    grouped += low[..., None]
    return xp.reshape(grouped, codes.shape)


# --- a whole text, read as token by token -------------------------------------------------


class KiviAttend:
    """``attend`` over whole texts, each query reading what a cache would hold when its
    token comes.

    ``lengths`` as of ``CausalAttend``; with it ``measure.perplexity`` measures what a cache
    costs, without a cache. ``keys`` and ``values`` say what shares a step: "channel", g
    tokens of a channel, or "token", g channels of a token. KIVI's choice is the default;
    the other ones are what it is compared with. As many keys wait either way; values by
    channel wait for whole runs of R, as keys do, half as many on average as values by
    token.
    """

    def __init__(
        self,
        lengths: list[int],
        kivi: Kivi,
        window: int | None = None,
        *,
        keys: str = "channel",
        values: str = "token",
    ):
        for name, value in (("keys", keys), ("values", values)):
            if value not in ("channel", "token"):
                raise ValueError(
                    f"KiviAttend: {name} share a step by 'channel' or by 'token', got {value!r}"
                )
        self.lengths = lengths
        self.kivi = kivi
        self.how: dict[str, Any] = {"window": window, "keys": keys, "values": values}

    def __call__(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        outputs = []
        at = 0
        for length in self.lengths:
            rows = slice(at, at + length)
            outputs.append(
                attend_as_decoded(q[rows, ...], k[rows, ...], v[rows, ...], self.kivi, **self.how)
            )
            at += length
        if at != q.shape[0]:
            raise ValueError(f"KiviAttend: lengths sum to {at}, the batch has {q.shape[0]} tokens")
        return namespace(q).concat(outputs, axis=0)


def attend_as_decoded(
    q: Array,
    k: Array,
    v: Array,
    kivi: Kivi,
    *,
    window: int | None = None,
    keys: str = "channel",
    values: str = "token",
) -> Array:
    """q[T, H, D] over k, v[T, G, D]: query t reads ``quantised_keys(t)`` keys as codes, and
    of values likewise.
    """
    xp = namespace(q, k, v)
    total, heads, dim = q.shape
    groups = k.shape[1]
    kivi.check(dim)
    if values == "token":
        coded = kivi.quantised_values
    else:
        coded = kivi.quantised_keys
    # [G, D, S]
    k_hat = xp.permute_dims(_there_and_back(k, kivi.key_bits, kivi.group, keys), (1, 2, 0))
    # [G, S, D]
    v_hat = xp.permute_dims(_there_and_back(v, kivi.value_bits, kivi.group, values), (1, 0, 2))
    k = xp.permute_dims(k, (1, 2, 0))
    v = xp.permute_dims(v, (1, 0, 2))
    j = xp.arange(total)
    outputs = []
    for first in range(0, total, QUERIES):
        count = min(QUERIES, total - first)
        rows = xp.reshape(q[first : first + count, ...], (count, groups, heads // groups, dim))
        rows = xp.permute_dims(rows, (1, 2, 0, 3)) * (1.0 / math.sqrt(dim))  # [G, R, T, D]
        of_keys, of_values = (
            j < xp.asarray([boundary(t) for t in range(first, first + count)])[:, None]
            for boundary in (kivi.quantised_keys, coded)
        )
        scores = xp.where(of_keys, rows @ k_hat[:, None], rows @ k[:, None])  # [G, R, T, S]
        bias = causal_bias(xp, count, total, first, window, q.dtype)
        if bias is not None:
            scores += bias
        p = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
        p /= xp.sum(p, axis=-1, keepdims=True)
        nothing = xp.zeros_like(p)
        o = (
            xp.where(of_values, p, nothing) @ v_hat[:, None]
            + xp.where(of_values, nothing, p) @ v[:, None]
        )
        outputs.append(xp.reshape(xp.permute_dims(o, (2, 0, 1, 3)), (count, heads, dim)))
    if outputs:
        return xp.concat(outputs, axis=0)
    return xp.zeros_like(q)


def _there_and_back(x: Array, bits: int, group: int, by: str) -> Array:
    """x̂[S, G, D] of all complete groups; by channel, the tokens after the last complete
    one stay as they are.
    """
    xp = namespace(x)
    if by == "token":
        return decode(*encode(x, bits, group))
    whole = x.shape[0] // group * group
    columns = xp.permute_dims(x[:whole, ...], (1, 2, 0))  # [G, D, S]
    if not whole:
        return x
    return xp.concat(
        [xp.permute_dims(decode(*encode(columns, bits, group)), (2, 0, 1)), x[whole:, ...]], axis=0
    )
