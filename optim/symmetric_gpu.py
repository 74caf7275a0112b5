"""x y^T on Hopper GPUs where the result is known to be symmetric, in the frame of kernels/hopper.py: only tiles that reach
the diagonal or lie under it are multiplied, and what lies under it is stored a second time, mirrored, above.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from kernels import hopper

AVAILABLE = hopper.plgpu is not None

HEIGHT, WIDTH, STEP = 128, 256, 64
"""Of a tile, and of the contraction: 128 bytes, as far as a swizzle reaches."""


def takes(m: int, k: int) -> bool:
    """Whether the kernel can multiply [m, k] 16-bit floats: squares of 64 x 64 are mirrored, k is read in whole swizzles. A
    tile may hang over the edge of an output of several squares, not of one (see `hopper.run`)."""
    return AVAILABLE and m > 64 and m % 64 == 0 and k % STEP == 0


@partial(jax.jit, static_argnames="cores")  # a step takes dozens of equal products: Pallas lowers each kernel once
def symmetric(x: Float[Array, "*B m k"], y: Float[Array, "*B m k"], cores: int | None = None) -> Float[Array, "*B m m"]:
    """x y^T, summed in float32, in the dtype of x. Exactly symmetric but for the 64 x 64 squares on the diagonal, which are
    computed in full."""
    *batch, m, k = x.shape
    count, schedule = math.prod(batch), _schedule(m)
    pairs = schedule.shape[1]

    def place(tile, rows, columns):
        pair = lax.rem(tile, pairs)
        return (lax.div(tile, pairs), rows[pair] * HEIGHT, columns[pair] * WIDTH), jnp.int32(pl.cdiv(k, STEP))

    def source(at, step):
        which, row, column = at
        along = pl.ds(step * STEP, STEP)
        return (which, pl.ds(row, HEIGHT), along), (which, pl.ds(column, WIDTH), along)

    def multiply(total, worker, x, y):
        hopper.plgpu.wgmma(total, x.at[pl.ds(worker * 64, 64)], hopper.transpose(y))

    def target(at, worker):
        which, row, column = at
        return which, row + worker * 64, column

    tiles = hopper.Tiles(
        count * pairs, ((HEIGHT, STEP), (WIDTH, STEP)), (64, WIDTH), place, source, multiply, target, mirrored=True
    )
    flops = 2 * count * pairs * HEIGHT * WIDTH * k
    moved = count * (pairs * (HEIGHT + WIDTH) * k + m * m) * x.dtype.itemsize
    out = hopper.run(
        tiles,
        tuple(jnp.asarray(schedule)),
        (x.reshape(count, m, k), y.reshape(count, m, k)),
        jax.ShapeDtypeStruct((count, m, m), x.dtype),
        name="half_product",
        flops=flops,
        moved=moved,
        cores=cores,
    )
    return out.reshape(*batch, m, m)


def share(m: int) -> float:
    """Multiplications over those of the full product."""
    return _schedule(m).shape[1] * HEIGHT * WIDTH / m**2


def _schedule(m: int) -> Int[np.ndarray, "2 P"]:
    """Row and column of the tiles that reach the diagonal or lie under it. Neighbours share rows of x or y."""
    return np.array(
        [(i, j) for i in range(-(-m // HEIGHT)) for j in range((min((i + 1) * HEIGHT, m) - 1) // WIDTH + 1)], np.int32
    ).T
