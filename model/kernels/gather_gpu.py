"""Rows brought to their slots on GPUs, a copy bound by memory: Pallas' Triton backend, sixteen bytes of a thread at a time.

XLA's own gather moves eight bytes per thread behind two loads that wait for one another: on an H200 a quarter to a third of
the memory's rate (docs/performance.md).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from kernels.hopper import stated

try:
    from jax.experimental.pallas import triton
except (ImportError, AttributeError):  # another jax: model/dispatch.py then asks XLA
    triton = None

ROWS, WIDTH, WARPS = 16, 256, 4
"""Of a program: rows, columns (fewer where the width is not a multiple), warps. A thread has four loads on their way."""


FEWEST = 4096
"""Rows for which a program of its own is worth its launch; a decoding step has fewer, and nothing to wait for."""


def takes(x: Array, count: int) -> bool:
    """Whether the kernel can bring `count` rows of x [N, D] together, and should."""
    fits = x.dtype.itemsize == 2 and count % ROWS == 0 and x.shape[1] % 64 == 0
    return triton is not None and fits and count >= FEWEST


def rows(x: Float[Array, "N D"], index: Int[Array, "M"], interpret: bool = False) -> Float[Array, "M D"]:
    """x[index], zero where an index is N or more."""
    (N, D), M = x.shape, len(index)
    width = min(WIDTH, D & -D)  # the largest power of two in D
    tiles = D // width

    def kernel(index, x, out):
        # Neighbours work on the same rows, so that these are read and written whole.
        here = pl.ds(lax.div(pl.program_id(0), tiles) * ROWS, ROWS)
        first = lax.rem(pl.program_id(0), tiles) * width
        which = triton.load(index.at[here])
        is_row = jnp.broadcast_to(which[:, None] < N, (ROWS, width))
        found = triton.load(x.at[which[:, None], (first + jnp.arange(width))[None]], mask=is_row, other=0)
        triton.store(out.at[here, pl.ds(first, width)], found)

    run = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((M, D), x.dtype),
        grid=(M // ROWS * tiles,),
        interpret=interpret,
        name="rows_to_slots",
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
    )
    with stated(0, 2 * M * D * x.dtype.itemsize):
        return run(index, x)
