"""LLM.int8(): 8-bit products with the outlier columns of the activations in floating point;
and statistics of where outliers are.

Source: Dettmers et al. 2022 (LLM.int8()), §2.1 (vector-wise quantisation), §3.1
(decomposition), §4 (what counts as an outlier); and bitsandbytes 0.50, which differs from
the paper in the ways listed below.

A column of x is an outlier column if the magnitude of any of its values is at least θ = 6.
These columns O are multiplied in floating point, all others in 8-bit integers with one scale
per row of x and one per row of W:

    Y = X_O W_Oᵀ + (c_x c_wᵀ / 127²) · rint(127 X'/c_x) rint(127 W/c_w)ᵀ

|                      | ``rule="paper"``              | ``rule="bitsandbytes"`` (default)     |
|----------------------|-------------------------------|---------------------------------------|
| W_O                  | the original weight           | 8-bit weight, dequantised             |
| X', which c_x covers | x without the outlier columns | x without the outlier *values*: small |
|                      |                               | ones in outlier columns still count   |
| memory               | codes and the original weight | codes                                 |

The outlier columns are found in each call, from all rows together: the result for a token
depends on the other tokens of the batch.

| symbol   | name                                | shape                  |
|----------|-------------------------------------|------------------------|
| X, W, Y  | activations, weight, product        | [T, N], [M, N], [T, M] |
| c_x, c_w | absmax of the rows of X' and of W   | [T, 1], [M, 1]         |
| θ        | threshold; ∞ or 0: no decomposition |                        |

Left out: bitsandbytes' arithmetic in float16 (here it is the dtype of x, at least float32),
its constant 6.200124e-05 for 1/127² (0.0018 % too large), training; and what it does by
default on a CPU: x times the dequantised weight, without quantising x at all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from refllm.backend import Array, DType, namespace, to_numpy
from refllm.errors import InputError
from refllm.formats.int_matmul import integer_matmul
from refllm.formats.uniform import Scheme, require_finite
from refllm.quant.layer_inputs import LayerRun
from refllm.quant.methods import Method, QuantizedProjection, QuantizeWeight

RULES = ("bitsandbytes", "paper")


class OutlierStatistics:
    """Observes x[T, N] batch by batch: the absmax of each input channel, and in how many
    tokens it reaches ``threshold``.

    The paper calls a channel an outlier if it reaches 6 in at least 6 % of the tokens (and
    in a quarter of the layers, which the caller has to count).
    """

    def __init__(self, threshold: float = 6.0, *, name: str = "x"):
        self.threshold = threshold
        self.name = name
        self.tokens = 0
        self._absmax: Array | None = None  # [N]
        self._hits: Array | None = None  # [N] int64

    def observe(self, x: Array) -> None:
        """Add a batch x[T, N]; ValueError naming the tensor if it is no matrix, not finite, or
        of another width than earlier batches.
        """
        xp = namespace(x)
        if x.ndim != 2:
            raise InputError(
                f"{self.name}: outliers are counted in x[T, N], got shape {tuple(x.shape)}"
            )
        if not x.shape[0]:
            return  # no token
        if self._absmax is not None and self._absmax.shape != x.shape[1:]:
            raise InputError(
                f"{self.name}: x has {x.shape[1]} channels, earlier {self._absmax.shape[0]}"
            )
        require_finite(x, self.name)
        size = xp.abs(x)
        absmax = xp.max(size, axis=0)  # [N]
        hits = xp.sum(xp.astype(size >= self.threshold, xp.int64), axis=0)  # [N]
        if self.tokens:
            absmax = xp.maximum(self.absmax, absmax)
            hits = self.hits + hits
        self._absmax = absmax
        self._hits = hits
        self.tokens += int(x.shape[0])

    @property
    def absmax(self) -> Array:
        """max |x_j| of each channel, [N]; at least one token must have been observed."""
        assert self._absmax is not None, "no token was observed"
        return self._absmax

    @property
    def hits(self) -> Array:
        """The number of tokens in which each channel reaches the threshold, [N] int64."""
        assert self._hits is not None, "no token was observed"
        return self._hits

    @property
    def share(self) -> Array:
        """Share of the tokens in which each channel reaches the threshold, [N] float64."""
        xp = namespace(self.hits)
        return xp.astype(self.hits, xp.float64) / self.tokens

    @property
    def spread(self) -> float:
        """The largest channel's absmax over the median channel's: 1 if all are equal, ∞ if
        most channels are always zero.
        """
        absmax = to_numpy(self.absmax)
        middle = float(sorted(absmax.tolist())[absmax.size // 2])
        if middle:
            return float(absmax.max()) / middle
        if float(absmax.max()):
            return math.inf
        return 1.0

    def columns(self, share: float = 0.0) -> list[int]:
        """The channels that reach the threshold in at least ``share`` of the tokens, and in at
        least one.
        """
        hits = to_numpy(self.hits)
        return [j for j, n in enumerate(hits.tolist()) if n and n >= share * self.tokens]


def vectorwise(x: Array, *, name: str = "x") -> tuple[Array, Array]:
    """Codes int8 rint(x · (127/c)), and c = absmax of each row [rows, 1]; a zero row has codes 0.

    The factor 127/c is rounded before the product, as in bitsandbytes: x/(c/127) gives other
    codes in a few cases.

    Raises
    ------
    ValueError
        naming ``name`` if x holds NaN or infinity.

    >>> import numpy as np
    >>> codes, absmax = vectorwise(np.array([[1.0, -0.5, 2.0], [0.0, 0.0, 0.0]]))
    >>> codes.tolist(), absmax.tolist()
    ([[64, -32, 127], [0, 0, 0]], [[2.0], [0.0]])
    """
    xp = namespace(x)
    require_finite(x, name)
    absmax = xp.max(xp.abs(x), axis=1, keepdims=True)  # c, [rows, 1]
    # below 127 times the smallest normal number 127/c may be infinite: such a row is measured
    # in units of that number instead
    tiny = float(xp.finfo(x.dtype).smallest_normal)
    unit = xp.where(absmax < 127 * tiny, tiny, 1.0)
    unit = xp.astype(unit, x.dtype)
    ratio = xp.where(absmax > 0, 127.0 / xp.where(absmax > 0, absmax / unit, 1.0), 0.0)
    codes = xp.round(x / unit * xp.astype(ratio, x.dtype))
    return xp.astype(xp.clip(codes, -127.0, 127.0), xp.int8), absmax


class Int8Linear:
    """W[M, N] as int8 codes with one absmax per row, multiplied as LLM.int8() does; a ``Linear``.

    It counts what the decomposition costs: ``multiplied`` values of x so far, ``in_float`` of
    them in outlier columns. With ``rule="paper"`` the original weight is kept beside the
    codes and counted in ``nbytes``: that is why bitsandbytes does not keep it.
    """

    def __init__(
        self,
        weight: Array,
        threshold: float = 6.0,
        rule: str = "bitsandbytes",
        *,
        name: str = "weight",
    ):
        if weight.ndim != 2:
            raise InputError(
                f"Int8Linear: {name} is a matrix [M, N], got shape {tuple(weight.shape)}"
            )
        if weight.dtype.kind != "f":
            raise InputError(
                f"Int8Linear: {name} is of floats, got {weight.dtype}: convert it first"
            )
        if rule not in RULES:
            raise InputError(f"Int8Linear: unknown rule {rule!r}; choose one of {', '.join(RULES)}")
        if not threshold >= 0:
            raise InputError(
                "Int8Linear: threshold is 0 or more (0 and infinity: no decomposition), "
                f"got {threshold}"
            )
        self.codes, self.absmax = vectorwise(weight, name=name)
        self.threshold = threshold or math.inf
        self.rule = rule
        self.dtype = weight.dtype
        self.original = weight if rule == "paper" else None
        self.multiplied = 0
        self.in_float = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(M, N)"""
        return int(self.codes.shape[0]), int(self.codes.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of codes and absmax, and of the original weight if it is kept."""
        kept = 0 if self.original is None else int(self.original.nbytes)
        return int(self.codes.nbytes + self.absmax.nbytes) + kept

    @property
    def bits_per_weight(self) -> float:
        """8 · nbytes / (M · N)"""
        return 8.0 * self.nbytes / (self.shape[0] * self.shape[1])

    @property
    def scale(self) -> Array:
        """c_w / 127, [M, 1]."""
        return self.absmax / 127

    def dequantize(self) -> Array:
        """W[M, N] from its codes, a new array."""
        xp = namespace(self.codes)
        return xp.astype(self.codes, self.dtype) * self.scale

    def matmul(self, x: Array) -> Array:
        """x[T, N] → [T, M]. ValueError if a value of x is not finite."""
        xp = namespace(x, self.codes)
        if x.ndim != 2 or x.dtype.kind != "f":
            raise InputError(f"int8: x is of floats [T, N], got {x.dtype} {tuple(x.shape)}")
        wide = xp.result_type(x.dtype, self.dtype, xp.float32)
        work = xp.astype(x, wide, copy=False)  # mutate: equivalent (a copy costs time alone)
        require_finite(work, "x")  # infinity would count as an outlier
        columns = self._outliers(work)
        self.multiplied += x.size
        self.in_float += int(x.shape[0]) * int(columns.size)
        if not columns.size:
            return xp.astype(self._rescaled(*vectorwise(work)), x.dtype, copy=False)
        if self.rule == "paper":
            hidden = xp.zeros((1, x.shape[1]), dtype=xp.bool_)
            hidden[:, columns] = True
        else:
            hidden = xp.abs(work) >= self.threshold
        codes, absmax = vectorwise(xp.where(hidden, 0.0, work))  # X', [T, N] and [T, 1]
        codes[:, columns] = 0  # outlier columns take no part in the integer product
        in_float = work[:, columns] @ self._columns(columns, work.dtype).T  # X_O W_Oᵀ, [T, M]
        y = self._rescaled(codes, absmax) + in_float
        return xp.astype(y, x.dtype, copy=False)

    def _outliers(self, x: Array) -> Array:
        """Indices of the outlier columns, int64."""
        xp = namespace(x)
        if not x.shape[0] or self.threshold == math.inf:
            return xp.zeros((0,), dtype=xp.int64)
        return xp.nonzero(xp.max(xp.abs(x), axis=0) >= self.threshold)[0]

    def _columns(self, columns: Array, dtype: DType) -> Array:
        """W_O = W[:, columns] in floating point: the original, or from the codes."""
        xp = namespace(columns)
        if self.original is not None:
            return xp.astype(self.original[:, columns], dtype)
        return xp.astype(self.codes[:, columns], dtype) * xp.astype(self.scale, dtype)

    def _rescaled(self, codes: Array, absmax: Array) -> Array:
        """The integer product with codes[T, N], times both scales → [T, M]."""
        xp = namespace(codes, absmax)
        y = xp.astype(integer_matmul(codes, self.codes, sizes=(127, 127)), absmax.dtype)  # [T, M]
        # one factor after the other: the product of two small scales may underflow where the
        # result does not
        return y * (absmax / 127) * xp.astype(self.scale, absmax.dtype).T


def int8_matmul(
    x: Array, weight: Array, threshold: float = 6.0, *, rule: str = "bitsandbytes"
) -> Array:
    """LLM.int8(): x[T, N], weight[M, N] → x Wᵀ [T, M], outlier columns in floating point,
    the rest in 8 bits.

    ``threshold`` 0 or infinity switches the decomposition off. For many calls keep an
    ``Int8Linear``.

    Raises
    ------
    ValueError
        if x or the weight is not finite, or for an unknown threshold or rule.

    >>> import numpy as np
    >>> x = np.array([[0.1, 60.0]])  # the second channel is an outlier
    >>> w = np.array([[1.0, 1.0]])
    >>> int8_matmul(x, w).tolist(), int8_matmul(x, w, threshold=0).tolist()
    ([[60.1]], [[60.0]])
    """
    namespace(x, weight)
    return Int8Linear(weight, threshold, rule).matmul(x)


@dataclass(frozen=True)
class Int8(Method):
    """LLM.int8() as a method for whole models; options as in ``int8_matmul``."""

    threshold: float = 6.0
    rule: str = "bitsandbytes"
    name: ClassVar[str] = "int8"
    default_scheme: ClassVar[Scheme] = Scheme(8, "restricted", "channel")
    calibrates: ClassVar[bool] = False
    sequential: ClassVar[bool] = True

    def check(self, scheme: Scheme) -> None:
        """ValueError for any scheme but the one that ``Int8Linear`` has."""
        if scheme != self.default_scheme:
            raise InputError(f"int8 has one scheme, {self.default_scheme}; got {scheme}")

    def stage_quantizer(self, run: LayerRun, scheme: Scheme) -> QuantizeWeight:
        """Each weight is converted by itself."""

        def quantize_weight(name: str, weight: Array) -> QuantizedProjection:
            made = Int8Linear(weight, self.threshold, self.rule, name=run.tensor(name))
            return QuantizedProjection(made)

        return quantize_weight
