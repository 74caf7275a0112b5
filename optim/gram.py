"""Newton-Schulz on the small side of a matrix: the same polynomial with fewer multiplications where n >> m.

With R = X X^T every step is X <- P X for a polynomial P of R, and R <- P R P. So several steps can be taken on m x m
matrices before X itself (m x n) is touched: Q <- P Q, then X <- Q X. Rounding makes R drift away from X X^T, and the
drift grows until the result explodes; a restart, which recomputes R from X, bounds it. How many steps a format stands
was measured on the worst spectra we know (tests/optim/test_newton_schulz.py repeats that for every set); on the
matrices of a run, `guarded` watches. (The idea is Dao-AILab's Gram Newton-Schulz.)
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from optim.newton_schulz import Coefficients, matmul, newton_schulz, normalize, singular_value_band, standard_flops
from optim.symmetric import IMPLEMENTATIONS

STEPS_PER_RESTART = {"float32": 3, "float16": 3, "bfloat16": 2}
"""Longest segment after the first. One more in bfloat16 lets singular values grow 35 % over the band of the keller set
and to infinity with ten steps."""

GENTLE = 12.0
"""A set whose first two slopes at zero multiply to at most this (keller: 11.9) takes three steps before its first restart,
any other two: rounding noise in R grows by the square of each slope. With three, quintic (16.1) and polar_express (33)
explode in bfloat16. In 16 bits the third step of such a set stands alone: with the fourth it leaves polar_express' band by a
quarter where half of the values are a twentieth of the others."""

GUARD = "guard"
"""Scope of the way out that a healthy run never takes: train/plan/census.py counts the other branch."""

GUARD_SLACK = 1.1
"""A matrix whose RMS singular value exceeds the top of the band by this factor has exploded."""


def gram_newton_schulz(
    x: Float[Array, "*B m n"], coeffs: Coefficients, segments: tuple[int, ...], dtype, product: str = "full"
) -> Float[Array, "*B m n"]:
    """As `newton_schulz`, restarting after each of `segments` (their sum is the number of steps).

    `product`: of optim/symmetric.py; every m x m product here is one of commuting symmetric matrices. A tall matrix is
    transposed first; on a CPU before its product, which would take XLA's slow way if it were the transposition too.
    """
    symmetric = IMPLEMENTATIONS[product].multiply
    tall = x.shape[-2] > x.shape[-1]
    x = normalize(x).astype(dtype)
    if tall:
        x = lax.platform_dependent(jnp.swapaxes(x, -1, -2), cpu=lax.optimization_barrier, default=lambda x: x)
    identity = jnp.eye(x.shape[-2], dtype=dtype)
    start = 0
    for length in segments:
        r, q = symmetric(x, x), None
        for i, (a, b, c) in enumerate(coeffs[start : start + length]):
            p = a * identity + b * r + c * symmetric(r, r)
            q = p if q is None else symmetric(p, q)
            if i < length - 1:
                r = symmetric(symmetric(p, r), p)
        x = matmul("...ik,...kj->...ij", q, x)
        start += length
    return jnp.swapaxes(x, -1, -2) if tall else x


def gram_flops(m: int, n: int, segments: tuple[int, ...], product: str = "full") -> int:
    """Of one matrix: per segment X X^T and Q X, and of m x m products one square per step, and per step after the
    first one for Q and two for R."""
    m, n = min(m, n), max(m, n)
    share = IMPLEMENTATIONS[product].share(m)
    return round(sum(2 * m * m * n * (1 + share) + 2 * m**3 * share * (4 * length - 3) for length in segments))


def segments_for(coeffs: Coefficients, dtype: str) -> tuple[int, ...]:
    """Where to restart in a number format."""
    gentle = math.prod(a for a, _, _ in coeffs[:2]) <= GENTLE
    begin = [3] if gentle else [2] if dtype == "float32" else [2, 1]
    longest, left, segments = [*begin, *[STEPS_PER_RESTART[dtype]] * len(coeffs)], len(coeffs), []
    while left:
        segments.append(min(longest[len(segments)], left))
        left -= segments[-1]
    return tuple(segments)


def guarded(
    x: Float[Array, "*B m n"], coeffs: Coefficients, segments: tuple[int, ...], dtype, fallback_dtype, product: str = "full"
) -> Float[Array, "*B m n"]:
    """`gram_newton_schulz`, replaced by the plain iteration for the whole batch if any matrix came out too large or
    not finite. Costs one pass over the result; the second computation runs only when it is needed."""
    y = gram_newton_schulz(x, coeffs, segments, dtype, product)
    limit = math.sqrt(min(x.shape[-2:])) * singular_value_band(coeffs, 0.0)[1] * GUARD_SLACK
    sound = jnp.all(jnp.sum(jnp.square(y.astype(jnp.float32)), axis=(-2, -1)) <= limit**2)
    with jax.named_scope(GUARD):
        return lax.cond(sound, lambda: y.astype(x.dtype), lambda: newton_schulz(x, coeffs, fallback_dtype).astype(x.dtype))


def cheaper(m: int, n: int, segments: tuple[int, ...], product: str) -> bool:
    """Whether the Gram form saves at least a tenth; below that its extra passes over memory eat the gain."""
    return gram_flops(m, n, segments, product) < 0.9 * standard_flops(m, n, sum(segments))
