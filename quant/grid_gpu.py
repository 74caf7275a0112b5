"""quant/grid.py:on_grid on GPUs in one pass: Pallas' Triton backend reads a group, finds its scale and writes its values.

XLA's program reads the weights twice, for the largest of every group and for the codes, and may hold those in between. This one
reads and writes every weight once, so that seeing the experts on their grid costs little more than a cast to bfloat16 does.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from kernels.hopper import stated
from quant.grid import LEVELS, largest, nearest

try:
    from jax.experimental.pallas import triton
except (ImportError, AttributeError):  # another jax: quant/served.py then asks quant/grid.py
    triton = None

WIDTH, WARPS = 64, 1
"""Columns of a tile, which is one group high, and warps that share it. One warp finds the largest of a group without a word to
another, and narrow tiles are many: on an H200 64 columns moved 3.5 TB/s of float32 masters and values, 256 of two warps 2.4."""


MOST = 32
"""Weights of a group. With 128 the compiler takes ten seconds for a shape, and registers are not enough."""


def takes(shape: tuple[int, ...], axis: int, group: int) -> bool:
    """Whether the kernel can work on whole groups along `axis` (negative): powers of two that a warp has registers for, with
    whole tiles behind that axis."""
    at = len(shape) + axis
    whole = shape[at] % group == 0 and math.prod(shape[at + 1 :]) % WIDTH == 0
    return triton is not None and whole and group & (group - 1) == 0 and group <= MOST and axis < -1


def on_grid(
    w: Float[Array, "..."],
    axis: int,
    group: int,
    levels: int = LEVELS["int4"],
    layer: Int[Array, ""] | None = None,
    interpret: bool = False,
) -> Float[Array, "..."]:
    """The grid values of `w`, as bfloat16, which holds them exactly: the same numbers as `grid.on_grid`. Not differentiable.
    With a layer, those of w[layer], which XLA would copy for the kernel."""
    shape = w.shape if layer is None else w.shape[1:]
    behind, size = math.prod(shape[len(shape) + axis + 1 :]), math.prod(shape)
    groups, tiles = size // (group * behind), behind // WIDTH

    def kernel(w, *layer_and_out):
        # Neighbours work on the same rows, so that these are read and written whole.
        *layer, out = layer_and_out
        number = pl.program_id(0)
        row, columns = lax.div(number, tiles), (slice(None), pl.ds(lax.rem(number, tiles) * WIDTH, WIDTH))
        first = layer[0][0] * groups if layer else 0
        x = triton.load(w.at[first + row, *columns]).astype(jnp.float32)
        scale = _bf16(_bf16(largest(x, axis=0)) / levels)
        scale = jnp.where(scale == 0, 1.0, scale)
        # One reciprocal for a group gives a guess as good as a quotient of every weight does. It has to be finite.
        larger = jnp.where(scale < 2.0**-100, 2.0**100, 1.0)
        guess = jnp.floor(x * larger * (1 / (scale * larger)) + 0.5)
        codes = jnp.clip(nearest(x, jnp.broadcast_to(scale, x.shape), guess), -levels, levels)
        triton.store(out.at[row, *columns], (codes.astype(jnp.float32) * scale).astype(out.dtype))

    run = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((groups, group, behind), jnp.bfloat16),
        grid=(groups * tiles,),
        interpret=interpret,
        name="on_grid",
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
    )
    number = [] if layer is None else [jnp.int32(layer).reshape(1)]
    with stated(0, size * (w.dtype.itemsize + 2)):
        return run(w.reshape(-1, group, behind), *number).reshape(shape)


def _bf16(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`grid.bf16_round` on the bits, which Triton has no operation for."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    rounded = lax.bitcast_convert_type((bits + 0x7FFF + ((bits >> 16) & 1)) & jnp.int32(-0x10000), jnp.float32)
    return jnp.where(x == x, rounded, x)
