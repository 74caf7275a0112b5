"""What the three attention kernels share: a ring of tiles that one warpgroup fills, two that multiply what is in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from kernels import hopper
from kernels.hopper import plgpu

ROWS = 64
"""Rows of a warpgroup: those of one matrix instruction."""

GROUPS = 2
TILE = ROWS * GROUPS

LOG2E = math.log2(math.e)


def ring(per_stage: int, held: int, most: int) -> int:
    """Stages of the ring of tiles that fit beside what a block holds throughout."""
    return min(most, (hopper.SHARED_BYTES - 8192 - held) // per_stage)  # 8 KiB for rows' numbers and barriers


def tiles(*shape: int, dtype):
    """Shared memory as the matrix instructions read it."""
    return plgpu.SMEM(shape, dtype, transforms=hopper.swizzled(dtype, shape[-1]))


def rows(x: Array, shape: tuple[int, int]) -> Array:
    return lax.broadcast_in_dim(x, shape, (0,))


def cols(x: Array, shape: tuple[int, int]) -> Array:
    return lax.broadcast_in_dim(x, shape, (1,))


def multiply(total, x, tile, transposed: bool = False) -> None:
    """total += x @ tile, or @ its transpose; x in shared memory or in registers. The only place that does: Pallas'
    interpreter takes operands neither from registers nor, before jax 0.12, transposed, and tests stand in for it here."""
    plgpu.wgmma(total, x, hopper.transpose(tile) if transposed else tile)


def logits(x, tile, meanwhile: Callable = lambda: None) -> Array:
    """x @ tile^T in registers; `meanwhile` runs while it is multiplied."""

    def run(total):
        multiply(total, x, tile, transposed=True)
        meanwhile()
        return total[...]

    return pl.run_scoped(run, plgpu.ACC((x.shape[0], tile.shape[0]), jnp.float32))


def in_three(span: tuple[Array, ...], step: Callable, carry=()):
    """Tiles of which some rows see some, all see all, and again some see some."""
    first, inside, outside, end = span
    carry = lax.fori_loop(first, inside, partial(step, masked=True), carry)
    carry = lax.fori_loop(inside, outside, partial(step, masked=False), carry)
    return lax.fori_loop(outside, end, partial(step, masked=True), carry)


def fetch(span: tuple[Array, ...], stages: int, streams) -> None:
    """Copy every tile of the span into its place in the rings, when that is free. A stream is (what is copied, filled,
    freed): pairs of a source as a function of the tile and its ring, and the barriers that they share."""
    plgpu.set_max_registers(24, action="decrease")
    first, end = span[0], span[-1]

    def step(j, _):
        slot = lax.rem(j - first, jnp.int32(stages))
        for copies, filled, freed in streams:

            @pl.when(j - first >= stages)
            def _(freed=freed):
                plgpu.barrier_wait(freed.at[slot])

            for source, ring in copies:
                plgpu.copy_gmem_to_smem(source(j), ring.at[slot], filled.at[slot])
        return ()

    lax.fori_loop(first, end, step, ())


def barriers(stages: int, copies: int) -> tuple:
    """filled, freed of a stream."""
    return (plgpu.Barrier(num_arrivals=copies, num_barriers=stages), plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages))


def call(body: Callable, outputs, scratch, grid: tuple[int, int, int], operands: tuple[Array, ...], products: int):
    """The kernel on its operands; a trace shows it by the name of its body. products: columns of operands and results per
    pair of a query and a key, half of which see each other where a row is one document: what kernels/hopper.py states to
    launch.py plan."""
    kernel = plgpu.kernel(
        body,
        out_type=outputs,
        scratch_types=scratch,
        grid=grid,
        grid_names=("batch", "head", "tile"),
        num_threads=GROUPS + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    (B, S, H, _), T = operands[0].shape, operands[1].shape[1]
    moved = sum(x.size * x.dtype.itemsize for x in (*operands, *jax.tree.leaves(outputs)))
    with hopper.stated(B * H * S * T * products, moved):
        return kernel(*operands)
