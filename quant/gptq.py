"""GPTQ's column-by-column rounding (arXiv 2210.17323), for many matrices at once and scales that are fixed beforehand.

Column i is rounded, and its error is spread over the columns not yet rounded so that the layer's output changes least:
w_j -= (w_i - q_i) * U_ij / U_ii for j > i, with U the upper Cholesky factor of the inverse Hessian. Groups keep their
place in the file, so the order of rounding is free: columns with large inputs go first.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from quant import grid

DAMPING = 0.01
"""Of the mean of a Hessian's diagonal, added to it (the paper's)."""


@partial(jax.jit, static_argnums=(3, 4, 5))
def gptq(
    w: Float[Array, "E O I"], hessian: Float[Array, "E I I"], scales: Float[Array, "E O G"], group: int, low: int, high: int
) -> Int8[Array, "E O I"]:
    """Codes of E matrices [O, I]. `hessian` is the sum of x xT over calibration rows."""
    return jax.vmap(partial(_one, group=group, low=low, high=high))(w, hessian, scales)


def _one(w, hessian, scales, *, group, low, high):
    inputs = w.shape[1]
    order = jnp.argsort(-jnp.diagonal(hessian), stable=True)
    h = hessian[order][:, order]
    # An input that never occurs has a zero row; the added diagonal makes its column independent of the others.
    h = h + jnp.eye(inputs) * (DAMPING * jnp.mean(jnp.diagonal(h)) + 1e-12)
    inverse = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(h), True), jnp.eye(inputs))
    upper = jnp.linalg.cholesky((inverse + inverse.T) / 2).T
    upper = jnp.where(jnp.isfinite(upper).all(), upper, jnp.eye(inputs))
    x = w[:, order].astype(jnp.float32)
    steps = jnp.repeat(scales, group, axis=1)[:, order]

    def column(i, carry):
        x, codes = carry
        w_i, s_i = x[:, i], steps[:, i]
        q_i = jnp.clip(jnp.round(w_i / s_i), low, high)
        error = (w_i - grid.bf16_round(q_i * s_i)) / upper[i, i]
        later = jnp.arange(inputs) > i
        return x - jnp.outer(error, jnp.where(later, upper[i], 0)), codes.at[:, i].set(q_i)

    _, codes = jax.lax.fori_loop(0, inputs, column, (x, jnp.zeros_like(x)))
    return codes[:, jnp.argsort(order)].astype(jnp.int8)
