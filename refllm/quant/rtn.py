"""Round to nearest: every weight takes the nearest point of its grid, whatever the layer is fed. The baseline of all.

With ``mse`` the grid of each range is searched first: a narrower range clips its few largest weights and rounds all
others finer. Source of the search: the code that Frantar et al. 2022 (GPTQ) published with their paper, ``mse``.

| symbol | name                                                        | shape            |
|--------|-------------------------------------------------------------|------------------|
| W      | weight                                                      | [M, N]           |
| p      | how much of a range is kept: 1, 0.99, …, 0.21               |                  |
| s, z   | scale and zero point                                        | as ``Scheme`` says |

Left out: ranges from anything but the weights themselves (AWQ's clip search looks at the inputs too).
"""

from __future__ import annotations

from refllm.backend import Array, namespace
from refllm.formats.affine import Quantized, Scheme, decode, encode, quantize
from refllm.formats.ranges import range_to_qparams, ranges
from refllm.formats.scheme import as_blocks, steps_as_blocks

__all__ = ["params", "rtn"]

GRID, CANDIDATES, NORM = 100, 80, 2.4  # p = 1 − i/100 for i = 0 … 79; errors are summed as |x̂ − x|^2.4
_PIECE = 1 << 19  # weights at a time, so that 80 looks at them find them in a cache


def rtn(
    weight: Array,
    scheme: Scheme,
    *,
    mse: bool = False,
    scale_dtype: str | None = None,
    zero_dtype: str | None = None,
    name: str = "weight",
) -> Quantized:
    """W[M, N] rounded to nearest. ``mse`` searches the range of each scale, at about a hundred times the time.

    ``scale_dtype`` and ``zero_dtype`` are those of ``refllm.formats.affine.quantize``, as is what is refused.
    """
    if not mse:
        return quantize(weight, scheme, scale_dtype=scale_dtype, zero_dtype=zero_dtype, name=name)
    scale, zero_point = params(weight, scheme, mse=True, name=name)
    return quantize(
        weight, scheme, scale=scale, zero_point=zero_point, scale_dtype=scale_dtype, zero_dtype=zero_dtype, name=name
    )


def params(
    weight: Array, scheme: Scheme, *, mse: bool = False, one_sided: bool = False, name: str = "weight"
) -> tuple[Array, Array]:
    """Scale and zero point of each range of W[M, N], shaped as the scheme says.

    ``mse``: of the ranges p·[lo, hi], p = 1, 0.99, …, 0.21, each takes the one with the least Σ|x̂ − x|^2.4, of equal
    ones the widest; so the error in that norm is never larger than that of the whole range.

    ``one_sided`` repeats a quirk of GPTQ's published code at "half_integer_unsigned": a range without a negative
    number gets half of the step, so that what is above 7/15 of it (at 4 bits) is clipped.

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
    pieces = [_search(weight[i : i + step, :], scheme, CANDIDATES, one_sided, name)
              for i in range(0, weight.shape[0], step)]  # fmt: skip
    return xp.concat([s for s, _ in pieces], axis=0), xp.concat([z for _, z in pieces], axis=0)


def _search(weight: Array, scheme: Scheme, candidates: int, one_sided: bool, name: str) -> tuple[Array, Array]:
    xp = namespace(weight)
    lo, hi = ranges(weight, scheme, name=name)
    best, zero = _qparams(lo, hi, scheme, one_sided)
    if candidates == 1:
        return best, zero
    unit = steps_as_blocks(best, scheme, tuple(weight.shape))  # errors in steps: weights of any size, no underflow
    least = _error(weight, best, zero, unit, scheme)
    for i in range(1, candidates):
        p = 1.0 - i / GRID
        s, z = _qparams(xp.asarray(p * lo), xp.asarray(p * hi), scheme, one_sided)  # 0-d arrays stay arrays
        error = _error(weight, s, z, unit, scheme)
        better = error < least
        best, zero = xp.where(better, s, best), xp.where(better, z, zero)
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
    off = decode(encode(weight, s, z, scheme, check=False), s, z, scheme)
    off -= weight
    if scheme.granularity == "block":  # ragged blocks are filled up with no error, not with copies of their edge
        (rows, columns), (m, n) = scheme.block, off.shape
        whole = xp.zeros((s.shape[0] * rows, s.shape[1] * columns), dtype=off.dtype)
        whole[:m, :n] = off
        off = whole
    blocks = xp.abs(as_blocks(off, scheme) / unit)
    return xp.reshape(xp.sum(xp.power(blocks, NORM), axis=(1, 3)), s.shape)
