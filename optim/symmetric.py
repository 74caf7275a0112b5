"""x y^T where the result is known to be symmetric, as x x^T or a product of commuting symmetric matrices is: four ways.

A mesh's platform and the shape choose one (`implementation`); `full` is the reference of the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
from jaxtyping import Array, Float

from optim import symmetric_gpu, symmetric_tpu
from optim.newton_schulz import matmul

WORTH_IT = 1024
"""Smallest m whose products are halved; smaller pieces would not fill a matrix unit."""

BLOCKS = 4
"""Block rows of `rows`."""


@dataclass(frozen=True)
class Product:
    """multiply  [*B, m, k] twice to [*B, m, m], summed in float32, in the dtype of the first
    share     its multiplications over those of the full product, for a given m"""

    multiply: Callable[[Array, Array], Array]
    share: Callable[[int], float]


def full(x: Float[Array, "*B m k"], y: Float[Array, "*B m k"]) -> Float[Array, "*B m m"]:
    return matmul("...ik,...jk->...ij", x, y)


def rows(x: Float[Array, "*B m k"], y: Float[Array, "*B m k"], blocks: int) -> Float[Array, "*B m m"]:
    """Every block row up to its diagonal block, and above that the mirror image of the rows below. Needs m divisible by
    `blocks`."""
    size = x.shape[-2] // blocks
    lower = [matmul("...ik,...jk->...ij", x[..., i * size:(i + 1) * size, :], y[..., :(i + 1) * size, :])
             for i in range(blocks)]
    whole = [jnp.concatenate([lower[i], *(jnp.swapaxes(lower[j][..., i * size:(i + 1) * size], -1, -2)
                                          for j in range(i + 1, blocks))], axis=-1) for i in range(blocks)]
    return jnp.concatenate(whole, axis=-2)


def by_rows(blocks: int) -> Product:
    """`rows` with so many block rows."""
    return Product(partial(rows, blocks=blocks), lambda m: (blocks + 1) / (2 * blocks))


IMPLEMENTATIONS = {
    "full": Product(full, lambda m: 1.0),
    "rows": by_rows(BLOCKS),
    "tpu": Product(symmetric_tpu.symmetric, symmetric_tpu.share),
    "hopper": Product(symmetric_gpu.symmetric, symmetric_gpu.share),
}


def implementation(platform: str, m: int, n: int) -> str:
    """Which of them the products of an m x n matrix (m <= n) take."""
    if platform == "cpu" or m < WORTH_IT:
        return "full"
    if platform == "tpu":
        return "tpu" if m % symmetric_tpu.LANES == n % symmetric_tpu.LANES == 0 else "full"
    if platform == "hopper" and symmetric_gpu.takes(m, n):
        return "hopper"
    return "rows" if m % (128 * BLOCKS) == 0 else "full"
