"""x y^T on TPU where the result is known to be symmetric: a Pallas kernel that multiplies tiles on and under the diagonal
only, and writes each of the others as the mirror image of the tile it has just finished.

Mirrored in the core, the upper half costs one write. Left to the compiler (optim/symmetric.py: `rows`) it costs the half
that blocks as wide as the matrix compute twice, and three more passes over the result.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels.tpu import LANES, dot

LARGEST_TILE = 2048
"""A tile's side: 1024 FLOPs per byte fetched, twice what a v6e does in that time."""

SMALLEST_TILE = 768
"""Smaller ones fetch so much that half the products take longer than all of them in the compiler's own tiles."""

MOST_STEPS = 1 << 14
"""Entries of a schedule, of 32 bytes each: half of the smallest core's scalar memory."""

LARGEST_STEP = 512
"""Along k."""

VMEM_LIMIT = 56 << 20
"""Two of each tile, the float32 sum and its mirror image. The smallest core, tpu7x's, has 64 MiB."""


@jax.jit  # a step takes dozens of equal products: Pallas lowers each kernel once
def symmetric(x: Float[Array, "*B m k"], y: Float[Array, "*B m k"]) -> Float[Array, "*B m m"]:
    """x y^T, summed in float32, in the dtype of x. Exactly symmetric but for the blocks on the diagonal, which are
    computed in full. m and k must be multiples of LANES."""
    *batch, m, k = x.shape
    count, tile, step = math.prod(batch), _tile(m, LARGEST_TILE), _tile(k, LARGEST_STEP)
    schedule = _schedule(m // tile, k // step)
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(count, schedule.shape[1]),
        in_specs=[
            pl.BlockSpec((1, tile, step), lambda b, s, at: (b, at[0, s], at[2, s])),
            pl.BlockSpec((1, tile, step), lambda b, s, at: (b, at[1, s], at[2, s])),
        ],
        out_specs=pl.BlockSpec((1, tile, tile), lambda b, s, at: (b, at[3, s], at[4, s])),
        scratch_shapes=[pltpu.VMEM((tile, tile), jnp.float32)],
    )
    pairs = (m // tile) * (m // tile + 1) // 2
    moved = count * (2 * pairs * tile * k + m * m) * x.dtype.itemsize
    run = pl.pallas_call(
        partial(_kernel, steps=k // step, part=_part(tile)),
        grid_spec=spec,
        out_shape=jax.ShapeDtypeStruct((count, m, m), x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT),
        cost_estimate=pl.CostEstimate(flops=round(2 * count * m * m * k * share(m)), bytes_accessed=moved, transcendentals=0),
    )
    out = run(jnp.asarray(schedule), x.reshape(count, m, k), y.reshape(count, m, k))
    return out.reshape(*batch, m, m)


def takes(m: int, k: int) -> bool:
    """Whether the kernel multiplies [m, k] and [m, m], and gains by it."""
    if m % LANES or k % LANES or (tile := _tile(m, LARGEST_TILE)) < SMALLEST_TILE:
        return False
    tiles, steps = m // tile, max(m, k) // _tile(k, LARGEST_STEP)
    return tiles * (tiles + 1) // 2 * (steps + 1) <= MOST_STEPS


def share(m: int) -> float:
    """Multiplications over those of the full product."""
    tile = _tile(m, LARGEST_TILE)
    tiles, parts = m // tile, tile // _part(tile)
    return ((tiles - 1) + (parts + 1) / parts) / (2 * tiles)


def _tile(size: int, largest: int) -> int:
    return max(t for t in range(LANES, largest + 1, LANES) if size % t == 0)


def _part(tile: int) -> int:
    """Width of the blocks in a tile on the diagonal: that of a matrix unit."""
    return 2 * LANES if tile % (2 * LANES) == 0 else LANES


def _schedule(tiles: int, steps: int) -> Int[np.ndarray, "5 S"]:
    """Tile of x, tile of y, step along k, row and column of the tile of the result, in the order of the grid. An entry
    whose row is not that of x is the mirror image; it fetches nothing, its tiles of x and y are those of the one before."""
    out = []
    for i in range(tiles):
        for j in range(i + 1):
            out += [(i, j, k, i, j) for k in range(steps)]
            out += [(i, j, steps - 1, j, i)] if j < i else []
    return np.array(out, np.int32).T


def _kernel(at, x, y, out, total, *, steps: int, part: int):
    """Works on strips of `part` columns in loops: unrolled, a tile of 1024 takes the compiler seconds."""
    s = pl.program_id(1)
    i, j, k = at[0, s], at[1, s], at[2, s]
    multiplied = at[3, s] == i
    tile = total.shape[0]

    def strips(body):
        lax.fori_loop(0, tile // part, lambda n, _: body(pl.ds(pl.multiple_of(n * part, part), part), n), None)

    @pl.when(multiplied & (k == 0))
    def _():
        total[...] = jnp.zeros_like(total)

    @pl.when(multiplied & (i != j))
    def _():
        def multiply(strip, n):
            total[:, strip] += dot(x[0], y[0, strip], 1, 1)

        strips(multiply)

    @pl.when(i == j)
    def _():
        for start in range(0, tile, part):
            total[start:, start : start + part] += dot(x[0, start:], y[0, start : start + part], 1, 1)

    @pl.when(multiplied & (i != j) & (k == steps - 1))
    def _():
        out[0] = total[...].astype(out.dtype)

    @pl.when((i == j) & (k == steps - 1))
    def _():
        def mirror_above(strip, n):
            column = lax.broadcasted_iota(jnp.int32, (part, tile), 1) // part
            out[0, strip] = jnp.where(column <= n, total[strip], total[:, strip].T).astype(out.dtype)

        strips(mirror_above)

    @pl.when(jnp.logical_not(multiplied))
    def _():
        def mirror(strip, n):
            out[0, strip] = total[:, strip].T.astype(out.dtype)

        strips(mirror)
