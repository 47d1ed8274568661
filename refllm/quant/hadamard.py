"""Hadamard matrices, and the fast transform by them.

Sources: Sylvester 1867 (order 2^k), Paley 1933 (orders q + 1 and 2 (q + 1)); the transform as
in QuaRot (Ashkboos et al. 2024, §3) and fast-hadamard-transform.

A Hadamard matrix H has entries ±1 and orthogonal rows, so H / √n is orthogonal, and a product
by it spreads every value over all n outputs: one outlier becomes n small values. It exists for
n = 1, 2 and, as far as anybody knows, all multiples of 4. These are built here:

| order n = 2^k · m | m            | construction                                              |
|-------------------|--------------|-----------------------------------------------------------|
| 64, 128, 4096     | 1            | Sylvester: H_2n = [[H_n, H_n], [H_n, −H_n]]               |
| 1536 = 128 · 12   | q + 1        | Paley I: q a prime, q mod 4 = 3 (q = 3, 7, 11, 19, 23 …)  |
| 576 = 16 · 36     | 2 (q + 1)    | Paley II: q a prime, q mod 4 = 1 (q = 5, 13, 17, 29 …)    |

The transform of n = 2^k · m values multiplies by H_{2^k} ⊗ H_m: k rounds of sums and
differences, and one product by the small matrix. That is n (k + m) operations instead of n².

| symbol | name                              | shape  |
|--------|-----------------------------------|--------|
| Q      | Jacobsthal matrix, χ(i − j)       | [q, q] |
| χ      | quadratic character of the field  |        |

Left out: prime powers (28 = 27 + 1 is built by Paley II from 13), Williamson's matrices: so
orders such as 92 and 116 are rejected.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from refllm.backend import Array, asarray_like, namespace
from refllm.errors import InputError


def hadamard(n: int) -> np.ndarray:
    """H[n, n] with entries ±1 and H Hᵀ = n I, a host array of int8.

    >>> hadamard(4).tolist()
    [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]

    Raises
    ------
    ValueError
        for an order that none of the constructions has.
    """
    k, m = split_order(n)
    h = _paley(m)
    for _ in range(k):
        h = np.block([[h, h], [h, -h]])  # Sylvester
    return h


@lru_cache(maxsize=64)
def split_order(n: int) -> tuple[int, int]:
    """(k, m) with n = 2^k · m and m the order of a matrix that is not Sylvester's: 1 or Paley's,
    the smallest.

    >>> split_order(576), split_order(1536), split_order(64)
    ((4, 36), (7, 12), (6, 1))
    """
    if n < 1:
        raise InputError(f"a Hadamard matrix has an order of 1 or more, got {n}")
    k = (n & -n).bit_length() - 1
    odd = n >> k
    if odd == 1:
        return k, 1
    for twos in range(2, k + 1):  # orders are multiples of 4
        m = odd << twos
        if _is_prime(m - 1) or _is_prime_of_second_kind(m):
            return k - twos, m
    raise InputError(
        f"no Hadamard matrix of order {n} is built here: it is {odd} · 2^{k}, and neither "
        "Sylvester's nor Paley's constructions from primes have a factor of that form"
    )


def hadamard_transform(x: Array) -> Array:
    """x[..., n] → x Hᵀ / √n, an orthogonal transform of the last axis, in x's dtype.

    >>> import numpy as np
    >>> hadamard_transform(np.array([2.0, 0.0, 0.0, 0.0])).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    return _transform(x, transposed=False)


def inverse_transform(x: Array) -> Array:
    """x[..., n] → x H / √n, which undoes ``hadamard_transform``: H is not symmetric for
    Paley's orders of the first kind.
    """
    return _transform(x, transposed=True)


def _transform(x: Array, *, transposed: bool) -> Array:
    xp = namespace(x)
    n = int(x.shape[-1])
    k, m = split_order(n)
    y = x.reshape(*x.shape[:-1], 1 << k, m)  # [..., 2^k, m]
    if m > 1:
        small = _paley(m)
        if transposed:
            small = small.T
        y = y @ asarray_like(small.T, x, str(x.dtype))  # rows by H_m
    for round_ in range(k):
        half = 1 << round_
        pairs = y.reshape(*x.shape[:-1], (1 << k) // (2 * half), 2, half * m)
        a = pairs[..., 0, :]
        b = pairs[..., 1, :]
        y = xp.stack([a + b, a - b], axis=-2)
    scale = 1.0 / n**0.5
    out: Array = y.reshape(x.shape) * scale
    return out


def naive_transform(x: Array) -> Array:
    """The same by the whole matrix: the definition."""
    n = int(x.shape[-1])
    h = asarray_like(hadamard(n).T, x, str(x.dtype))
    out: Array = x @ h * (1.0 / n**0.5)
    return out


@lru_cache(maxsize=64)
def _paley(m: int) -> np.ndarray:
    """H[m, m] for m = 1 or an order of Paley's; the first kind where both exist."""
    if m == 1:
        return np.ones((1, 1), np.int8)
    if _is_prime(m - 1):
        q = m - 1
        # H = I + S, S = [[0, 1], [−1, Q]]: skew since q mod 4 = 3
        s = np.zeros((m, m), np.int8)
        s[0, 1:] = 1
        s[1:, 0] = -1
        s[1:, 1:] = _jacobsthal(q)
        return s + np.eye(m, dtype=np.int8)
    q = m // 2 - 1
    # S = [[0, 1], [1, Q]] is symmetric since q mod 4 = 1; 0 becomes A, ±1 becomes ±B
    s = np.zeros((q + 1, q + 1), np.int8)
    s[0, 1:] = 1
    s[1:, 0] = 1
    s[1:, 1:] = _jacobsthal(q)
    a = np.array([[1, -1], [-1, -1]], np.int8)
    b = np.array([[1, 1], [1, -1]], np.int8)
    return np.kron(s, b) + np.kron(np.eye(q + 1, dtype=np.int8), a)


def _jacobsthal(q: int) -> np.ndarray:
    """Q[i, j] = χ(i − j): 1 for a square other than 0, −1 for a non-square, 0 for 0."""
    character = -np.ones(q, np.int8)
    character[[i * i % q for i in range(1, q)]] = 1
    character[0] = 0
    i = np.arange(q)
    table: np.ndarray = character[(i[:, None] - i[None, :]) % q]
    return table


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, int(q**0.5) + 1))


def _is_prime_of_second_kind(m: int) -> bool:
    """Whether m = 2 (q + 1) for a prime q with q mod 4 = 1."""
    q = m // 2 - 1
    return q % 4 == 1 and _is_prime(q)
