"""The forward grouped product where every block is one row, as in decoding for one reader, on Hopper GPUs: a vector by a
matrix, bound by reading weights.

Pallas' Triton backend, one warp for a row, a tile of columns and a part of the contraction. A matrix instruction would work
on sixteen rows for one, so weights are multiplied and added where they arrive, in registers, without shared memory or
barriers. Four-bit codes become bf16(code * scale) first, the value that unpacking gives, bit for bit.
"""

from __future__ import annotations

from functools import partial
from math import gcd

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

WIDTH, TALL, STEP = 128, 8, 32
"""Columns of a tile; rows of weights at a time, so that a thread loads sixteen bytes of codes; and in one round of the loop, so
that it has four such loads on their way and one group of scales (half as many rows of whole weights, which are eight loads)."""

PROGRAMS = 2112
"""About so many programs: sixteen warps for each of 132 cores, which is what a core needs on its way to be fed by the memory."""


def takes(dtype, w: Array | Int4Weight) -> bool:
    """Whether the kernel can multiply rows of `dtype` with these weights [E, I, O]. Triton counts bytes of codes in signed 32
    bits."""
    _, inputs, outputs = w.shape
    on_grid = isinstance(w, Int4Weight)
    return (
        triton is not None
        and dtype == jnp.bfloat16
        and inputs % STEP == 0
        and outputs % WIDTH == 0
        and (w.axis == -2 and w.group % TALL == 0 and w.codes.size // 2 < 2**31 if on_grid else w.dtype == dtype)
    )


def rows(
    x: Float[Array, "P I"], w: Float[Array, "E I O"] | Int4Weight, expert_of: Int[Array, "P"], interpret: bool = False
) -> Float[Array, "P O"]:
    """GroupedMatmul.rows with blocks of one row, not transposed; zeros for a row of nobody, whatever it holds."""
    (P, I), (E, _, O) = x.shape, w.shape
    if isinstance(w, Int4Weight):
        parts, step, load, add = 2, gcd(STEP, w.group), partial(_load_codes, group=w.group), partial(_add_codes, interpret)
        codes = lax.bitcast_convert_type(w.codes.reshape(E, I, O // 2, 2), jnp.int8)
        operands = codes, lax.bitcast_convert_type(w.scales.reshape(E, -1, O // 2, 2), jnp.int32)
    else:
        parts, step, load, add, operands = 1, STEP // 2, _load_whole, _add_whole, (w,)
    steps = I // step
    cuts = min(-(-PROGRAMS * WIDTH // (P * O)), steps)

    def kernel(expert_of, x, *refs):
        *weights, out = refs
        row, tile, cut = (pl.program_id(axis) for axis in range(3))
        expert, columns = expert_of[row], pl.ds(tile * (WIDTH // parts), WIDTH // parts)
        first, behind = lax.div(cut * steps, cuts), lax.div((cut + 1) * steps, cuts)
        nothing = (jnp.zeros((TALL, WIDTH // parts), jnp.float32),) * parts

        def loaded(number):
            here = [pl.ds(number * step + some, TALL) for some in range(0, step, TALL)]
            return [triton.load(x.at[row, some]) for some in here], load(*weights, expert, here, columns, number * step)

        def turn(number, state):
            sums, (entries, values) = state
            ahead = loaded(jnp.minimum(number + 1, behind - 1))  # a compiler would load where it is about to add
            return add(sums, [a.astype(jnp.float32)[:, None] for a in entries], *values), ahead

        def store(sums):
            for part, total in enumerate(sums):
                triton.store(out.at[cut, row, columns, np.int32(part)], jnp.sum(total, axis=0))

        @pl.when(expert < E)
        def _():
            store(lax.fori_loop(first, behind, turn, (nothing, loaded(first)))[0])

        @pl.when(expert >= E)
        def _():
            store(nothing)

    out_shape = jax.ShapeDtypeStruct((cuts, P, O // parts, parts), jnp.float32)
    run = pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=(P, O // WIDTH, cuts),
        interpret=interpret,
        name="experts_of_a_row",
        compiler_params=triton.CompilerParams(num_warps=1, num_stages=1),
    )
    moved = min(P, E) * sum(a.size // E * a.dtype.itemsize for a in operands) + 2 * x.size + 4 * out_shape.size
    with stated(2 * P * I * O, moved):
        out = run(expert_of.astype(jnp.int32), x, *operands)
    return jnp.sum(out, axis=0).astype(x.dtype).reshape(P, O)


def _load_whole(w, expert, here, columns, first):
    return ([triton.load(w.at[expert, some, columns]) for some in here],)


def _add_whole(sums, entries, weights):
    (total,) = sums
    for entry, w in zip(entries, weights, strict=True):
        total += w.astype(jnp.float32) * entry
    return (total,)


def _load_codes(codes, scales, expert, here, columns, first, *, group: int):
    of_group = triton.load(scales.at[expert, pl.ds(lax.div(first, group), 1), columns])
    return [triton.load(codes.at[expert, some, columns]) for some in here], of_group


def _add_codes(interpret: bool, sums, entries, codes, words):
    """Sums of the even columns, which are the first code of a byte and the first half of a word of scales, and of the odd."""
    halves = (lax.shift_right_logical(words, jnp.int32(16 * part)).astype(jnp.int16) for part in range(2))
    scales = [lax.bitcast_convert_type(half, jnp.bfloat16) for half in halves]
    multiply_and_add = _plainly if interpret else _by_instructions
    for entry, both in zip(entries, codes, strict=True):
        sums = tuple(multiply_and_add(total, scales[part], both, entry, part) for part, total in enumerate(sums))
    return sums


def _plainly(total, scale, both, xs, part: int):
    """total + bf16(code * scale) * x, for the first or second code of every byte. The product of two bfloat16 numbers is exact
    in float32, so that it makes no difference whether it is rounded before it is added."""
    bits = (lax.shift_right_logical(both.astype(jnp.int32), jnp.int32(4 * part)) & jnp.int32(15)) ^ jnp.int32(8)
    code = (bits - 8).astype(jnp.bfloat16)
    return total + (code * scale).astype(jnp.float32) * xs


def _by_instructions(total, scale, both, xs, part: int):
    """`_plainly` for a GPU, where what Pallas makes of it takes twice as many instructions."""
    of_all = (jnp.broadcast_to(a, total.shape) for a in (scale, xs))
    (total,) = triton.elementwise_inline_asm(
        MULTIPLY_AND_ADD.format(shift=4 * part),
        args=[both, *of_all, total],
        constraints="=&f,=&f,=&f,=&f,r,r,r,f,f,f,f,f,f,f,f",
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(total.shape, total.dtype)],
    )
    return total


MULTIPLY_AND_ADD = """{{
.reg .b32 %bytes, %a, %b, %magic, %bits;
shr.b32 %bytes, $4, {shift};
prmt.b32 %a, %bytes, %bytes, 0x4140;
prmt.b32 %b, %bytes, %bytes, 0x4342;
mov.b32 %magic, 0x43084308;
lop3.b32 %a, %a, 0x000f000f, %magic, 0x6a;
lop3.b32 %b, %b, 0x000f000f, %magic, 0x6a;
sub.bf16x2 %a, %a, %magic;
sub.bf16x2 %b, %b, %magic;
mul.bf16x2 %a, %a, $5;
mul.bf16x2 %b, %b, $6;
shl.b32 %bits, %a, 16;
fma.rn.f32 $0, %bits, $7, $11;
and.b32 %bits, %a, 0xffff0000;
fma.rn.f32 $1, %bits, $8, $12;
shl.b32 %bits, %b, 16;
fma.rn.f32 $2, %bits, $9, $13;
and.b32 %bits, %b, 0xffff0000;
fma.rn.f32 $3, %bits, $10, $14;
}}"""
"""Four sums ($0 to $3, from $11 to $14) and four bytes ($4), two scales ($5, $6) each two, and the row's entries ($7 to $10).
(bytes & 15) ^ 8 in the last bits of 128 is the bfloat16 number 136 + code; a bfloat16 number is a float32's first half."""
