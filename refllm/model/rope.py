"""RoPE's frequencies, and the scalings that stretch them beyond the context of training.

Pair i of a head of width D turns by θ_i = base^(−2i/D) radians per position. A scaling by the
factor s makes position s·p look like position p did in training:

| scaling | frequency of pair i                                        | cos and sin times |
|---------|------------------------------------------------------------|-------------------|
| linear  | θ_i / s: every pair turns s times slower                   | 1                 |
| llama3  | θ_i / s below ``low_freq_factor`` turns, θ_i above         | 1                 |
|         | ``high_freq_factor``, interpolated by the turns between    |                   |
| yarn    | the same idea, interpolated by the index of the pair       | 0.1 · ln s + 1    |

"Turns" are those within L, the context of training: r_i = L · θ_i / 2π. A pair that turned
many times has shown the network every angle and keeps its frequency (extrapolation); one
that did not turn once knows absolute positions and must be slowed (interpolation).

| symbol   | name                             |
|----------|----------------------------------|
| s        | factor                           |
| L        | original_max_position_embeddings |
| α, β     | beta_slow, beta_fast             |
| γ        | share of extrapolation           |
| √(1/t)   | attention_factor                 |

Sources: linear, Chen et al. 2023; YaRN, Peng et al. 2023 (arXiv 2309.00071), §3.2 and §3.4;
Llama 3.1's model code. YaRN's paper ramps γ over the turns r between α and β; its authors'
code ramps over the index i between the pairs that make β and α turns, and so do transformers
and llama.cpp. Checkpoints were trained with the code: this is the code's ramp.

Left out: scalings that depend on the length of the text (dynamic, longrope), sections for
several axes (mrope), rotation of a part of the head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from refllm.errors import UnsupportedModel

__all__ = [
    "LinearScaling",
    "Llama3Scaling",
    "RopeScaling",
    "YarnScaling",
    "rope_frequencies",
    "yarn_attention_factor",
    "yarn_frequencies",
    "yarn_range",
]


def _require_positive(kind: str, **values: float) -> None:
    """UnsupportedModel unless each value is positive and finite."""
    for name, value in values.items():
        if not 0 < value < math.inf:  # nor is NaN
            raise UnsupportedModel(
                f"config: {kind} RoPE scaling needs positive factors, and {name} is {value!r}"
            )


@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation: every frequency divided by ``factor``.

    GGUF files can also scale cos and sin by an ``attention_factor``.
    """

    factor: float
    attention_factor: float = 1.0

    def __post_init__(self) -> None:
        _require_positive("linear", factor=self.factor, attention_factor=self.attention_factor)


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3's scaling: long wavelengths are stretched, short ones kept. UnsupportedModel for
    factors that make no sense.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        sizes = (self.factor, self.low_freq_factor, self.original_max_position_embeddings)
        # high > low: the band between them is divided by their difference
        if not (min(sizes) > 0 and self.low_freq_factor < self.high_freq_factor < math.inf):
            raise UnsupportedModel(
                f"config: llama3 RoPE scaling needs positive factors and low < high, got {self}"
            )
        _require_positive("llama3", factor=self.factor)

    @property
    def attention_factor(self) -> float:
        """1: cos and sin are not scaled."""
        return 1.0


@dataclass(frozen=True)
class YarnScaling:
    """YaRN: the frequencies of ``yarn_frequencies``, cos and sin times ``attention_factor``
    (``yarn_attention_factor`` is what files that state none mean).
    """

    factor: float  # s
    original_max_position_embeddings: int  # L
    attention_factor: float  # √(1/t)
    beta_fast: float = 32.0  # β: pairs with more turns keep their frequency
    beta_slow: float = 1.0  # α: pairs with fewer turns are slowed by the whole factor
    truncate: bool = True  # whether the ends of the ramp are rounded to whole pairs

    def __post_init__(self) -> None:
        _require_positive(
            "yarn",
            factor=self.factor,
            original_max_position_embeddings=self.original_max_position_embeddings,
            attention_factor=self.attention_factor,
            beta_fast=self.beta_fast,
            beta_slow=self.beta_slow,
        )
        if self.beta_fast <= self.beta_slow:
            raise UnsupportedModel(
                f"config: yarn RoPE scaling needs beta_fast above beta_slow, got "
                f"{self.beta_fast!r} and {self.beta_slow!r}"
            )


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling


def rope_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> list[float]:
    """The D/2 angular frequencies, radians per position, as Python floats (float64).

    Raises
    ------
    UnsupportedModel
        for a YaRN whose ramp is empty (``yarn_range``).

    >>> rope_frequencies(4, 100.0)
    [1.0, 0.1]
    >>> rope_frequencies(4, 100.0, LinearScaling(4.0))
    [0.25, 0.025]
    """
    plain = [theta ** (-2.0 * i / head_dim) for i in range(head_dim // 2)]
    if scaling is None:
        return plain
    if isinstance(scaling, LinearScaling):
        return [f / scaling.factor for f in plain]
    if isinstance(scaling, YarnScaling):
        return yarn_frequencies(plain, theta, scaling)
    return [_llama3(f, scaling) for f in plain]


def yarn_frequencies(plain: list[float], theta: float, s: YarnScaling) -> list[float]:
    """YaRN's frequencies from the plain ones: (1 − γ_i) θ_i/s + γ_i θ_i (§3.2, "NTK-by-parts").

    γ falls from 1 to 0 linearly over the pairs of ``yarn_range``.
    """
    low, high = yarn_range(2 * len(plain), theta, s)
    scaled = []
    for i, frequency in enumerate(plain):
        ramp = (i - low) / (high - low or 0.001)  # one pair wide at least, or 0/0 at i = low
        gamma = 1.0 - min(max(ramp, 0.0), 1.0)
        scaled.append((1.0 - gamma) * frequency / s.factor + gamma * frequency)
    return scaled


def yarn_range(head_dim: int, theta: float, s: YarnScaling) -> tuple[float, float]:
    """The indices of the pairs between which YaRN interpolates: pair i makes
    r_i = L θ_i / 2π turns, so r_i = β at i = D ln(L / 2πβ) / (2 ln base).

    Raises
    ------
    UnsupportedModel
        if no pair lies between, as for a context that is shorter than one turn.

    >>> yarn_range(128, 10_000.0, YarnScaling(4.0, 4096, 1.0))
    (20, 46)
    """

    def pair(turns: float) -> float:
        length = s.original_max_position_embeddings / (2 * math.pi * turns)
        return head_dim * math.log(length) / (2 * math.log(theta))

    if theta <= 1:
        raise UnsupportedModel(f"config: yarn RoPE scaling needs a rope_theta above 1, got {theta}")
    low = pair(s.beta_fast)
    high = pair(s.beta_slow)
    if s.truncate:
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, head_dim - 1)
    if low > high:
        raise UnsupportedModel(
            f"config: yarn RoPE scaling has no pairs between beta_fast {s.beta_fast!r} and "
            f"beta_slow {s.beta_slow!r} turns in {s.original_max_position_embeddings} positions"
        )
    return low, high


def yarn_attention_factor(
    factor: float, mscale: float | None = None, mscale_all_dim: float | None = None
) -> float:
    """√(1/t) = 0.1 ln s + 1 (§3.4), by which cos and sin, and so q and k, are multiplied; 1
    for a factor of at most 1.

    With both ``mscale`` m and ``mscale_all_dim`` a (DeepSeek's options; 0 is none) it is
    (0.1 m ln s + 1) / (0.1 a ln s + 1).

    >>> round(yarn_attention_factor(4.0), 4), yarn_attention_factor(4.0, 0.7, 0.7)
    (1.1386, 1.0)
    """
    if factor <= 1:
        return 1.0
    if not mscale or not mscale_all_dim:
        return 0.1 * math.log(factor) + 1.0
    below = 0.1 * mscale_all_dim * math.log(factor) + 1.0
    return (0.1 * mscale * math.log(factor) + 1.0) / below if below else math.nan


def _llama3(frequency: float, s: Llama3Scaling) -> float:
    """One frequency under Llama 3's scaling."""
    # turns within the context that the model was first trained on
    turns = s.original_max_position_embeddings * frequency / (2 * math.pi)
    if turns < s.low_freq_factor:
        return frequency / s.factor
    if turns > s.high_freq_factor:
        return frequency
    smooth = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    return (1 - smooth) * frequency / s.factor + smooth * frequency
