"""Round to nearest: every weight takes the nearest point of its grid, whatever the layer is
fed. The baseline of all.

With ``mse`` the grid of each range is searched first: a narrower range clips its few
largest weights and rounds all others finer. Source of the search: the code that Frantar et
al. 2022 (GPTQ) published with their paper, ``mse``.

| symbol | name                                                        | shape            |
|--------|-------------------------------------------------------------|------------------|
| W      | weight                                                      | [M, N]           |
| p      | how much of a range is kept: 1, 0.99, …, 0.21               |                  |
| s, z   | scale and zero point                                        | as ``Scheme`` says |

Left out: ranges from anything but the weights themselves (AWQ's clip search looks at the
inputs too).

<<MERGED>> What a weight needs that is rounded column by column: the grid of each column,
and what is kept of the result.

| symbol | name                                                                | shape     |
|--------|---------------------------------------------------------------------|-----------|
| w      | one column of the weight, as the errors of earlier ones have left it | [M]       |
| s, z   | its scale and zero point                                            | [M]       |
| q      | codes                                                               | [M, N]    |
| p      | order in which the columns are visited                              | [N]       |
| g_idx  | group of each column, in the weight's own order                     | [N]       |

Two times at which a group of columns can get its scale:

- **static**: before anything is rounded, from the weight as it came. Columns may then be
  visited in any order.
- **dynamic**: when its first column is reached, from what the errors so far have made of
  its columns. Groups are groups of columns *visited* one after the other, so with another
  order than the weight's own each column has to remember its group: ``g_idx``.

A scale for a row or for the whole weight is always static.

Left out: scales that are updated once more after the codes are known.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from refllm.backend import Array, namespace
from refllm.formats.packing import load_scale, store_scale
from refllm.formats.quantized_linear import ActOrderLinear, QuantizedLinear, quantize
from refllm.formats.uniform import (
    Scheme,
    as_blocks,
    dequantize_codes,
    expand_scale,
    quantize_codes,
    range_to_qparams,
    ranges,
)

GRID = 100  # p = 1 − i/100 for i = 0 … 79; errors are summed as |x̂ − x|^2.4
CANDIDATES = 80
NORM = 2.4
_PIECE = 1 << 19  # weights at a time, so that 80 looks at them find them in a cache


def rtn(
    weight: Array,
    scheme: Scheme,
    *,
    mse: bool = False,
    scale_dtype: str | None = None,
    zero_dtype: str | None = None,
    name: str = "weight",
) -> QuantizedLinear:
    """W[M, N] rounded to nearest. ``mse`` searches the range of each scale, at about a
    hundred times the time.

    ``scale_dtype`` and ``zero_dtype`` are those of
    ``refllm.formats.quantized_linear.quantize``, as is what is refused.
    """
    if not mse:
        return quantize(weight, scheme, scale_dtype=scale_dtype, zero_dtype=zero_dtype, name=name)
    scale, zero_point = params(weight, scheme, mse=True, name=name)
    return quantize(
        weight,
        scheme,
        scale=scale,
        zero_point=zero_point,
        scale_dtype=scale_dtype,
        zero_dtype=zero_dtype,
        name=name,
    )


def params(
    weight: Array,
    scheme: Scheme,
    *,
    mse: bool = False,
    one_sided: bool = False,
    name: str = "weight",
) -> tuple[Array, Array]:
    """Scale and zero point of each range of W[M, N], shaped as the scheme says.

    ``mse``: of the ranges p·[lo, hi], p = 1, 0.99, …, 0.21, each takes the one with the
    least Σ|x̂ − x|^2.4, of equal ones the widest; so the error in that norm is never larger
    than that of the whole range.

    ``one_sided`` repeats a quirk of GPTQ's published code at "half_integer_unsigned": a
    range without a negative number gets half of the step, so that what is above 7/15 of it
    (at 4 bits) is clipped.

    Raises
    ------
    ValueError
        naming ``name`` if W is not finite or does not fit the scheme.
    """
    xp = namespace(weight)
    if not mse or scheme.granularity == "tensor":
        return _search(weight, scheme, CANDIDATES if mse else 1, one_sided, name)
    high = scheme.block[0] if scheme.granularity == "block" else 1
    step = high * max(1, _PIECE // (high * max(1, weight.shape[1])))
    pieces = [
        _search(weight[i : i + step, :], scheme, CANDIDATES, one_sided, name)
        for i in range(0, weight.shape[0], step)
    ]
    return xp.concat([s for s, _ in pieces], axis=0), xp.concat([z for _, z in pieces], axis=0)


def _search(
    weight: Array, scheme: Scheme, candidates: int, one_sided: bool, name: str
) -> tuple[Array, Array]:
    xp = namespace(weight)
    lo, hi = ranges(weight, scheme, name=name)
    best, zero = _qparams(lo, hi, scheme, one_sided)
    if candidates == 1:
        return best, zero
    # errors in steps: weights of any size, no underflow
    unit = expand_scale(best, scheme, tuple(weight.shape))
    least = _error(weight, best, zero, unit, scheme)
    for i in range(1, candidates):
        p = 1.0 - i / GRID
        # 0-d arrays stay arrays
        s, z = _qparams(xp.asarray(p * lo), xp.asarray(p * hi), scheme, one_sided)
        error = _error(weight, s, z, unit, scheme)
        better = error < least
        best = xp.where(better, s, best)
        zero = xp.where(better, z, zero)
        least = xp.where(better, error, least)
    return best, zero


def _qparams(lo: Array, hi: Array, scheme: Scheme, one_sided: bool) -> tuple[Array, Array]:
    xp = namespace(lo, hi)
    s, z = range_to_qparams(lo, hi, scheme)
    if one_sided and scheme.rule == "half_integer_unsigned":
        s = xp.where((lo >= 0) & (hi > 0), 0.5 * s, s)
    return s, z


def _error(weight: Array, s: Array, z: Array, unit: Array, scheme: Scheme) -> Array:
    """Σ |x̂ − x|^2.4 of each range, in units of ``unit``; shaped like s."""
    xp = namespace(weight, s)
    off = dequantize_codes(quantize_codes(weight, s, z, scheme, check=False), s, z, scheme)
    off -= weight
    # ragged blocks are filled up with no error, not with copies of their edge
    if scheme.granularity == "block":
        rows, columns = scheme.block
        m, n = off.shape
        whole = xp.zeros((s.shape[0] * rows, s.shape[1] * columns), dtype=off.dtype)
        whole[:m, :n] = off
        off = whole
    blocks = xp.abs(as_blocks(off, scheme) / unit)
    return xp.reshape(xp.sum(xp.power(blocks, NORM), axis=(1, 3)), s.shape)


_SAFE = 1e-18  # above it, no weight of a usual size divided by a scale overflows float32


class Grids:
    """The scale and zero point of each column, found before the first column or group by
    group.

    weight[M, N] in its own order; ``order[i]`` is the column that is visited i-th (None:
    one after the other).
    """

    def __init__(
        self,
        weight: Array,
        scheme: Scheme,
        *,
        order: Array | None = None,
        static: bool = False,
        mse: bool = False,
        one_sided: bool = False,
        scale_dtype: str | None = None,
        name: str = "weight",
    ):
        if scheme.granularity == "token":
            raise ValueError(
                f"{name}: granularity 'token' is for activations; a weight takes 'channel'"
            )
        try:
            scheme.scale_shape(tuple(weight.shape))
        except ValueError as error:  # ragged groups: it names the sizes that fit
            raise ValueError(f"{name}: {error}") from None
        self.scheme = scheme
        self.name = name
        self.rows = int(weight.shape[0])
        if scheme.granularity in ("group", "block"):
            self.width = scheme.block[1]
        else:
            self.width = int(weight.shape[1])
        self.dynamic = scheme.granularity in ("group", "block") and not static
        self._options: dict[str, Any] = {"mse": mse, "one_sided": one_sided, "name": name}
        self._scale_dtype = scale_dtype
        self._column = dataclasses.replace(scheme, granularity="channel", group_size=None)
        # of dynamic groups, as their scheme shapes them
        self._parts: list[tuple[Array, Array]] = []
        # [M, 1] each, and whether quotients may overflow
        self._grids: list[tuple[Array, Array, bool]] = []
        self.order = None if order is None else [int(i) for i in order]
        if not self.dynamic:
            self._whole = self._rounded(*params(weight, scheme, **self._options))
            self._expand_whole(int(weight.shape[1]))

    def open(self, columns: Array) -> None:
        """The next dynamic group begins; columns[k, M] are its weights as they are now, one
        column a row.
        """
        xp = namespace(columns)
        k = int(columns.shape[0])
        size = k if self.scheme.granularity == "group" else (self.scheme.block[0], k)
        scheme = dataclasses.replace(self.scheme, group_size=size)
        s, z = self._rounded(*params(xp.ascontiguousarray(columns.T), scheme, **self._options))
        self._parts.append((s, z))
        self._grids.append(self._as_column(s[:, 0], z[:, 0]))

    def round(self, i: int, w: Array) -> tuple[Array, Array]:
        """The i-th visited column w[M] → its codes q[M] and what they stand for, s (q − z)
        [M].
        """
        xp = namespace(w)
        static_order = None if self.dynamic else self.order
        s, z, check = self._grids[(i if static_order is None else static_order[i]) // self.width]
        q = quantize_codes(xp.reshape(w, (-1, 1)), s, z, self._column, check=check, name=self.name)
        return q[:, 0], dequantize_codes(q, s, z, self._column)[:, 0]

    def arrays(self) -> tuple[Array, Array]:
        """All scales and zero points, shaped as the scheme says; dynamic groups in the
        order of their visit.
        """
        if not self.dynamic:
            return self._whole
        xp = namespace(self._parts[0][0])
        return xp.concat([s for s, _ in self._parts], axis=1), xp.concat(
            [z for _, z in self._parts], axis=1
        )

    def _rounded(self, s: Array, z: Array) -> tuple[Array, Array]:
        """The scale as it will be stored: the codes must be made with the numbers that will
        be multiplied with.
        """
        return load_scale(
            store_scale(s, self._scale_dtype, name=f"{self.name}'s scale"), s.dtype
        ), z

    def _as_column(self, s: Array, z: Array) -> tuple[Array, Array, bool]:
        """Of the row blocks' s and z, those of each row, [M, 1]."""
        xp = namespace(s)
        if self.scheme.granularity == "block":
            s, z = (xp.repeat(a, self.scheme.block[0])[: self.rows] for a in (s, z))
        s, z = (xp.ascontiguousarray(xp.reshape(a, (self.rows, 1))) for a in (s, z))
        return s, z, not float(xp.min(s)) > _SAFE

    def _expand_whole(self, columns: int) -> None:
        xp = namespace(self._whole[0])
        s, z = (xp.broadcast_to(a, (self.rows, 1)) if a.ndim == 0 else a for a in self._whole)
        for g in range(-(-columns // self.width)):
            self._grids.append(self._as_column(s[:, g], z[:, g]))


class Solution(ActOrderLinear):
    """A weight that was rounded column by column, and what it cost.

    With dynamic groups in another order than the weight's own there is an ``order`` and a
    ``g_idx``, see ``ActOrderLinear``.
    """

    loss: float  # Σ = ½ tr(E H Eᵀ), E = W − Ŵ with the dead columns of W at zero, H damped
    damp: float  # the damping that was used, as a share of the mean diagonal
    dead: Array  # columns that calibration never reached, bool[N]

    @classmethod
    def collect(
        cls, codes: Array, grids: Grids, *, loss: float, damp: float, dead: Array, **stored: Any
    ) -> Solution:
        """codes[M, N] in the order of the visit and their grids; ``stored`` as
        ``QuantizedLinear.from_codes`` takes it.
        """
        xp = namespace(codes)
        scale, zero_point = grids.arrays()
        order = None if grids.order is None else xp.asarray(grids.order)
        if order is not None and not grids.dynamic:
            codes = codes[:, xp.argsort(order)]
            order = None
        self = cls.from_codes(codes, scale, zero_point, grids.scheme, **stored)
        assert isinstance(self, Solution)
        self.loss = loss
        self.damp = damp
        self.dead = dead
        self.order = order
        return self
