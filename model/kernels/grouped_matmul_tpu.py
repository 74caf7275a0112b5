"""Grouped matmul on TPU: a Pallas kernel for each of the three products.

The grid walks the blocks of rows innermost, so a tile of an expert's weights is fetched once for all blocks of that
expert, and an expert without rows costs nothing. The contracted dimension is never cut: for the widths of this family
(7168 at most) a tile of 128 columns fits the core's memory many times over. Blocks of nobody at the end are not fetched;
their output is zero.
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

VMEM_LIMIT = 40 << 20
"""Room asked of the compiler: two of each tile, float32 products, and the compiler's own. The smallest core, tpu7x's,
has 64 MiB."""


def rows(
    x: Float[Array, "M I"], w: Float[Array, "E _ _"], block_expert: Int[Array, "M/b"], transposed: bool
) -> Float[Array, "M O"]:
    """GroupedMatmul.rows."""
    (M, I), O, dtype = x.shape, w.shape[1 if transposed else 2], x.dtype
    block, last = M // len(block_expert), len(w) - 1
    tile = _largest_tile(O, lambda o: (I * o + block * (I + o)) * dtype.itemsize + block * o * 4)

    def weights_at(o, i, expert, source):
        at = jnp.minimum(expert[source[i]], last)
        return (at, o, 0) if transposed else (at, 0, o)

    return _call(
        partial(_rows_kernel, num_experts=len(w), transposed=transposed),
        (block_expert, _sources(block_expert, len(w))),
        grid=(O // tile, len(block_expert)),
        semantics=("parallel", "arbitrary"),
        in_specs=[
            pl.BlockSpec((block, I), lambda o, i, expert, source: (source[i], 0)),
            pl.BlockSpec((1, tile, I) if transposed else (1, I, tile), weights_at),
        ],
        out_specs=pl.BlockSpec((block, tile), lambda o, i, expert, source: (i, o)),
        out=jax.ShapeDtypeStruct((M, O), dtype),
        operands=(x, w),
        flops=2 * M * I * O,
        moved=(O // tile * x.size + w.size + M * O) * dtype.itemsize,
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
    height, width = _least_traffic(D, F, lambda d, f: block * (d + f) * x.dtype.itemsize + d * f * 4)
    out = jax.ShapeDtypeStruct((num_experts, D, F), dtype)
    return _call(
        partial(_weights_kernel, num_experts=num_experts),
        (steps, source, at),
        grid=(D // height, F // width, len(steps)),
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
        moved=(F // width * x.size + D // height * y.size) * x.dtype.itemsize + out.size * out.dtype.itemsize,
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


def _largest_tile(width: int, bytes_of) -> int:
    """The largest divisor of `width` whose tiles fit."""
    return max((t for t in _tiles(width) if bytes_of(t) <= TILE_BYTES), default=min(_tiles(width)))


def _least_traffic(D: int, F: int, bytes_of) -> tuple[int, int]:
    """Of the tiles of x and y that fit those that are read least: x once for every tile of y, and y for every one of x."""
    fits = [(d, f) for d in _tiles(D) for f in _tiles(F) if bytes_of(d, f) <= TILE_BYTES]
    return min(fits, key=lambda t: (D * (F // t[1]) + F * (D // t[0]), t), default=(min(_tiles(D)), min(_tiles(F))))


def _tiles(width: int) -> list[int]:
    """Divisors in whole lanes, or all of it where lanes do not divide it."""
    return [t for t in range(LANES, width + 1, LANES) if width % t == 0] or [width]
