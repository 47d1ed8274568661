"""KIVI: keys quantised per channel, values per token, and a full-precision residual window
of the newest tokens.

Source: Liu et al. 2024 (arXiv:2402.02750), section 3 and algorithm 1, and the code that
they published with it.

A few channels of the keys are large in every token, so a scale that channels share is far
too wide for the others: keys share a scale among g consecutive *tokens* of one channel,
after RoPE. Values have no such channels, and a value is read as a whole, weighted by one
probability: they share a scale among g channels of one *token*. With b bits

    s = (max − min) / (2^b − 1),   q = rint((x − min) / s) in 0 … 2^b − 1,   x̂ = q s + min,
    |x̂ − x| ≤ s / 2,

up to rounding: in float16 and 8 bits, the rounding of min alone may exceed s. A group of
keys is complete only after g tokens, so the newest tokens stay in full precision. With S
cached tokens:

|        | quantised                        | in the residual window             |
|--------|----------------------------------|------------------------------------|
| keys   | [0, ⌊S/R⌋ R): R tokens at a time | [⌊S/R⌋ R, S): 0 … R − 1 of them    |
| values | [0, S − R): one token at a time  | [S − R, S): the last R, exactly    |

The queries of a step read the tokens of that step in full precision: a prompt that is
computed in one step attends to itself in full precision, as in the paper. Given K and V, the
contents of the cache are thus a function of S alone, however the sequence was cut into
steps; keys are quantised once and never again. What a query reads does depend on where its
step began, and so do the keys and values of the layers above.

| symbol | name                                 | shape               |
|--------|--------------------------------------|---------------------|
| K, V   | keys after RoPE, values              | [S, G, D]           |
| q      | codes                                | that of the values  |
| s, min | scale and minimum of a group         | [..., n / g]        |
| R      | ``residual``                         | a multiple of g     |

The cache that holds the codes is ``kivi_cache``; ``kivi_attend`` computes a whole sequence
as if it were decoded token by token.

Left out: KVQuant's keys before RoPE, its non-uniform levels and its sparse outliers; scales
of fewer bits than the values they multiply; clipping of extremes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from refllm.backend import Array, DType, namespace
from refllm.errors import InputError
from refllm.formats.packing import words_per_row
from refllm.kv.interface import CacheUsage
from refllm.model.config import ModelConfig

if TYPE_CHECKING:
    from refllm.kv.kivi_cache import KiviCache


@dataclass(frozen=True)
class Kivi:
    """Bits of keys and values, group size, and length of the residual window. The defaults
    are the paper's 2-bit setting.

    Raises
    ------
    ValueError
        for bits outside 1..8, and for a residual that is no multiple of the group or whose
        keys fill no whole words.

    Examples
    --------
    >>> kivi = Kivi(key_bits=2, value_bits=2, group=32, residual=128)
    >>> kivi.quantized_keys(300), kivi.quantized_values(300)
    (256, 172)
    >>> kivi.bits_per_value()  # codes, and a scale and a minimum of 16 bits per group
    3.0
    """

    key_bits: int = 2
    value_bits: int = 2
    group: int = 32
    residual: int = 128
    trees: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            object.__setattr__(self, name, checked_int(f"Kivi: {name}", value, 1))
        if max(self.key_bits, self.value_bits) > 8:
            raise InputError(
                f"Kivi: codes have 1 to 8 bits, got {self.key_bits} and {self.value_bits}"
            )
        # R keys of a channel must fill whole groups and whole 32-bit words
        unit = math.lcm(self.group, 32 // math.gcd(32, self.key_bits))
        near = unit * max(1, round(self.residual / unit))
        if self.residual % self.group:
            raise InputError(
                f"Kivi: residual {self.residual} is no multiple of group {self.group}; take {near}"
            )
        if self.residual % unit:
            raise InputError(
                f"Kivi: {self.residual} keys of {self.key_bits} bits fill no whole 32-bit words; "
                f"take residual {near}"
            )

    def check(self, head_dim: int) -> None:
        """ValueError if the group does not divide a head's channels."""
        if head_dim % self.group:
            fits = max(g for g in range(1, min(self.group, head_dim) + 1) if not head_dim % g)
            raise InputError(
                f"Kivi: a head of {head_dim} channels does not divide into groups of "
                f"{self.group}; {fits} would fit"
            )

    def quantized_keys(self, tokens: int) -> int:
        """How many keys, from the first on, are quantised if ``tokens`` are cached."""
        return tokens // self.residual * self.residual

    def quantized_values(self, tokens: int) -> int:
        """How many values, from the first on, are quantised if ``tokens`` are cached."""
        return max(0, tokens - self.residual)

    def bits_per_value(self, *, full: int = 16) -> float:
        """Bits per quantised key or value, with a scale and a minimum of ``full`` bits per
        group.
        """
        return (self.key_bits + self.value_bits) / 2 + 2 * full / self.group

    def nbytes(self, config: ModelConfig, tokens: int, *, full: int = 16) -> int:
        """Bytes of one sequence of ``tokens``: codes, and scales, minima and the residual
        window in ``full`` bits per value.
        """
        k = self.quantized_keys(tokens)
        v = self.quantized_values(tokens)
        dim = config.head_dim
        words = dim * (k * self.key_bits // 32) + v * words_per_row(dim, self.value_bits)
        scales = 2 * (k + v) * dim // self.group
        residual = (2 * tokens - k - v) * dim
        per_head = 4 * words + full // 8 * (scales + residual)
        return config.num_hidden_layers * config.num_key_value_heads * per_head

    def usage(self, config: ModelConfig, prompt: int, new: int) -> CacheUsage:
        """See ``CachePolicy.usage``."""
        tokens = prompt + new
        if self.quantized_keys(tokens) == 0:  # fewer than R tokens, so no value is either
            window = f"the full-precision window of {self.residual}"
            return CacheUsage(None, f"nothing quantised: {tokens} tokens fit into {window}")
        newest = f"the newest tokens, at most {self.residual}"
        kept = f"in {self.key_bits}-bit codes except for {newest}"
        return CacheUsage(self.nbytes(config, tokens, full=32), kept)

    def new_cache(
        self,
        config: ModelConfig,
        sequences: int,
        capacity: int,
        *,
        like: Array,
        rng: np.random.Generator | None = None,
    ) -> KiviCache:
        """See ``CachePolicy.new_cache``; ``rng`` is not used."""
        from refllm.kv.kivi_cache import KiviCache  # which imports this module

        return KiviCache(config, sequences, capacity, like=like, kivi=self)


def checked_int(what: str, value: object, least: int) -> int:
    """``value`` as a Python int; ValueError naming ``what`` if it is no integer, or below
    ``least``.
    """
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= least:
        return int(value)
    raise InputError(f"{what} is an integer, {least} or more, got {value!r}")


# --- quantising groups --------------------------------------------------------------------


def quantize(
    x: Array, bits: int, group: int, dtype: DType | None = None
) -> tuple[Array, Array, Array]:
    """x[..., n] → codes uint8[..., n], s[..., n/g] and min[..., n/g], in ``dtype`` (that of x).

    Codes are computed with s and min as they are stored, so that a ``dtype`` of fewer bits
    costs no more than its own rounding. A group of equal values has s = 1 and is restored
    exactly (the published code divides 0 by 0 there). So has a group whose scale underflows
    in ``dtype``. The range of a group, max − min, must be finite.

    ValueError if n is no multiple of the group.

    >>> codes, scale, low = quantize(np.array([0.0, 1.0, 2.0, 6.0]), bits=2, group=4)
    >>> codes.tolist(), scale.tolist(), low.tolist()
    ([0, 0, 1, 3], [2.0], [0.0])
    """
    xp = namespace(x)
    if x.shape[-1] % group:
        raise InputError(f"quantize: rows of {x.shape[-1]} do not divide into groups of {group}")
    grouped = xp.reshape(x, (*x.shape[:-1], x.shape[-1] // group, group))  # [..., n/g, g]
    low = xp.min(grouped, axis=-1, keepdims=True)  # [..., n/g, 1]
    most = (1 << bits) - 1
    scale = (xp.max(grouped, axis=-1, keepdims=True) - low) / most
    # rounded as they are stored, before the codes are computed with them
    low = xp.astype(low, dtype or x.dtype)
    scale = xp.astype(scale, dtype or x.dtype)
    scale = xp.where(scale > 0, scale, xp.ones_like(scale))
    codes = xp.clip(xp.rint((grouped - low) / scale), 0, most)
    return xp.reshape(xp.astype(codes, xp.uint8), x.shape), scale[..., 0], low[..., 0]


def dequantize(codes: Array, scale: Array, low: Array, dtype: DType | None = None) -> Array:
    """x̂ = q s + min, [..., n], computed in ``dtype`` (that of s).

    >>> codes = np.array([0, 0, 1, 3], dtype=np.uint8)
    >>> dequantize(codes, np.array([2.0]), np.array([0.0])).tolist()
    [0.0, 0.0, 2.0, 6.0]
    """
    xp = namespace(codes, scale, low)
    groups = int(scale.shape[-1])
    width = int(codes.shape[-1]) // groups if groups else 1  # an empty cache has no groups
    grouped = xp.astype(xp.reshape(codes, (*scale.shape, width)), dtype or scale.dtype)
    grouped *= scale[..., None]
    grouped += low[..., None]
    return xp.reshape(grouped, codes.shape)
