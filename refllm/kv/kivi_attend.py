"""KIVI without a cache: a whole sequence attends as if it were decoded token by token.

Source: as ``kv.kivi``. Each query reads dequantised those keys and values that a cache of
its position would hold quantised, and the others in full precision. This is the naive twin
of ``kv.kivi_cache`` for steps of one token, and measures what quantisation costs in one
forward pass.

Left out: prompts that attend to themselves in full precision (``kv.kivi_cache``).
"""

from __future__ import annotations

import math

from refllm.backend import Array, namespace
from refllm.errors import InputError
from refllm.kv.kivi import Kivi, dequantize, quantize
from refllm.model.attention import causal_bias

QUERY_TILE = 128  # queries at a time


class KiviAttend:
    """``attend`` over whole sequences in which each query reads what a cache would hold at
    its token.

    ``lengths`` as of ``CausalAttend``; with it ``measure.perplexity`` measures the loss
    from quantisation without a cache. ``keys`` and ``values`` say which elements share a
    scale: "channel", g tokens of a channel, or "token", g channels of a token. KIVI's
    choice is the default; the others are baselines. The residual window of the keys is the
    same either way; values per channel are quantised R at a time, as keys are, so half as
    many on average are in the window as with values per token.
    """

    def __init__(
        self,
        lengths: list[int],
        kivi: Kivi,
        window: int | None = None,
        *,
        keys: str = "channel",
        values: str = "token",
    ):
        for name, value in (("keys", keys), ("values", values)):
            if value not in ("channel", "token"):
                raise InputError(
                    f"KiviAttend: {name} share a scale by 'channel' or by 'token', got {value!r}"
                )
        self.lengths = lengths
        self.kivi = kivi
        self.window = window
        self.keys = keys
        self.values = values

    def __call__(self, layer: int, q: Array, k: Array, v: Array) -> Array:
        """Attend sequence by sequence; q[T, H, D], k, v[T, G, D] → [T, H, D]."""
        outputs = []
        at = 0
        for length in self.lengths:
            rows = slice(at, at + length)
            o = attend_as_decoded(
                q[rows, ...],
                k[rows, ...],
                v[rows, ...],
                self.kivi,
                window=self.window,
                keys=self.keys,
                values=self.values,
            )
            outputs.append(o)
            at += length
        if at != q.shape[0]:
            raise InputError(f"KiviAttend: lengths sum to {at}, the batch has {q.shape[0]} tokens")
        return namespace(q).concat(outputs, axis=0)


def attend_as_decoded(
    q: Array,
    k: Array,
    v: Array,
    kivi: Kivi,
    *,
    window: int | None = None,
    keys: str = "channel",
    values: str = "token",
) -> Array:
    """q[T, H, D] over k, v[T, G, D] → [T, H, D]: query t reads ``quantized_keys(t)`` keys
    dequantised, and the others in full; values likewise.
    """
    xp = namespace(q, k, v)
    total, heads, dim = q.shape
    groups = k.shape[1]
    kivi.check(dim)
    quantized_values = kivi.quantized_values
    if values == "channel":
        quantized_values = kivi.quantized_keys
    k_hat = xp.permute_dims(_round_trip(k, kivi.key_bits, kivi.group, keys), (1, 2, 0))
    v_hat = xp.permute_dims(_round_trip(v, kivi.value_bits, kivi.group, values), (1, 0, 2))
    k = xp.permute_dims(k, (1, 2, 0))  # [G, D, S], and so k_hat
    v = xp.permute_dims(v, (1, 0, 2))  # [G, S, D], and so v_hat
    j = xp.arange(total)
    outputs = []
    for first in range(0, total, QUERY_TILE):
        count = min(QUERY_TILE, total - first)
        rows = xp.reshape(q[first : first + count, ...], (count, groups, heads // groups, dim))
        rows = xp.permute_dims(rows, (1, 2, 0, 3)) * (1.0 / math.sqrt(dim))  # [G, R, T, D]
        ends_k = [kivi.quantized_keys(t) for t in range(first, first + count)]
        ends_v = [quantized_values(t) for t in range(first, first + count)]
        coarse_k = j < xp.asarray(ends_k)[:, None]  # [T, S]: the key is dequantised
        coarse_v = j < xp.asarray(ends_v)[:, None]
        # both products in full, since each query has its own boundary
        scores = xp.where(coarse_k, rows @ k_hat[:, None], rows @ k[:, None])  # [G, R, T, S]
        bias = causal_bias(xp, count, total, first, window, q.dtype)
        if bias is not None:
            scores += bias
        p = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
        p /= xp.sum(p, axis=-1, keepdims=True)
        zero = xp.zeros_like(p)
        o = xp.where(coarse_v, p, zero) @ v_hat[:, None]  # [G, R, T, D]
        o = o + xp.where(coarse_v, zero, p) @ v[:, None]
        outputs.append(xp.reshape(xp.permute_dims(o, (2, 0, 1, 3)), (count, heads, dim)))
    if outputs:
        return xp.concat(outputs, axis=0)
    return xp.zeros_like(q)


def _round_trip(x: Array, bits: int, group: int, by: str) -> Array:
    """x̂[S, G, D] of all complete groups; by channel, the tokens after the last complete
    group stay as they are.
    """
    xp = namespace(x)
    if by == "token":
        return dequantize(*quantize(x, bits, group))
    whole = x.shape[0] // group * group
    columns = xp.permute_dims(x[:whole, ...], (1, 2, 0))  # [G, D, S]
    restored = xp.permute_dims(dequantize(*quantize(columns, bits, group)), (2, 0, 1))
    return xp.concat([restored, x[whole:, ...]], axis=0)
