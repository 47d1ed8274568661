"""The k-quants, encoded: 256 numbers a block, in sub-blocks whose steps and offsets are
themselves quantised.

| type | codes  | value            | sub-block | weights of the search      | search (codes; scales)            |
|------|--------|------------------|-----------|----------------------------|-----------------------------------|
| Q2_K | 0…3    | d·S·q − dmin·M   | 16        | |x|                        | asymmetric by |error|; largest/15 |
| Q3_K | −4…3   | d·(S − 32)·q     | 16        | x²                         | swept; −largest/32                |
| Q4_K | 0…15   | d·S·q − dmin·M   | 32        | |x| + rms of the 32        | asymmetric; largest/63            |
| Q5_K | 0…31   | d·S·q − dmin·M   | 32        | the same                   | asymmetric; largest/63            |
| Q6_K | −32…31 | d·S·q            | 16        | x²                         | symmetric; −largest/128           |

With an importance (one weight a column, usually the mean square of the activations that it
multiplies) the weights are importance · sqrt(σ² + x²), σ² a mean square of the block, and
the sub-blocks' steps and offsets are searched too, each weighted by what hangs on it. Q6_K
takes the importance alone.

Three stages: steps by search; steps to codes, which moves them; the 256 codes anew for the
steps that are stored. Where a stored step is 0 the third stage has nothing to divide by,
and the search's codes stay in the bytes; they mean nothing.

| symbol | name                                        | shape                            |
|--------|---------------------------------------------|----------------------------------|
| x      | numbers, position in the sub-block first    | [S, C], C = B · (256/S)          |
| L      | codes, float32 until they are packed        | [S, C]                           |
| S, M   | sub-block codes, uint8                      | [B, 256/S]                       |
| d, dmin| float16                                     | [B]                              |

Source: ggml's quantisers (ggml-quants.c). Bytes equal its x86-64 build's; builds that fuse
multiply and add differ.

Left out: bits (``kbits``), searches (``search``), decoding (``kvalues``).
"""

from __future__ import annotations

from refllm.backend import Array, bitcast, namespace
from refllm.formats.gguf.arithmetic import divided, extreme, nearest, sequential_sum
from refllm.formats.gguf.kbits import combine, join_scales4, join_scales6
from refllm.formats.gguf.scale_search import (
    IMPORTANT,
    TINY,
    Grid,
    asymmetric,
    positive,
    swept,
    symmetric,
)

__all__ = ["ENCODERS", "half", "half_bytes"]

BLOCK = 256


def half(x: Array) -> Array:
    """float32 → the nearest float16, as float32: the step that a reader will see."""
    xp = namespace(x)
    return xp.astype(xp.astype(x, xp.float16), xp.float32)


def half_bytes(x: Array) -> Array:
    """float32 [B] → float16 bytes [B, 2]."""
    xp = namespace(x)
    return xp.reshape(
        xp.ascontiguousarray(xp.astype(x, xp.float16)).view(xp.uint8), (x.shape[0], 2)
    )


def _positions_first(x: Array, size: int) -> Array:
    """x[B, 256] → [S, C]."""
    xp = namespace(x)
    return xp.ascontiguousarray(xp.reshape(x, (-1, size)).T)


def _codes(levels: Array, blocks: int) -> Array:
    """Codes [S, C] → uint8 [B, 256], in the order of the numbers."""
    xp = namespace(levels)
    return xp.reshape(xp.ascontiguousarray(xp.astype(levels, xp.uint8).T), (blocks, BLOCK))


def _weights(x: Array, importance: Array, factor: float) -> Array:
    """importance · sqrt(σ² + x²) with σ² = factor · mean x² of each block of 256: x[B, 256]
    → [B, 256].
    """
    xp = namespace(x, importance)
    squares = x * x
    total = sequential_sum(xp.ascontiguousarray(squares.T))
    variance = factor * total / float(BLOCK)
    return importance * xp.sqrt(variance[:, None] + squares)


def _bytes_of(x: Array) -> Array:
    """nearest(x) modulo 256, as C stores it in a byte."""
    xp = namespace(x)
    return xp.astype(nearest(x) & 255, xp.uint8)


def _largest_to(values: Array, levels: int) -> tuple[Array, Array]:
    """Steps [B, J] ≥ 0 → their codes (largest = ``levels``) and the unit d[B]."""
    xp = namespace(values)
    # without NaN, which overflow may have left
    top = xp.max(xp.where(values > 0, values, 0.0), axis=1)
    inverse = divided(float(levels), top, top > 0)
    codes = _bytes_of(inverse[:, None] * values)
    return codes, top / float(levels)


def _again(
    x: Array, levels: Array, step: Array, offset: Array | None, low: int, high: int
) -> Array:
    """The third stage: codes of x[S, C] for stored steps and offsets [C]; where a step is
    0, those of the search.
    """
    xp = namespace(x, levels, step)
    some = step != 0
    t = x if offset is None else x + offset
    t = xp.astype(nearest(t / xp.where(some, step, 1.0)), xp.float32)
    return xp.where(some, xp.clip(t, float(low), float(high)) - float(low), levels)


def _with_offsets(
    x: Array,
    importance: Array | None,
    *,
    size: int,
    levels: int,
    top: int,
    grid: Grid,
    factor: float,
) -> tuple[Array, ...]:
    """Q2_K, Q4_K and Q5_K: x[B, 256] → codes[B, 256], S and M [B, 256/size], d and dmin
    [B].
    """
    xp = namespace(x, importance)
    blocks = x.shape[0]
    columns = _positions_first(x, size)
    if importance is None:
        w = xp.abs(columns)
        mad = size == 16
        if not mad:
            w = xp.sqrt(sequential_sum(columns * columns) / float(size)) + w
        found, steps, offsets = asymmetric(columns, w, levels, grid, mad=mad)
        s, d = _largest_to(xp.reshape(steps, (blocks, -1)), top)
        m, dmin = _largest_to(xp.reshape(offsets, (blocks, -1)), top)
        if top == 63:
            s = xp.minimum(s, 63)
            m = xp.minimum(m, 63)
        else:
            pair = s | (m << 4)  # the two nibbles of a byte
            s = pair & 15
            m = pair >> 4
    else:
        w = _positions_first(_weights(x, importance, factor), size)
        found, steps, offsets = asymmetric(columns, w, levels, IMPORTANT)
        hanging = _by_block(sequential_sum(w), blocks)
        codes, d = positive(_by_block(steps, blocks), top, hanging)
        s = xp.astype(codes.T, xp.uint8)
        codes, dmin = positive(_by_block(offsets, blocks), top, hanging)
        m = xp.astype(codes.T, xp.uint8)
    step = xp.reshape(half(d)[:, None] * xp.astype(s, xp.float32), (-1,))
    offset = xp.reshape(half(dmin)[:, None] * xp.astype(m, xp.float32), (-1,))
    return _codes(_again(columns, found, step, offset, 0, levels), blocks), s, m, d, dmin


def _by_block(values: Array, blocks: int) -> Array:
    """One value a sub-block, [C] → [J, B]: sub-blocks first, to be searched like positions."""
    xp = namespace(values)
    return xp.ascontiguousarray(xp.reshape(values, (blocks, -1)).T)


def q2_k(x: Array, importance: Array | None) -> Array:
    """x[B, 256] → bytes[B, 84]."""
    xp = namespace(x, importance)
    codes, s, m, d, dmin = _with_offsets(
        x, importance, size=16, levels=3, top=15, grid=Grid(-0.5, 0.1, 15), factor=1.0
    )
    return xp.concat([s | (m << 4), combine(codes, 2, 32), half_bytes(d), half_bytes(dmin)], axis=1)


def q4_k(x: Array, importance: Array | None) -> Array:
    """x[B, 256] → bytes[B, 144]."""
    xp = namespace(x, importance)
    codes, s, m, d, dmin = _with_offsets(
        x, importance, size=32, levels=15, top=63, grid=Grid(-1.0, 0.1, 20), factor=2.0
    )
    return xp.concat(
        [half_bytes(d), half_bytes(dmin), join_scales4(s, m), combine(codes, 4, 32)], axis=1
    )


def q5_k(x: Array, importance: Array | None) -> Array:
    """x[B, 256] → bytes[B, 176]."""
    xp = namespace(x, importance)
    codes, s, m, d, dmin = _with_offsets(
        x, importance, size=32, levels=31, top=63, grid=Grid(-0.5, 0.1, 15), factor=2.0
    )
    high = combine(codes >> 4, 1, 32)
    low = combine(codes & 15, 4, 32)
    return xp.concat([half_bytes(d), half_bytes(dmin), join_scales4(s, m), high, low], axis=1)


def q3_k(x: Array, importance: Array | None) -> Array:
    """x[B, 256] → bytes[B, 110]."""
    xp = namespace(x, importance)
    blocks = x.shape[0]
    columns = _positions_first(x, 16)
    if importance is None:
        found, steps = swept(columns, 4)
        s, d = _extreme_to(_by_block(steps, blocks), 32, 31)
        s = xp.where(d == 0, 0, s + 32)
    else:
        w = _positions_first(_weights(x, importance, 2.0), 16)
        found, steps = symmetric(columns, 4, w)
        s, d = symmetric(_by_block(steps, blocks), 32, _by_block(sequential_sum(w), blocks))
    step = xp.reshape((half(d) * (s - 32.0)).T, (-1,))
    codes = _codes(_again(columns, found, step, None, -4, 3), blocks)
    scales = join_scales6(xp.astype(xp.ascontiguousarray(s.T), xp.uint8))
    return xp.concat(
        [combine(codes >> 2, 1, 32), combine(codes & 3, 2, 32), scales, half_bytes(d)], axis=1
    )


def q6_k(x: Array, importance: Array | None) -> Array:
    """x[B, 256] → bytes[B, 210]."""
    xp = namespace(x, importance)
    blocks = x.shape[0]
    columns = _positions_first(x, 16)
    w = None if importance is None else _positions_first(importance, 16)
    found, steps = symmetric(columns, 32, w)
    steps = _by_block(steps, blocks)
    nothing = xp.max(xp.abs(_numbers(steps)), axis=0) < TINY
    s, d = _extreme_to(steps, 128, 127)
    step = xp.reshape((half(d) * s).T, (-1,))
    codes = _codes(_again(columns, found, step, None, -32, 31), blocks)
    scales = bitcast(xp.ascontiguousarray(xp.astype(s.T, xp.int8)), xp.uint8)
    out = xp.concat(
        [combine(codes & 15, 4, 64), combine(codes >> 4, 2, 32), scales, half_bytes(d)], axis=1
    )
    return out * xp.astype(~nothing, xp.uint8)[:, None]


def _extreme_to(steps: Array, levels: int, high: int) -> tuple[Array, Array]:
    """Signed steps [J, B] → codes (the largest in size becomes −``levels``, float32 [J, B])
    and the unit d[B].
    """
    xp = namespace(steps)
    m = extreme(_numbers(steps))
    some = m != 0
    inverse = divided(-float(levels), m, some)
    codes = xp.clip(xp.astype(nearest(inverse * steps), xp.float32), -float(levels), float(high))
    return codes, divided(1.0, inverse, some)


def _numbers(steps: Array) -> Array:
    """Steps with 0 for NaN, which is what sums that overflowed leave."""
    xp = namespace(steps)
    return xp.where(xp.isnan(steps), 0.0, steps)


ENCODERS = {"Q2_K": q2_k, "Q3_K": q3_k, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k}
