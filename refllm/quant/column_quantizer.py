"""The scales of a weight, and rounding it one column at a time: what ``gptq`` and ``obq`` share.

``weight_qparams`` finds scale and zero point of each range. With ``mse`` the range is
searched first: a narrower range clips its few largest weights and rounds all others more
finely. Source of the search: the code published with Frantar et al. 2022 (GPTQ), option
``mse``.

``ColumnQuantizer`` rounds a weight column by column, while its caller changes the columns that
are still to come. A group of columns can get its scale at two times:

- **static**: before anything is rounded, from the original weight. Columns may then be
  visited in any order.
- **dynamic**: when its first column is reached, from what error compensation has made of its
  columns. Groups are then groups of columns *visited* one after the other, so with another
  order than the weight's own each column has to remember its group: ``g_idx``.

A scale for a row or for the whole weight is always static.

| symbol | name                                                  | shape              |
|--------|-------------------------------------------------------|--------------------|
| W      | weight                                                | [M, N]             |
| p      | share of the range that is kept: 1, 0.99, …, 0.21     |                    |
| s, z   | scale and zero point                                  | as the scheme says |
| w      | one column of W, after compensation of earlier errors | [M]                |
| q      | codes                                                 | [M, N]             |
| order  | order in which columns are visited                    | [N]                |
| g_idx  | group of each column, in the weight's own order       | [N]                |

Left out: scales that are updated after the codes are known.
"""

from __future__ import annotations

import dataclasses

from refllm.backend import Array, namespace
from refllm.errors import InputError
from refllm.formats.packing import load_scale, store_scale
from refllm.formats.quantized_linear import ActOrderLinear
from refllm.formats.uniform import (
    Scheme,
    dequantize_codes,
    quantize_codes,
    range_to_qparams,
    ranges,
)

__all__ = ["ColumnQuantizer", "GPTQResult", "weight_qparams"]

GRID = 100  # the candidates are p = 1 − i/GRID for i = 0 … CANDIDATES − 1
CANDIDATES = 80
NORM = 2.4  # errors are summed as |x̂ − x|^NORM
_PIECE = 1 << 19  # weights per piece, so that all 80 candidates find them in a cache
_SAFE = 1e-18  # above it, no weight of a usual size divided by a scale overflows float32


# --- scales and zero points of a weight -----------------------------------------------------


def weight_qparams(
    weight: Array,
    scheme: Scheme,
    *,
    mse: bool = False,
    one_sided: bool = False,
    name: str = "weight",
) -> tuple[Array, Array]:
    """Scale and zero point of each range of W[M, N], shaped as the scheme says.

    ``mse``: of the ranges p·[lo, hi], p = 1, 0.99, …, 0.21, each takes the one with the
    least Σ|x̂ − x|^2.4, the widest of equal ones. So the error in that norm is never larger
    than that of the whole range.

    ``one_sided`` repeats a quirk of GPTQ's published code with "half_integer_unsigned": a
    range without a negative value gets half the scale, so that values above 7/15 of the
    range (at 4 bits) are clipped.

    Raises
    ------
    ValueError
        naming ``name`` if W is not finite or does not fit the scheme.
    """
    xp = namespace(weight)
    if not mse or scheme.granularity == "tensor":
        return _search(weight, scheme, CANDIDATES if mse else 1, one_sided, name)
    block_rows = scheme.block[0] if scheme.granularity == "block" else 1
    rows = block_rows * max(1, _PIECE // (block_rows * max(1, weight.shape[1])))
    pieces = [
        _search(weight[i : i + rows, :], scheme, CANDIDATES, one_sided, name)
        for i in range(0, weight.shape[0], rows)
    ]
    return xp.concat([s for s, _ in pieces], axis=0), xp.concat([z for _, z in pieces], axis=0)


def _search(
    weight: Array, scheme: Scheme, candidates: int, one_sided: bool, name: str
) -> tuple[Array, Array]:
    """The best of the first ``candidates`` ranges p·[lo, hi] as scale and zero point."""
    xp = namespace(weight)
    lo, hi = ranges(weight, scheme, name=name)
    best, zero = _qparams(lo, hi, scheme, one_sided)
    if candidates == 1:
        return best, zero
    # errors are measured in scales of the whole range: weights of any size, no underflow
    unit = scheme.geometry.expand_scale(best, tuple(weight.shape))
    least = _error(weight, best, zero, unit, scheme)
    for i in range(1, candidates):
        p = 1.0 - i / GRID
        # asarray: NumPy turns a 0-d array into a scalar here
        s, z = _qparams(xp.asarray(p * lo), xp.asarray(p * hi), scheme, one_sided)
        error = _error(weight, s, z, unit, scheme)
        better = error < least  # strict: of equal errors the wider range stays
        best = xp.where(better, s, best)
        zero = xp.where(better, z, zero)
        least = xp.where(better, error, least)
    return best, zero


def _qparams(lo: Array, hi: Array, scheme: Scheme, one_sided: bool) -> tuple[Array, Array]:
    """Scale and zero point of ranges [lo, hi], with the one-sided quirk if asked for."""
    xp = namespace(lo, hi)
    s, z = range_to_qparams(lo, hi, scheme)
    if one_sided and scheme.rule == "half_integer_unsigned":
        s = xp.where((lo >= 0) & (hi > 0), 0.5 * s, s)
    return s, z


def _error(weight: Array, s: Array, z: Array, unit: Array, scheme: Scheme) -> Array:
    """Σ |x̂ − x|^2.4 over each range, in units of ``unit``; shaped like s."""
    xp = namespace(weight, s)
    off = dequantize_codes(quantize_codes(weight, s, z, scheme, check=False), s, z, scheme)
    off -= weight  # [M, N]
    if scheme.granularity == "block":
        # ragged blocks are padded with zero error, not with copies of their edge
        rows, columns = scheme.block
        m, n = off.shape
        padded = xp.zeros((s.shape[0] * rows, s.shape[1] * columns), dtype=off.dtype)
        padded[:m, :n] = off
        off = padded
    blocks = xp.abs(
        scheme.geometry.as_blocks(off) / unit
    )  # [row blocks, rows, column blocks, columns]
    return xp.reshape(xp.sum(xp.power(blocks, NORM), axis=(1, 3)), s.shape)


# --- one column at a time -------------------------------------------------------------------


class ColumnQuantizer:
    """Rounds the columns of a weight one by one, with scales found before the first column
    (static) or at the beginning of each group (dynamic).

    weight[M, N] in its own order; ``order[i]`` is the column that is visited i-th (None: in
    the weight's own order). ``width`` is the number of columns that share a scale.
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
            raise InputError(
                f"{name}: granularity 'token' is for activations; a weight takes 'channel'"
            )
        try:
            scheme.scale_shape(tuple(weight.shape))
        except ValueError as error:  # ragged groups: the message names the sizes that fit
            raise InputError(f"{name}: {error}") from None
        grouped = scheme.granularity in ("group", "block")
        self.scheme = scheme
        self.name = name
        self.rows = int(weight.shape[0])
        self.width = scheme.block[1] if grouped else int(weight.shape[1])
        self.dynamic = grouped and not static
        self.order = None if order is None else [int(i) for i in order]
        self._mse = mse
        self._one_sided = one_sided
        self._scale_dtype = scale_dtype
        self._column_scheme = dataclasses.replace(scheme, granularity="channel", group_size=None)
        # (s, z) of each dynamic group, shaped as the scheme says
        self._groups: list[tuple[Array, Array]] = []
        # (s[M, 1], z[M, 1], may the quotient w/s overflow?) of each group of columns
        self._columns: list[tuple[Array, Array, bool]] = []
        if not self.dynamic:
            self._whole = self._find_qparams(weight, scheme)
            self._expand_whole(int(weight.shape[1]))

    def begin_group(self, columns: Array) -> None:
        """The next dynamic group begins; columns[k, M] are its weights as they are now, each
        column of the weight as a row.
        """
        xp = namespace(columns)
        k = int(columns.shape[0])
        size = k if self.scheme.granularity == "group" else (self.scheme.block[0], k)
        scheme = dataclasses.replace(self.scheme, group_size=size)
        s, z = self._find_qparams(xp.ascontiguousarray(columns.T), scheme)
        self._groups.append((s, z))
        self._columns.append(self._as_column(s[:, 0], z[:, 0]))

    def quantize(self, i: int, w: Array) -> tuple[Array, Array]:
        """The i-th visited column w[M] → its codes q[M], and their values s·(q − z) [M]."""
        xp = namespace(w)
        # static groups are groups of the weight's own columns, dynamic ones of visited columns
        column = i if self.dynamic or self.order is None else self.order[i]
        s, z, check = self._columns[column // self.width]  # [M, 1] each
        w = xp.reshape(w, (-1, 1))  # [M, 1]
        q = quantize_codes(w, s, z, self._column_scheme, check=check, name=self.name)
        return q[:, 0], dequantize_codes(q, s, z, self._column_scheme)[:, 0]

    def qparams(self) -> tuple[Array, Array]:
        """All scales and zero points, shaped as the scheme says; dynamic groups in the order
        of their visit.
        """
        if not self.dynamic:
            return self._whole
        xp = namespace(self._groups[0][0])
        scale = xp.concat([s for s, _ in self._groups], axis=1)
        zero_point = xp.concat([z for _, z in self._groups], axis=1)
        return scale, zero_point

    def _find_qparams(self, weight: Array, scheme: Scheme) -> tuple[Array, Array]:
        """Scale and zero point, the scale rounded to ``scale_dtype``: codes must be computed
        with the scale that they will be multiplied with.
        """
        s, z = weight_qparams(
            weight, scheme, mse=self._mse, one_sided=self._one_sided, name=self.name
        )
        stored = store_scale(s, self._scale_dtype, name=f"{self.name}'s scale")
        return load_scale(stored, s.dtype), z

    def _as_column(self, s: Array, z: Array) -> tuple[Array, Array, bool]:
        """s and z of the row blocks → those of each row, [M, 1], and whether w/s may overflow."""
        xp = namespace(s)
        if self.scheme.granularity == "block":
            s, z = (xp.repeat(a, self.scheme.block[0])[: self.rows] for a in (s, z))
        s, z = (xp.ascontiguousarray(xp.reshape(a, (self.rows, 1))) for a in (s, z))
        return s, z, not float(xp.min(s)) > _SAFE

    def _expand_whole(self, columns: int) -> None:
        """One entry of ``_columns`` for each group of the static scale and zero point."""
        xp = namespace(self._whole[0])
        s, z = (xp.broadcast_to(a, (self.rows, 1)) if a.ndim == 0 else a for a in self._whole)
        for g in range(-(-columns // self.width)):
            self._columns.append(self._as_column(s[:, g], z[:, g]))


class GPTQResult(ActOrderLinear):
    """A weight that was rounded column by column, and what that cost.

    With dynamic groups in another order than the weight's own it has an ``order`` and a
    ``g_idx``, see ``ActOrderLinear``.
    """

    loss: float  # Σ = ½ tr(E H Eᵀ), E = W − Ŵ with the dead columns of W at zero, H damped
    damp: float  # the damping that was used, as a share of the mean diagonal
    dead: Array  # columns whose input was always zero during calibration, bool[N]

    @classmethod
    def collect(
        cls,
        codes: Array,
        columns: ColumnQuantizer,
        *,
        loss: float,
        damp: float,
        dead: Array,
        scale_dtype: str | None = None,
        zero_dtype: str | None = None,
    ) -> GPTQResult:
        """codes[M, N] in the order of the visit, and the quantizer that made them; the dtypes
        are those of ``QuantizedLinear.from_codes``.
        """
        xp = namespace(codes)
        scale, zero_point = columns.qparams()
        order = None if columns.order is None else xp.asarray(columns.order)
        if order is not None and not columns.dynamic:
            codes = codes[:, xp.argsort(order)]  # back to the weight's own order
            order = None
        self = cls.from_codes(codes, scale, zero_point, columns.scheme, scale_dtype, zero_dtype)
        assert isinstance(self, GPTQResult)
        self.loss = loss
        self.damp = damp
        self.dead = dead
        self.order = order
        return self
