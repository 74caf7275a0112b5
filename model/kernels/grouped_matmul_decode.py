"""The forward grouped product where an expert has a few rows, as in decoding, on Hopper GPUs: bound by reading weights.

Pallas' Triton backend, one program for each block of rows and tile of columns. Weights are read once for each block, whole
or as four-bit codes with their scales (quant/resident.py), which become bf16(code * scale) in registers: the value that
unpacking gives, bit for bit. Four codes are loaded together, neighbours along the output, and feed four products, of every
fourth column each. (Triton counts elements in signed 32 bits up to 4 GiB: of single bytes there would be too many.)
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from kernels.hopper import stated
from quant.resident import Int4Weight

try:
    from jax.experimental.pallas import triton
except (ImportError, AttributeError):  # another jax: the registry then takes the plain entry
    triton = None

BLOCKS = (16, 32)
"""Rows of a block that the kernel takes: 16 are the fewest of a matrix instruction."""

STEP, WIDTH = 64, 128
"""Of the contraction and of the columns that a program multiplies at a time: whole groups of scales, and sectors of 32
bytes also of codes. Twice as much of either was slower on an H200."""

WARPS, STAGES = 4, 4

PROGRAMS = 512
"""Of four-bit weights a program reads a part of the contraction only, so that there are about so many programs: one waits for its
weights most of the time, and several on a core hide that."""


def takes(dtype, block: int, w: Array | Int4Weight) -> bool:
    """Whether the kernel can multiply rows of `dtype` with these weights [E, I, O]."""
    _, inputs, outputs = w.shape
    of_its_kind = w.axis == -2 and STEP % w.group == 0 if isinstance(w, Int4Weight) else w.dtype == dtype
    fits = block in BLOCKS and inputs % STEP == 0 and outputs % WIDTH == 0
    return triton is not None and dtype == jnp.bfloat16 and fits and of_its_kind


def rows(
    x: Float[Array, "M I"], w: Float[Array, "E I O"] | Int4Weight, block_expert: Int[Array, "M/b"], interpret: bool = False
) -> Float[Array, "M O"]:
    """GroupedMatmul.rows, not transposed."""
    (M, I), (E, _, O), blocks = x.shape, w.shape, len(block_expert)
    if isinstance(w, Int4Weight):
        parts, pick, cuts = 4, partial(_on_grid, group=w.group), min(-(-PROGRAMS * WIDTH // (blocks * O)), I // STEP)
        operands = lax.bitcast_convert_type(w.codes.reshape(E, I, O // 4, 4), jnp.int16), w.scales.reshape(E, -1, O // 4, 4)
    else:
        parts, pick, cuts, operands = 1, _whole, 1, (w,)
    block, steps = M // blocks, I // STEP

    def kernel(expert_of, x, *refs):
        *weights, out = refs
        number, tile, cut = (pl.program_id(axis) for axis in range(3))
        expert, here = expert_of[number], pl.ds(number * block, block)
        nothing = (jnp.zeros((block, WIDTH // parts), jnp.float32),) * parts

        def store(results):
            columns = pl.ds(tile * (WIDTH // parts), WIDTH // parts)
            for part, result in enumerate(results):
                triton.store(out.at[cut, here, columns, np.int32(part)], result.astype(out.dtype))

        def add(step, results):
            rows = triton.load(x.at[here, pl.ds(step * STEP, STEP)])
            picked = pick(*weights, expert, step, tile)
            return tuple(
                total + lax.dot_general(rows, part, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
                for total, part in zip(results, picked, strict=True)
            )

        @pl.when(expert < E)
        def _():
            store(lax.fori_loop(lax.div(cut * steps, cuts), lax.div((cut + 1) * steps, cuts), add, nothing))

        @pl.when(expert >= E)
        def _():
            store(nothing)

    out_shape = jax.ShapeDtypeStruct((cuts, M, O // parts, parts), x.dtype if cuts == 1 else jnp.float32)
    run = pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=(blocks, O // WIDTH, cuts),
        interpret=interpret,
        name="experts_decoding",
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=STAGES),
    )
    moved = min(blocks, E) * sum(a.size // E * a.dtype.itemsize for a in operands) + x.size * x.dtype.itemsize
    moved += out_shape.size * out_shape.dtype.itemsize
    with stated(2 * M * I * O, moved):
        out = run(block_expert.astype(jnp.int32), x, *operands)
    return (out[0] if cuts == 1 else jnp.sum(out, axis=0).astype(x.dtype)).reshape(M, O)


def _whole(w, expert, step, tile) -> tuple[Array]:
    return (triton.load(w.at[expert, pl.ds(step * STEP, STEP), pl.ds(tile * WIDTH, WIDTH)]),)


def _on_grid(codes, scales, expert, step, tile, *, group: int) -> tuple[Array, ...]:
    """Weights of every fourth column of a tile, from its first, second, third and fourth on."""
    groups, quarter = STEP // group, WIDTH // 4
    four = triton.load(codes.at[expert, pl.ds(step * STEP, STEP), pl.ds(tile * quarter, quarter)])

    def unpacked(part):
        # A code plus eight in the last bits of 128 is the bfloat16 number 136 + code.
        bits = (lax.shift_right_logical(four, jnp.int16(4 * part)) & jnp.int16(15)) ^ jnp.int16(0x4308)
        code = lax.bitcast_convert_type(bits, jnp.bfloat16) - jnp.bfloat16(136)
        scale = triton.load(scales.at[expert, pl.ds(step * groups, groups), pl.ds(tile * quarter, quarter), np.int32(part)])
        return (code.reshape(groups, group, quarter) * scale[:, None]).reshape(STEP, quarter)

    return tuple(unpacked(part) for part in range(4))
