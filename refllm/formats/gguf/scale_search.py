"""Searches for a block's scale: what ggml minimises, in the arithmetic that its bytes depend on.

Dividing by the largest element wastes codes: a little more error at the extremes buys less
everywhere else. So for each sub-block several scales are tried, and for the codes that each
gives, the best scale in closed form. Blocks are columns here, x[S, C] holds position i of
all of them in row i: searches run side by side, and only sums go position by position.

| search         | ggml             | model of x     | candidates                                 |
|----------------|------------------|----------------|--------------------------------------------|
| fit_asymmetric | make_qkx2_quants | s·L + m, m ≤ 0 | n + first + i·step scales in the range     |
| fit_symmetric  | make_qx_quants   | s·(L − n)      | n ± 0.1 … 0.9 scales for the extreme       |
| fit_by_sweeps  | make_q3_quants   | s·(L − n)      | one, then each code again, five times      |
| fit_positive   | make_qp_quants   | s·L, x ≥ 0     | n ± 0.1 … 0.4 scales, then each code again |

All minimise Σ w (model − x)², with w = x² in ``fit_by_sweeps``; ``fit_asymmetric`` can
compare Σ w |model − x| instead.

For given codes the squared error is least at s = Σwxl / Σwl² (symmetric), where it is
Σwx² − (Σwxl)²/Σwl²; so (Σwxl)²/Σwl² is compared, and no error is ever computed. The
asymmetric fit is the straight line of weighted regression.

Quirks, all part of the format's bytes:

- Sums are strictly sequential in float32. Another order of additions changes a last bit,
  that changes which candidate wins, and that changes the codes.
- ``fit_asymmetric`` moves its lower end to each better fit's offset, and later candidates
  start from there: the candidates are not the grid that the parameters describe.
- With ``mad`` (Q2_K) candidates are fitted by squares and compared by absolute errors.
- ``fit_by_sweeps`` only changes a code if the other codes' Σwxl is positive. With a positive
  extreme the scale is negative and Σwxl is too: such blocks are never refined.

Source: ggml's quantisers (ggml-quants.c), behaviour checked against the library byte for
byte.

Left out: the searches of the lattice types.
"""

from __future__ import annotations

from typing import NamedTuple

from refllm.backend import Array, namespace
from refllm.formats.gguf.arithmetic import divided, extreme, least, nearest, sequential_sum, single

__all__ = [
    "IMPORTANT",
    "TINY",
    "Grid",
    "fit_asymmetric",
    "fit_by_sweeps",
    "fit_positive",
    "fit_symmetric",
]

TINY = 1e-15  # a block whose elements are all smaller is stored as zero


def tenths(levels: int, i: int) -> float:
    """levels + i/10, in float32."""
    return single(single(single(0.1) * i) + levels)


class Grid(NamedTuple):
    """The candidates that ``fit_asymmetric`` tries."""

    first: float
    step: float
    tries: int

    def divisor(self, levels: int, i: int) -> float:
        """How many scales candidate i puts across the range: levels + first + i·step, in
        float32.
        """
        return single(single(single(self.first) + single(single(self.step) * i)) + levels)


IMPORTANT = Grid(-0.9, 0.05, 36)  # with an importance, for every type


def fit_asymmetric(
    x: Array, w: Array, levels: int, grid: Grid, *, mad: bool = False
) -> tuple[Array, Array, Array]:
    """x[S, C], weights w[S, C] → codes in 0 … levels (as float32 [S, C]), s[C] and −m[C] of
    x ≈ s·L + m.

    The first scale is range / levels; candidate i, of i = 0 … tries, is
    range / (levels + first + i·step).
    """
    xp = namespace(x, w)
    hi = xp.max(x, axis=0)
    lo = least(x)
    lo = xp.where(lo > 0, 0.0, lo)
    some = hi > lo
    sw = sequential_sum(w)
    sx = sequential_sum(w * x)
    code = xp.empty_like(x)  # both are reused, so that they stay in cache
    buffer = xp.empty_like(x)
    best_inverse = float(levels) / (hi - lo)
    best_lo = lo
    scale = 1.0 / best_inverse
    _round_codes(x, lo, best_inverse, levels, code)
    best = _error(x, w, code, scale, lo, mad, buffer)
    for i in range(grid.tries + 1):
        inverse = grid.divisor(levels, i) / (hi - lo)
        _round_codes(x, lo, inverse, levels, code)
        sl, sll, sxl = _moments(x, w, code, buffer)
        d = sw * sll - sl * sl
        s = (sw * sxl - sx * sl) / d
        m = (sll * sx - sl * sxl) / d
        above = m > 0  # the offset is never positive
        s = xp.where(above, sxl / sll, s)
        m = xp.where(above, 0.0, m)
        e = _error(x, w, code, s, m, mad, buffer)
        better = (d > 0) & (e < best) & some
        best = xp.where(better, e, best)
        scale = xp.where(better, s, scale)
        best_inverse = xp.where(better, inverse, best_inverse)
        best_lo = xp.where(better, lo, best_lo)
        lo = xp.where(better, m, lo)  # the quirk: later candidates start here
    # computed again, which is cheaper than keeping every winner's codes
    _round_codes(x, best_lo, best_inverse, levels, code)
    return xp.where(some, code, 0.0), xp.where(some, scale, 0.0), -lo


def _round_codes(x: Array, lo: Array, inverse: Array, levels: int, code: Array) -> None:
    """code = clip(nearest((x − lo) · inverse)); an infinite inverse gives 0, as ggml's
    rounding does.
    """
    xp = namespace(x, code)
    xp.subtract(x, lo, out=code)
    xp.multiply(code, xp.where(xp.isfinite(inverse), inverse, 0.0), out=code)
    xp.rint(code, out=code)
    xp.clip(code, 0.0, float(levels), out=code)


def _moments(x: Array, w: Array, code: Array, buffer: Array) -> tuple[Array, Array, Array]:
    """Σwl, Σwl², Σwlx of each column; products go through ``buffer``."""
    xp = namespace(x, w)
    xp.multiply(w, code, out=buffer)
    sl = sequential_sum(buffer)
    xp.multiply(buffer, code, out=buffer)
    sll = sequential_sum(buffer)
    xp.multiply(w, code, out=buffer)
    xp.multiply(buffer, x, out=buffer)
    return sl, sll, sequential_sum(buffer)


def _error(x: Array, w: Array, code: Array, s: Array, m: Array, mad: bool, buffer: Array) -> Array:
    """Σ w (s·code + m − x)², or Σ w |…| with ``mad``."""
    xp = namespace(x, w)
    xp.multiply(code, s, out=buffer)
    xp.add(buffer, m, out=buffer)
    xp.subtract(buffer, x, out=buffer)
    if mad:
        xp.abs(buffer, out=buffer)
    else:
        xp.multiply(buffer, buffer, out=buffer)
    xp.multiply(buffer, w, out=buffer)
    return sequential_sum(buffer)


def fit_symmetric(x: Array, levels: int, w: Array | None = None) -> tuple[Array, Array]:
    """x[S, C], weights (x² if None) → codes in 0 … 2·levels − 1 (as float32 [S, C]) and
    s[C] of x ≈ s·(L − levels).
    """
    xp = namespace(x, w)
    if w is None:
        w = x * x
    m = extreme(x)
    some = xp.abs(m) >= TINY
    wx = w * x
    t = xp.empty_like(x)
    code = xp.empty_like(x)

    def fit(inverse: Array) -> tuple[Array, Array]:
        """Σwxl, Σwl² of the codes that the scale 1/``inverse`` gives."""
        xp.multiply(x, inverse, out=code)
        xp.rint(code, out=code)
        xp.clip(code, -float(levels), float(levels - 1), out=code)
        xp.multiply(wx, code, out=t)
        sx = sequential_sum(t)
        xp.multiply(w, code, out=t)
        xp.multiply(t, code, out=t)
        return sx, sequential_sum(t)

    best_inverse = divided(-float(levels), m, some)
    sx, sl = fit(best_inverse)
    scale = divided(sx, sl, sl != 0)
    best = scale * sx
    for i in range(-9, 10):
        if i == 0:
            continue
        inverse = divided(-tenths(levels, i), m, some)
        sx, sl = fit(inverse)
        better = (sl > 0) & (sx * sx > best * sl)
        scale = xp.where(better, sx / sl, scale)
        best = xp.where(better, scale * sx, best)
        best_inverse = xp.where(better, inverse, best_inverse)
    fit(best_inverse)
    return xp.where(some, code + float(levels), 0.0), xp.where(some, scale, 0.0)


def fit_by_sweeps(x: Array, levels: int) -> tuple[Array, Array]:
    """x[S, C] → codes in 0 … 2·levels − 1 (as float32 [S, C]) and s[C]: one scale, then
    sweeps over the codes.
    """
    xp = namespace(x)
    m = extreme(x)
    some = xp.abs(m) >= TINY
    w = x * x
    wx = w * x
    inverse = divided(-float(levels), m, some)
    code = xp.clip(xp.rint(x * inverse), -float(levels), float(levels - 1))
    sx = sequential_sum(wx * code)
    sl = sequential_sum(w * code * code)
    code, sx, sl = _sweep(x, w, wx, code, sx, sl, -levels, levels - 1, others=False)
    return xp.where(some, code + float(levels), 0.0), xp.where(some, divided(sx, sl, sl > 0), 0.0)


def fit_positive(x: Array, levels: int, w: Array) -> tuple[Array, Array]:
    """x[S, C] ≥ 0, weights w[S, C] → codes in 0 … levels (as float32 [S, C]) and s[C] of x
    ≈ s·L.
    """
    xp = namespace(x, w)
    m = xp.maximum(xp.max(x, axis=0), 0.0)
    some = m >= TINY
    best_inverse = divided(float(levels), m, some)
    wx = w * x
    best = None
    for i in (0, -4, -3, -2, -1, 1, 2, 3, 4):
        if i == 0:
            inverse = best_inverse
        else:
            inverse = divided(tenths(levels, i), m, some)
        difference = x - divided(1.0, inverse, some) * _at_most(x * inverse, levels)
        e = sequential_sum(w * difference * difference)
        if best is None:
            better = some
            best = e
        else:
            better = e < best
            best = xp.where(better, e, best)
        best_inverse = xp.where(better, inverse, best_inverse)
    code = _at_most(x * best_inverse, levels)
    sx = sequential_sum(wx * code)
    sl = sequential_sum(w * code * code)
    code, sx, sl = _sweep(x, w, wx, code, sx, sl, -(1 << 22), levels, others=True)
    return xp.where(some, code, 0.0), xp.where(some, divided(sx, sl, sl > 0), 0.0)


def _at_most(x: Array, levels: int) -> Array:
    """min(nearest(x), levels) as float32."""
    xp = namespace(x)
    return xp.minimum(xp.astype(nearest(x), xp.float32), float(levels))


def _sweep(
    x: Array,
    w: Array,
    wx: Array,
    code: Array,
    sx: Array,
    sl: Array,
    low: int,
    high: int,
    *,
    others: bool,
) -> tuple[Array, Array, Array]:
    """Coordinate descent, up to five sweeps over all positions: each code is chosen again
    given all others, and kept if (Σwxl)²/Σwl² grows.

    A sweep without a change is a block's last. Between two changes a block's sums are
    constant: so all its positions are tried at once, and the next one in turn that would be
    kept is the next change. Blocks without one are finished, and so are those whose Σwxl is
    not positive (the quirk of the module).
    """
    xp = namespace(x, w, code)
    size = int(x.shape[0])
    positions = xp.arange(size, dtype=xp.int16)[:, None]
    at = xp.flatnonzero(sx > 0)
    # each block's next position, counted over its five sweeps
    turn = xp.zeros(at.shape, dtype=xp.int32)
    while at.size:
        some, some_w, some_wx, now = (xp.take(rows, at, axis=1) for rows in (x, w, wx, code))
        kept, tried, total, squares = _trial(
            some, some_w, some_wx, now, sx[at], sl[at], low, high, others=others
        )
        here = xp.astype(turn % size, xp.int16)
        turns = (
            positions
            + size * xp.astype(positions < here, xp.int16)
            + 2 * size * xp.astype(~kept, xp.int16)
        )
        following = xp.astype(xp.min(turns, axis=0), xp.int32)
        turn += following - here
        going = xp.flatnonzero((following < 2 * size) & (turn < 5 * size))
        at = at[going]
        turn = turn[going]
        i = turn % size
        code[i, at] = tried[i, going]
        sx[at] = total[i, going]
        sl[at] = squares[i, going]
        turn += 1
    return code, sx, sl


def _trial(
    x: Array,
    w: Array,
    wx: Array,
    code: Array,
    sx: Array,
    sl: Array,
    low: int,
    high: int,
    *,
    others: bool,
) -> tuple[Array, Array, Array, Array]:
    """For each code, if only that one changed: whether to keep the change, the new code, and
    Σwxl, Σwl² with it; all [S, C].
    """
    xp = namespace(x, w, code)
    a = sx - wx * code  # sums over the other codes
    b = sl - w * code * code
    # not used where a is not positive
    tried = xp.astype(xp.clip(nearest(x * b / a), low, high), xp.float32)
    total = a + wx * tried
    squares = b + w * tried * tried
    kept = (a > 0) & (tried != code) & ((b if others else squares) > 0)
    return kept & (total * total * sl > sx * sx * squares), tried, total, squares
