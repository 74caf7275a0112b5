"""Grouped matmul on Hopper GPUs: a Pallas kernel for each of the three products, in the frame of kernels/hopper.py.

Blocks of rows belong to one expert each (model/dispatch.py), so a tile of the forward product, or of the gradient of the
rows, is a plain matrix product with the weights of a known expert; a tile of the gradient of the weights sums over the
consecutive rows of its expert. Tiles run along the output's columns first: the cores then work on a few neighbouring blocks
at a time, whose weights stay in the second-level cache. Blocks of nobody and experts without rows are tiles of no steps:
zeros.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from kernels import hopper

AVAILABLE = hopper.plgpu is not None

STEP = 64
"""Of the contraction: 128 bytes, as far as a swizzle reaches."""

WIDTHS = {256: 1.0, 192: 0.95, 128: 0.85, 64: 0.6}
"""Columns of a tile, and the rate expected of it next to the widest: each operand byte from shared memory is used more
often in a wide one. Large products take the widest: 599 to 718 TF/s on an H200 (docs/performance.md)."""

BLOCKS = (64, 128)
"""Rows of a block that the kernels take: one or two accumulators high."""


def takes(dtype, block: int, *widths: int) -> bool:
    """Whether the kernels can multiply this: WGMMA wants 16-bit floats, TMA whole swizzles. In blocks of 64 rows the two
    workers share a tile's columns, and where the output has 64 the second one's may not hang over (see `hopper.run`)."""
    return (
        block in BLOCKS
        and dtype in (jnp.bfloat16, jnp.float16)
        and all(width % STEP == 0 for width in widths)
        and (block > STEP or min(widths) > STEP)
    )


def tile_width(width: int, multiple: int = 64) -> int:
    """The tile whose rate, less what hangs over the edge, is best."""
    fitting = [t for t in WIDTHS if t % multiple == 0]
    return max(fitting, key=lambda t: WIDTHS[t] * width / (pl.cdiv(width, t) * t))


def rows(
    x: Float[Array, "M I"], w: Float[Array, "E _ _"], block_expert: Int[Array, "M/b"], transposed: bool, cores: int | None = None
) -> Float[Array, "M O"]:
    """GroupedMatmul.rows."""
    (M, I), O, E = x.shape, w.shape[1 if transposed else 2], len(w)
    block = M // len(block_expert)
    two_high = block == 128  # the workers share a tile by rows, or where it is one accumulator high by columns
    width = tile_width(O, 64 if two_high else 128)
    columns, part = pl.cdiv(O, width), (64, width if two_high else width // 2)

    def place(tile, expert_of):
        number = lax.div(tile, columns)
        expert = expert_of[number]
        return (number * block, lax.rem(tile, columns) * width, expert), jnp.where(expert < E, pl.cdiv(I, STEP), 0)

    def source(at, step):
        row, column, expert = at
        along, across = pl.ds(step * STEP, STEP), pl.ds(column, width)
        return (pl.ds(row, block), along), (expert, across, along) if transposed else (expert, along, across)

    def offset(worker):
        return (worker * part[0], 0) if two_high else (0, worker * part[1])

    def multiply(acc, worker, x, w):
        row, column = offset(worker)
        across = pl.ds(column, part[1])
        hopper.plgpu.wgmma(acc, x.at[pl.ds(row, part[0])], hopper.transpose(w.at[across]) if transposed else w.at[:, across])

    def target(at, worker):
        row, column = offset(worker)
        return at[0] + row, at[1] + column

    tiles = hopper.Tiles(
        len(block_expert) * columns,
        ((block, STEP), (width, STEP) if transposed else (STEP, width)),
        part,
        place,
        source,
        multiply,
        target,
    )
    return hopper.run(
        tiles,
        (block_expert.astype(jnp.int32),),
        (x, w),
        jax.ShapeDtypeStruct((M, O), x.dtype),
        name="experts_rows",
        flops=2 * M * I * O,
        moved=(x.size + w.size + M * O) * x.dtype.itemsize,
        cores=cores,
    )


def weights(
    x: Float[Array, "M D"],
    y: Float[Array, "M F"],
    block_expert: Int[Array, "M/b"],
    num_experts: int,
    dtype,
    cores: int | None = None,
) -> Float[Array, "E D F"]:
    """GroupedMatmul.weights."""
    (M, D), F = x.shape, y.shape[1]
    block, width, part = M // len(block_expert), tile_width(F), 64
    height = hopper.WORKERS * part
    down, columns = pl.cdiv(D, height), pl.cdiv(F, width)

    def place(tile, first_block):
        expert = lax.div(tile, down * columns)
        inside = lax.rem(tile, down * columns)
        first = first_block[expert]
        steps = (first_block[expert + 1] - first) * (block // STEP)
        return (expert, first * block, lax.div(inside, columns) * height, lax.rem(inside, columns) * width), steps

    def source(at, step):
        _, first, row, column = at
        along = pl.ds(first + step * STEP, STEP)
        return (along, pl.ds(row, height)), (along, pl.ds(column, width))

    def multiply(acc, worker, x, y):
        hopper.plgpu.wgmma(acc, hopper.transpose(x.at[:, pl.ds(worker * part, part)]), y)

    def target(at, worker):
        expert, _, row, column = at
        return expert, row + worker * part, column

    first_block = jnp.sum(block_expert < jnp.arange(num_experts + 1)[:, None], axis=1, dtype=jnp.int32)
    tiles = hopper.Tiles(
        num_experts * down * columns, ((STEP, height), (STEP, width)), (part, width), place, source, multiply, target
    )
    out = jax.ShapeDtypeStruct((num_experts, D, F), dtype)
    return hopper.run(
        tiles,
        (first_block,),
        (x, y),
        out,
        name="experts_weights",
        flops=2 * M * D * F,
        moved=(x.size + y.size) * x.dtype.itemsize + out.size * out.dtype.itemsize,
        cores=cores,
    )
