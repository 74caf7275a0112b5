"""x y^T where the result is known to be symmetric, as x x^T or a product of commuting symmetric matrices is: four ways.

A mesh's platform and the shape choose one (`implementation`); `full` is the reference of the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import jax.numpy as jnp
from jaxtyping import Array, Float

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
    lower = [
        matmul("...ik,...jk->...ij", x[..., i * size : (i + 1) * size, :], y[..., : (i + 1) * size, :]) for i in range(blocks)
    ]
    whole = [
        jnp.concatenate(
            [lower[i], *(jnp.swapaxes(lower[j][..., i * size : (i + 1) * size], -1, -2) for j in range(i + 1, blocks))], axis=-1
        )
        for i in range(blocks)
    ]
    return jnp.concatenate(whole, axis=-2)


def by_rows(blocks: int) -> Product:
    """`rows` with so many block rows."""
    return Product(partial(rows, blocks=blocks), lambda m: (blocks + 1) / (2 * blocks))


def by_kernel(module: str) -> Product:
    """The kernel of a module, which is imported when it is used: Pallas for GPUs and TPUs takes longer to import than jax
    itself, and a CPU needs neither."""
    return Product(lambda x, y: import_module(module).symmetric(x, y), lambda m: import_module(module).share(m))


IMPLEMENTATIONS = {
    "full": Product(full, lambda m: 1.0),
    "rows": by_rows(BLOCKS),
    "tpu": by_kernel("optim.symmetric_tpu"),
    "hopper": by_kernel("optim.symmetric_gpu"),
}


def implementation(platform: str, m: int, n: int) -> str:
    """Which of them the products of an m x n matrix (m <= n) take."""
    if platform == "cpu" or m < WORTH_IT:
        return "full"
    if platform == "tpu":
        from optim import symmetric_tpu

        return "tpu" if symmetric_tpu.takes(m, n) else "full"
    if platform == "hopper":
        from optim import symmetric_gpu

        if symmetric_gpu.takes(m, n):
            return "hopper"
    return "rows" if m % (128 * BLOCKS) == 0 else "full"
