"""Grouped matmul on TPU: a Pallas kernel for each of the three products.

The grid walks the blocks of rows innermost, so a tile of an expert's weights is fetched once for all blocks of that
expert, and an expert without rows costs nothing. The contracted dimension is never cut: for the widths of this family
(7168 at most) a tile of 128 columns fits the core's memory many times over. Blocks of nobody at the end are not fetched;
their output is zero. What hangs over the edge of a width is multiplied and not written.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels.tpu import LANES, dot

TILE_BYTES = 12 << 20
"""What the tiles of one grid step may take. Pallas holds each twice: one in use, one on its way."""

INTENSITY = 512
"""Columns of a tile whose products take as long as fetching the rows for them: a v6e's FLOPs per byte, the most of all."""

LEAST_BLOCK = 16
"""Rows that fill a 16-bit register."""

VMEM_LIMIT = 40 << 20
"""Room asked of the compiler: two of each tile, float32 products, and the compiler's own. The smallest core, tpu7x's,
has 64 MiB."""


def rows(
    x: Float[Array, "M I"], w: Float[Array, "E _ _"], block_expert: Int[Array, "M/b"], transposed: bool
) -> Float[Array, "M O"]:
    """GroupedMatmul.rows."""
    (M, I), O, dtype = x.shape, w.shape[1 if transposed else 2], x.dtype
    last = len(w) - 1

    def held(block: int, o: int) -> int:
        return (I * o + block * (I + o)) * _operand_bytes(dtype) + block * o * 4

    block = M // len(block_expert)
    while block > LEAST_BLOCK and held(block, LANES) > TILE_BYTES:  # rows so wide that a tile of 128 columns has no room
        block, block_expert = block // 2, jnp.repeat(block_expert, 2)
    tile = _quickest_tile(O, lambda o: held(block, o))

    def weights_at(o, i, expert, source):
        at = jnp.minimum(expert[source[i]], last)
        return (at, o, 0) if transposed else (at, 0, o)

    return _call(
        partial(_rows_kernel, num_experts=len(w), transposed=transposed),
        (block_expert, _sources(block_expert, len(w))),
        grid=(pl.cdiv(O, tile), len(block_expert)),
        semantics=("parallel", "arbitrary"),
        in_specs=[
            pl.BlockSpec((block, I), lambda o, i, expert, source: (source[i], 0)),
            pl.BlockSpec((1, tile, I) if transposed else (1, I, tile), weights_at),
        ],
        out_specs=pl.BlockSpec((block, tile), lambda o, i, expert, source: (i, o)),
        out=jax.ShapeDtypeStruct((M, O), dtype),
        operands=(x, w),
        flops=2 * M * I * O,
        moved=(pl.cdiv(O, tile) * x.size + w.size + M * O) * dtype.itemsize,
    )


def _rows_kernel(expert, source, x, w, out, *, num_experts: int, transposed: bool):
    used = expert[pl.program_id(1)] < num_experts

    @pl.when(used)
    def _():
        out[...] = dot(x[...], w[0], 1, 1 if transposed else 0).astype(out.dtype)

    @pl.when(jnp.logical_not(used))
    def _():
        out[...] = jnp.zeros_like(out)


def weights(
    x: Float[Array, "M D"], y: Float[Array, "M F"], block_expert: Int[Array, "M/b"], num_experts: int, dtype
) -> Float[Array, "E D F"]:
    """GroupedMatmul.weights. Experts without rows have steps of their own behind all blocks, which write zeros."""
    (M, D), F = x.shape, y.shape[1]
    block = M // len(block_expert)
    rows_of = jnp.zeros(num_experts, jnp.int32).at[block_expert].add(1, mode="drop")
    idle = jnp.argsort(rows_of > 0, stable=True)[jnp.minimum(jnp.arange(num_experts), jnp.sum(rows_of == 0) - 1)]
    steps = jnp.append(block_expert, jnp.full(num_experts, num_experts, block_expert.dtype))
    source = _sources(steps, num_experts)
    # The expert whose tile a step has: of its block; behind them of the next one without rows, or still the last.
    at = jnp.where(steps[source] < num_experts, steps[source], idle[0])
    at = at.at[len(block_expert) :].set(jnp.where(jnp.any(rows_of == 0), idle, at[-1]))
    height, width = _quickest_tiles(
        D, F, lambda d, f: block * (d + f) * _operand_bytes(x.dtype) + d * f * _result_bytes(jnp.dtype(dtype))
    )
    out = jax.ShapeDtypeStruct((num_experts, D, F), dtype)
    return _call(
        partial(_weights_kernel, num_experts=num_experts),
        (steps, source, at),
        grid=(pl.cdiv(D, height), pl.cdiv(F, width), len(steps)),
        semantics=("parallel", "parallel", "arbitrary"),
        in_specs=[
            pl.BlockSpec((block, height), lambda d, f, i, expert, source, at: (source[i], d)),
            pl.BlockSpec((block, width), lambda d, f, i, expert, source, at: (source[i], f)),
        ],
        out_specs=pl.BlockSpec((1, height, width), lambda d, f, i, expert, source, at: (at[i], d, f)),
        out=out,
        operands=(x, y),
        scratch=[pltpu.VMEM((height, width), jnp.float32)],
        flops=2 * M * D * F,
        moved=(pl.cdiv(F, width) * x.size + pl.cdiv(D, height) * y.size) * x.dtype.itemsize + out.size * out.dtype.itemsize,
    )


def _weights_kernel(expert, source, at, x, y, out, total, *, num_experts: int):
    i, end = pl.program_id(2), pl.num_programs(2) - 1
    used = expert[i] < num_experts
    first = (i == 0) | (expert[i] != expert[jnp.maximum(i - 1, 0)])
    last = (i == end) | (expert[i] != expert[jnp.minimum(i + 1, end)])

    @pl.when(used & first)
    def _():
        total[...] = dot(x[...], y[...], 0, 0)

    @pl.when(used & jnp.logical_not(first))
    def _():
        total[...] += dot(x[...], y[...], 0, 0)

    @pl.when(used & last)
    def _():
        out[0] = total[...].astype(out.dtype)

    @pl.when(jnp.logical_not(used) & ((i == 0) | (at[i] != at[jnp.maximum(i - 1, 0)])))
    def _():
        out[...] = jnp.zeros_like(out)


def _sources(block_expert: Int[Array, "steps"], num_experts: int) -> Int[Array, "steps"]:
    """The block whose tiles each step has in memory: its own, and for blocks of nobody the last one in use, so that nothing
    is fetched for them."""
    in_use = jnp.sum(block_expert < num_experts)
    return jnp.minimum(jnp.arange(len(block_expert)), jnp.maximum(in_use - 1, 0)).astype(jnp.int32)


def _call(kernel, tables, *, grid, semantics, in_specs, out_specs, out, operands, flops, moved, scratch=()):
    """The kernel with its prefetched tables, an entry for every step along the last dimension of the grid. flops, bytes moved:
    of full blocks, for the compiler's scheduler and for launch.py plan, which cannot look inside a kernel."""
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(tables), grid=grid, in_specs=in_specs, out_specs=out_specs, scratch_shapes=scratch
    )
    params = pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_LIMIT)
    cost = pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0)
    run = pl.pallas_call(kernel, grid_spec=spec, out_shape=out, compiler_params=params, cost_estimate=cost)
    return run(*tables, *operands)


def _operand_bytes(dtype) -> int:
    """Of an element, over what TILE_BYTES leaves room for: float32 is multiplied as three bfloat16s, which are there as well."""
    return 6 if dtype == jnp.float32 else dtype.itemsize


def _result_bytes(dtype) -> int:
    """The same of an element of the result, which is there twice, and in float32 as a product and as a sum."""
    return 2 + dtype.itemsize


def _quickest_tile(width: int, bytes_of) -> int:
    """Of the tiles that fit: rows are read again for every tile, which takes as long as INTENSITY columns of it."""
    fits = [t for t in _tiles(width) if bytes_of(t) <= TILE_BYTES]
    return min(fits, key=lambda t: (pl.cdiv(width, t) * max(t, INTENSITY), -t), default=min(_tiles(width)))


def _quickest_tiles(D: int, F: int, bytes_of) -> tuple[int, int]:
    """Of the tiles of x and y that fit: x is read once for every tile of y, and y for every one of x."""

    def cost(t: tuple[int, int]):
        tall, wide = pl.cdiv(D, t[0]), pl.cdiv(F, t[1])
        read = (t[0] + t[1]) * tall * wide
        return max(t[0] * t[1] * tall * wide, INTENSITY * read), read, t

    fits = [(d, f) for d in _tiles(D) for f in _tiles(F) if bytes_of(d, f) <= TILE_BYTES]
    return min(fits, key=cost, default=(min(_tiles(D)), min(_tiles(F))))


def _tiles(width: int) -> list[int]:
    """Divisors in whole lanes, and all of it. Where none of them is of a good size, all in whole lanes: the last hangs over."""
    lanes = range(LANES, width, LANES)
    even = [t for t in lanes if width % t == 0]
    good = width <= 3 * INTENSITY or any(INTENSITY <= t <= 3 * INTENSITY for t in even)
    return [*(even if good and width % LANES == 0 else lanes), width]
