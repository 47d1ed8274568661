"""Activation outliers: where they are, and LLM.int8(), which multiplies their columns in
floating point.

Source: Dettmers et al. 2022 (LLM.int8()), §2.1 (vector-wise quantisation), §3.1
(decomposition), §4 (what counts as an outlier); and bitsandbytes 0.50, which does not do
quite what the paper says.

A column of x is an outlier column if any of its numbers is at least θ = 6 in size. These
columns O are multiplied in floating point, all others in 8-bit integers with one step a row
of x and one a row of W:

    Y = X_O W_Oᵀ + (c_x c_wᵀ / 127²) · rint(127 X'/c_x) rint(127 W/c_w)ᵀ

|                          | ``rule="paper"``               | ``rule="bitsandbytes"`` (default)               |
|--------------------------|--------------------------------|-------------------------------------------------|
| W_O                      | the original weight            | 8-bit weight, dequantised: no original is kept  |
| X', of which c_x is taken| x without the outlier columns  | x without the outlier *numbers*: small ones of  |
|                          |                                | an outlier column still widen their row's step  |
| memory                   | codes and the original weight  | codes                                           |

Which columns are outliers is found anew in each call, from all rows together: what comes
out for a token depends on the other tokens of the batch.

| symbol   | name                                   | shape           |
|----------|----------------------------------------|-----------------|
| X, W, Y  | activations, weight, product           | [T, N], [M, N], [T, M] |
| c_x, c_w | absmax of the rows of X' and of W      | [T, 1], [M, 1]  |
| θ        | threshold; ∞ or 0: no decomposition    |                 |

Left out: bitsandbytes' arithmetic in float16 (here it is x's own, float32 at least), its
constant 6.200124e-05 for 1/127² (0.0018 % too large), training; and what it does on a CPU
unless it is told that it does not train: x times the dequantised weight, with no integer of
x at all.
"""

from __future__ import annotations

import math
from typing import Any

from refllm.backend import Array, namespace, to_numpy
from refllm.formats.int_matmul import integer_matmul
from refllm.formats.uniform import require_finite

RULES = ("bitsandbytes", "paper")


class OutlierStatistics:
    """Shown x[T, N] batch by batch: how large each input channel gets, and in how many
    tokens it reaches ``threshold``.

    The paper calls a channel an outlier if it reaches 6 in at least 6 % of the tokens (and
    in a quarter of the layers, which is for the caller to count).
    """

    def __init__(self, threshold: float = 6.0, *, name: str = "x"):
        self.threshold = threshold
        self.name = name
        self.tokens = 0
        self.absmax: Array = None  # [N]
        self.hits: Array = None  # [N] int64: tokens in which the channel reaches the threshold

    def observe(self, x: Array) -> None:
        """Take in x[T, N]; ValueError naming the tensor if it is no matrix or not finite."""
        xp = namespace(x)
        if x.ndim != 2:
            raise ValueError(
                f"{self.name}: outliers are counted in x[T, N], got shape {tuple(x.shape)}"
            )
        if not x.shape[0]:
            return
        require_finite(x, self.name)
        size = xp.abs(x)
        absmax = xp.max(size, axis=0)
        hits = xp.sum(xp.astype(size >= self.threshold, xp.int64), axis=0)
        if self.absmax is None:
            self.absmax = absmax
        else:
            self.absmax = xp.maximum(self.absmax, absmax)
        self.hits = hits if self.hits is None else self.hits + hits
        self.tokens += int(x.shape[0])

    @property
    def share(self) -> Array:
        """Share of the tokens in which each channel reaches the threshold, [N] float64."""
        xp = namespace(self.hits)
        return xp.astype(self.hits, xp.float64) / self.tokens

    @property
    def spread(self) -> float:
        """The largest channel's absmax over the median channel's: 1 if all are alike; ∞ if
        most are always zero.
        """
        absmax = to_numpy(self.absmax)
        middle = float(sorted(absmax.tolist())[absmax.size // 2])
        if middle:
            return float(absmax.max()) / middle
        if float(absmax.max()):
            return math.inf
        return 1.0

    def columns(self, share: float = 0.0) -> list[int]:
        """The channels that reach the threshold in at least ``share`` of the tokens, and in
        one at least.
        """
        hits = to_numpy(self.hits)
        return [j for j, n in enumerate(hits.tolist()) if n and n >= share * self.tokens]


def vectorwise(x: Array, *, name: str = "x") -> tuple[Array, Array]:
    """Codes int8 rint(x · (127/c)) and c = absmax of each row [rows, 1]; a zero row has
    codes 0.

    The factor is rounded before it is multiplied, as bitsandbytes does: x/(c/127) gives
    another code now and then.

    Raises
    ------
    ValueError
        naming ``name`` if x holds NaN or infinity.
    """
    xp = namespace(x)
    require_finite(x, name)
    absmax = xp.max(xp.abs(x), axis=1, keepdims=True)
    # below the smallest normal number 127/c may be infinite: the row is measured in units
    # of that number instead
    tiny = float(xp.finfo(x.dtype).smallest_normal)
    unit = xp.where(absmax < 127 * tiny, tiny, 1.0)
    unit = xp.astype(unit, x.dtype)
    ratio = xp.where(absmax > 0, 127.0 / xp.where(absmax > 0, absmax / unit, 1.0), 0.0)
    codes = xp.round(x / unit * xp.astype(ratio, x.dtype))
    return xp.astype(xp.clip(codes, -127.0, 127.0), xp.int8), absmax


class Int8Linear:
    """W[M, N] as int8 codes with one float32 absmax a row, multiplied as LLM.int8() does;
    satisfies ``Linear``.

    It counts what the decomposition costs: ``multiplied`` numbers of x so far, ``in_float``
    of them in outlier columns. With ``rule="paper"`` the original weight is kept beside the
    codes, and counted in ``nbytes``: that is why bitsandbytes does otherwise.
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
            raise ValueError(
                f"Int8Linear: {name} is a matrix [M, N], got shape {tuple(weight.shape)}"
            )
        if weight.dtype.kind != "f":
            raise ValueError(
                f"Int8Linear: {name} is of floats, got {weight.dtype}: convert it first"
            )
        if rule not in RULES:
            raise ValueError(f"Int8Linear: unknown rule {rule!r}; choose one of {', '.join(RULES)}")
        if not threshold >= 0:
            raise ValueError(
                f"Int8Linear: threshold is 0 or more (0 and infinity: no decomposition), got {threshold}"
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
        """W[M, N] as the codes have it, a new array."""
        xp = namespace(self.codes)
        return xp.astype(self.codes, self.dtype) * self.scale

    def matmul(self, x: Array) -> Array:
        """x[T, N] → [T, M]. ValueError if a number of x is not finite."""
        xp = namespace(x, self.codes)
        if x.ndim != 2 or x.dtype.kind != "f":
            raise ValueError(f"int8: x is of floats [T, N], got {x.dtype} {tuple(x.shape)}")
        work = xp.astype(x, xp.result_type(x.dtype, self.dtype, xp.float32), copy=False)
        require_finite(work, "x")  # infinity would pass for an outlier
        columns = self._outliers(work)
        self.multiplied += x.size
        self.in_float += int(x.shape[0]) * int(columns.size)
        if not columns.size:
            return xp.astype(self._in_integers(work), x.dtype, copy=False)
        keep = xp.zeros((x.shape[1],), dtype=xp.bool_)
        keep[columns] = True
        if self.rule == "paper":
            hidden = keep[None, :]
        else:
            hidden = xp.abs(work) >= self.threshold
        codes, absmax = vectorwise(xp.where(hidden, 0.0, work))
        codes[:, columns] = 0
        y = self._scaled(codes, absmax) + work[:, columns] @ self._columns(columns, work.dtype).T
        return xp.astype(y, x.dtype, copy=False)

    def _outliers(self, x: Array) -> Array:
        """Indices of the outlier columns, int64."""
        xp = namespace(x)
        if not x.shape[0] or self.threshold == math.inf:
            return xp.zeros((0,), dtype=xp.int64)
        return xp.nonzero(xp.max(xp.abs(x), axis=0) >= self.threshold)[0]

    def _columns(self, columns: Array, dtype: Any) -> Array:
        """W[:, columns] in floating point: the original, or what the codes say."""
        xp = namespace(columns)
        if self.original is not None:
            return xp.astype(self.original[:, columns], dtype)
        return xp.astype(self.codes[:, columns], dtype) * xp.astype(self.scale, dtype)

    def _in_integers(self, x: Array) -> Array:
        return self._scaled(*vectorwise(x))

    def _scaled(self, codes: Array, absmax: Array) -> Array:
        xp = namespace(codes, absmax)
        y = xp.astype(integer_matmul(codes, self.codes, sizes=(127, 127)), absmax.dtype)
        # factor by factor: the product of two small steps may vanish where the result does
        # not
        return y * (absmax / 127) * xp.astype(self.scale, absmax.dtype).T


def int8_matmul(
    x: Array, weight: Array, threshold: float = 6.0, *, rule: str = "bitsandbytes"
) -> Array:
    """LLM.int8(): x[T, N], weight[M, N] → x Wᵀ [T, M], outlier columns in floating point,
    the rest in 8 bits.

    ``threshold`` 0 or infinity leaves out the decomposition. For many calls keep an
    ``Int8Linear``.

    Raises
    ------
    ValueError
        if x or the weight is not finite, or for a threshold or rule that does not exist.
    """
    namespace(x, weight)
    return Int8Linear(weight, threshold, rule).matmul(x)
