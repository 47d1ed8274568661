"""Uniform grids: which step s and zero point z a range of numbers gets, by seven rules and five granularities.

A number x is stored as a whole number q, and comes back as x̂ = s (q − z). With a = max |x|, lo = min(min x, 0),
hi = max(max x, 0) and L = 2^b − 1 (zero must stay representable, so a range always includes it):

| rule                   | s             | z                         | q within            | |x̂ − x| ≤ |
|------------------------|---------------|---------------------------|---------------------|------------|
| "restricted"           | a/(2^(b−1)−1) | 0                         | ±(2^(b−1)−1)        | s/2        |
| "half_integer"         | a/(L/2)       | 0                         | −2^(b−1) … 2^(b−1)−1 | s/2       |
| "half_integer_unsigned"| a/(L/2)       | 2^(b−1)                   | 0 … L               | s/2        |
| "power"                | a/2^(b−1)     | 0                         | −2^(b−1) … 2^(b−1)−1 | s, at +a  |
| "asymmetric"           | (hi − lo)/L   | clip(rint(−lo/s), 0, L)   | 0 … L               | s/2        |
| "asymmetric_signed"    | (hi − lo)/L   | rint(clip(qmin − lo/s))   | −2^(b−1) … 2^(b−1)−1 | s/2       |
| "awq"                  | (max − min)/L | clip(−rint(min/s), 0, L)  | 0 … L               | s/2 only if min ≤ 0 ≤ max |

Who does so: restricted: SmoothQuant, bitsandbytes, TensorRT; half_integer and asymmetric_signed:
compressed-tensors, llm-compressor, torch's qint8 observers; half_integer_unsigned and asymmetric: GPTQ's authors,
GPTQModel; power: textbooks; awq: llm-awq, which does not force zero into the range, so that a group far from zero
loses all of one side to clipping.

| granularity | one step for                    | shape of s and z      |
|-------------|---------------------------------|-----------------------|
| "tensor"    | everything                      | ()                    |
| "channel"   | a row of a weight W[M, N]       | (M, 1)                |
| "token"     | a row of activations x[T, N]    | (T, 1)                |
| "group"     | g neighbours of a row           | (M, N/g)              |
| "block"     | bo × bi neighbours              | (⌈M/bo⌉, ⌈N/bi⌉)      |

Left out: the signed-maximum form of "power" (Q4_0 and Q5_0 of GGUF), floating-point grids, codebooks, groups that
run over the end of a row (refused; only blocks may be ragged). What the formulas do with numbers is in ``ranges``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from refllm.backend import Array, namespace

__all__ = ["GRANULARITIES", "RULES", "Scheme", "as_blocks", "from_blocks", "steps_as_blocks"]

SYMMETRIC = ("restricted", "half_integer", "half_integer_unsigned", "power")
RULES = (*SYMMETRIC, "asymmetric", "asymmetric_signed", "awq")
GRANULARITIES = ("tensor", "channel", "token", "group", "block")
_UNSIGNED = ("half_integer_unsigned", "asymmetric", "awq")


@dataclass(frozen=True)
class Scheme:
    """Bits a code (1 to 8), rule and granularity; ``group_size`` is g for "group", (bo, bi) or one size for "block"."""

    bits: int
    rule: str
    granularity: str
    group_size: int | tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool | float) or self.bits not in range(1, 9):
            raise ValueError(f"Scheme: bits is a whole number in 1..8, got {self.bits!r}")
        if self.rule not in RULES:
            raise ValueError(f"Scheme: unknown rule {self.rule!r}; choose one of {', '.join(RULES)}")
        if self.rule == "restricted" and self.bits == 1:
            raise ValueError("Scheme: 'restricted' has the one code 0 at 1 bit; use 2 bits or another rule")
        if self.granularity not in GRANULARITIES:
            known = ", ".join(GRANULARITIES)
            raise ValueError(f"Scheme: unknown granularity {self.granularity!r}; choose one of {known}")
        sizes = self.group_size if isinstance(self.group_size, tuple) else (self.group_size,)
        if self.granularity not in ("group", "block"):
            if self.group_size is not None:
                raise ValueError(f"Scheme: granularity {self.granularity!r} takes no group_size")
        elif not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes) or (
            len(sizes) != 1 if self.granularity == "group" else len(sizes) > 2
        ):
            wanted = "a positive number" if self.granularity == "group" else "a positive number or a pair of them"
            raise ValueError(f"Scheme: granularity {self.granularity!r} takes {wanted}, got {self.group_size!r}")

    @property
    def signed(self) -> bool:
        """Whether codes lie on both sides of 0 (and are int8, not uint8)."""
        return self.rule not in _UNSIGNED

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is the same for all ranges, and need not be stored."""
        return self.rule in SYMMETRIC

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1)) + (self.rule == "restricted") if self.signed else 0

    @property
    def qmax(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def zero(self) -> int:
        """The zero point of a symmetric rule."""
        return 1 << (self.bits - 1) if self.rule == "half_integer_unsigned" else 0

    @property
    def offset(self) -> int:
        """What is added to a code for storage, so that it is not negative: 2^(b−1) for signed codes."""
        return 1 << (self.bits - 1) if self.signed else 0

    @property
    def steps(self) -> float:
        """The number that a symmetric range's a, or an asymmetric one's hi − lo, is divided by."""
        if not self.symmetric:
            return float((1 << self.bits) - 1)
        return {"restricted": float(self.qmax), "power": 0.5 * (1 << self.bits)}.get(
            self.rule, 0.5 * ((1 << self.bits) - 1)
        )

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scale of an array of this shape; ValueError where the scheme does not fit it."""
        if self.granularity == "tensor":
            return ()
        if not shape or (self.granularity == "block" and len(shape) != 2):
            raise ValueError(f"granularity {self.granularity!r} does not fit an array of shape {shape}")
        if self.granularity in ("channel", "token"):
            return (*shape[:-1], 1)
        if self.granularity == "block":
            rows, columns = self.block
            return -(-shape[0] // rows), -(-shape[1] // columns)
        (_, g), n = self.block, shape[-1]
        if n % g:
            divisors = [d for d in range(1, n + 1) if n % d == 0]
            below, above = max(d for d in divisors if d < g), min((d for d in divisors if d > g), default=n)
            near = f"{below} and {above}" if below != above else f"{below}"
            raise ValueError(
                f"groups of {g} do not divide a row of {n}: the nearest sizes that do are {near}, "
                f"or pad the row with zeros to {-(-n // g) * g}"
            )
        return (*shape[:-1], n // g)

    @property
    def block(self) -> tuple[int, int]:
        """(rows, columns) that share a step, for "group" and "block"."""
        if isinstance(self.group_size, tuple):
            return self.group_size
        assert self.group_size is not None, "only groups and blocks have a size"
        return (1 if self.granularity == "group" else self.group_size), self.group_size


# --- arrays as blocks -----------------------------------------------------------------------------------------------


def as_blocks(x: Array, scheme: Scheme) -> Array:
    """x as [row blocks, rows, column blocks, columns]: what shares a step lies on axes 1 and 3.

    A view, except of ragged blocks: they are filled up with copies of their last row and column, which change no
    range.
    """
    xp = namespace(x)
    if scheme.granularity == "tensor":
        return xp.reshape(x, (1, 1, 1, x.size))
    lead, n = math.prod(x.shape[:-1]), int(x.shape[-1])
    if scheme.granularity in ("channel", "token"):
        return xp.reshape(x, (lead, 1, 1, n))
    rows, columns = scheme.block
    if scheme.granularity == "group":
        return xp.reshape(x, (lead, 1, n // columns, columns))
    down, right = scheme.scale_shape(tuple(x.shape))
    rows, columns = min(rows, lead), min(columns, n)  # a block that is larger than all there is needs no filling
    x = xp.concat([x] + [x[-1:, :]] * (down * rows - lead), axis=0)
    x = xp.concat([x] + [x[:, -1:]] * (right * columns - n), axis=1)
    return xp.reshape(x, (down, rows, right, columns))


def from_blocks(blocks: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of ``as_blocks``."""
    xp = namespace(blocks)
    if blocks.size == math.prod(shape):
        return xp.reshape(blocks, shape)
    down, rows, right, columns = blocks.shape
    return xp.reshape(blocks, (down * rows, right * columns))[: shape[0], : shape[1]]


def steps_as_blocks(scale: Array, scheme: Scheme, shape: tuple[int, ...]) -> Array:
    """A scale or zero point of an array of ``shape``, ready to be multiplied with its ``as_blocks``."""
    if tuple(scale.shape) != scheme.scale_shape(shape):
        raise ValueError(
            f"scale or zero point of shape {tuple(scale.shape)}: an array of shape {shape} takes "
            f"{scheme.scale_shape(shape)} at granularity {scheme.granularity!r}"
        )
    xp = namespace(scale)
    if scheme.granularity == "block":
        return xp.reshape(scale, (scale.shape[0], 1, scale.shape[1], 1))
    columns = scale.shape[-1] if scheme.granularity == "group" else 1
    return xp.reshape(scale, (math.prod(scale.shape[:-1]), 1, columns, 1))
