"""The forward grouped product where every block is one row, as in decoding for one reader, on Hopper GPUs: a vector by a
matrix, bound by reading weights. The matrices of all layers, one above the other, are such a group too (model/project.py).

Pallas' Triton backend, one warp for a row, a tile of columns and a part of the contraction. A matrix instruction would work
on sixteen rows for one, so weights are multiplied and added where they arrive, in registers; only scales go through shared
memory, to the threads that need them. Four-bit codes become bf16(code * scale) first, the value that unpacking gives, bit for
bit.
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

PROGRAMS, LEAST = 1056, 64
"""At most about so many programs: eight warps for each of 132 cores. On an H200 twice as many took an eighth longer, half as
many a sixth of four-bit weights and a third of whole ones. And at least so many rows of weights for each, beside which what
begins and ends it is little."""


def takes(dtype, w: Array | Int4Weight) -> bool:
    """Whether the kernel can multiply rows of `dtype` with these weights [E, I, O]."""
    _, inputs, outputs = w.shape
    of_its_kind = w.axis == -2 and w.group % TALL == 0 if isinstance(w, Int4Weight) else w.dtype == dtype
    fits = inputs % STEP == 0 and outputs % WIDTH == 0
    return triton is not None and dtype == jnp.bfloat16 and fits and of_its_kind


def rows(
    x: Float[Array, "P I"], w: Float[Array, "E I O"] | Int4Weight, expert_of: Int[Array, "P"], interpret: bool = False
) -> Float[Array, "P O"]:
    """GroupedMatmul.rows with blocks of one row, not transposed; zeros for a row of nobody, whatever it holds."""
    (P, I), (E, _, O) = x.shape, w.shape
    if isinstance(w, Int4Weight):
        parts, step, load, add = 4, gcd(STEP, w.group), partial(_load_codes, group=w.group), partial(_add_codes, interpret)
        codes = lax.bitcast_convert_type(w.codes.reshape(E, I, O // 4, 4), jnp.int16)
        operands = codes, lax.bitcast_convert_type(w.scales.reshape(E, -1, O // 4, 2, 2), jnp.int32)
    else:
        parts, step, load, add, operands = 1, STEP // 2, _load_whole, _add_whole, (w,)
    steps = I // step
    cuts = max(min(-(-PROGRAMS * WIDTH // (P * O)), I // LEAST), 1)

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
    of_group = expert, pl.ds(lax.div(first, group), 1), columns
    words = [triton.load(scales.at[*of_group, np.int32(half)]) for half in range(2)]
    return [triton.load(codes.at[expert, some, columns]) for some in here], words


def _add_codes(interpret: bool, sums, entries, codes, words):
    """Sums of every fourth column from the first on, from the second on, and so on: the codes of an element, from its last
    bits to its first. Their scales are halves of two words."""
    halves = (lax.shift_right_logical(word, jnp.int32(16 * half)).astype(jnp.int16) for word in words for half in range(2))
    scales = [lax.bitcast_convert_type(half, jnp.bfloat16) for half in halves]
    multiply_and_add = _plainly if interpret else _by_instructions
    for entry, four in zip(entries, codes, strict=True):
        sums = tuple(multiply_and_add(total, scales[part], four, entry, part) for part, total in enumerate(sums))
    return sums


def _plainly(total, scale, four, xs, part: int):
    """total + bf16(code * scale) * x, for one code of every element. The product of two bfloat16 numbers is exact in float32,
    so that it makes no difference whether it is rounded before it is added."""
    bits = (lax.shift_right_logical(four.astype(jnp.int32), jnp.int32(4 * part)) & jnp.int32(15)) ^ jnp.int32(8)
    weight = lax.reduce_precision((bits - 8).astype(jnp.float32) * scale.astype(jnp.float32), exponent_bits=8, mantissa_bits=7)
    return total + weight * xs


def _by_instructions(total, scale, four, xs, part: int):
    """`_plainly` for a GPU, where what Pallas makes of it takes twice as many instructions."""
    of_all = (jnp.broadcast_to(a, total.shape) for a in (scale, xs))
    (total,) = triton.elementwise_inline_asm(
        MULTIPLY_AND_ADD.format(shift=4 * part),
        args=[four, *of_all, total],
        constraints="=&f,=&f,r,r,f,f,f,f",
        pack=2,
        result_shape_dtypes=[jax.ShapeDtypeStruct(total.shape, total.dtype)],
    )
    return total


MULTIPLY_AND_ADD = """{{
.reg .b32 %w, %magic, %bits;
shr.b32 %w, $2, {shift};
mov.b32 %magic, 0x43084308;
lop3.b32 %w, %w, 0x000f000f, %magic, 0x6a;
sub.bf16x2 %w, %w, %magic;
mul.bf16x2 %w, %w, $3;
shl.b32 %bits, %w, 16;
fma.rn.f32 $0, %bits, $4, $6;
and.b32 %bits, %w, 0xffff0000;
fma.rn.f32 $1, %bits, $5, $7;
}}"""
"""Two sums ($0, $1, from $6, $7), two elements of four codes ($2), two scales ($3), and the row's entries ($4, $5).
(w & 15) ^ 8 in the last bits of 128 is the bfloat16 number 136 + code; a bfloat16 number is a float32's first half."""
