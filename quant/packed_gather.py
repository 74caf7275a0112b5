"""Gather codes and scales instead of weights: 4.5 bits where bf16 has 16, the same numbers.

The forward pass sees only grid values, so the owner of a part may quantise it and send four bits. Unpacking after the
gather gives exactly what quantising the whole array gives, as long as no group crosses a part (quant/coverage.py).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8, UInt8

from quant import grid


def pairs(codes: Int8[Array, "..."], axis: int, group: int) -> UInt8[Array, "..."]:
    """Two codes in a byte, the halves of a group over each other: not every platform's collectives keep 4-bit elements
    packed, and the grouped axis is even in every part and never the minor one, where shuffling is dear."""
    low, high = jnp.split((grid.split_groups(codes, axis, group) + 8).astype(jnp.uint8), 2, axis)
    return _merged(low | (high << 4), axis)


def unpaired(bytes_: UInt8[Array, "..."], axis: int, group: int) -> Int8[Array, "..."]:
    """The inverse of `pairs`."""
    both = grid.split_groups(bytes_, axis, group // 2)
    return _merged(jnp.concatenate([both & 15, both >> 4], axis), axis).astype(jnp.int8) - 8


def _merged(x: Array, axis: int) -> Array:
    """The inverse of `grid.split_groups`."""
    at = x.ndim + axis
    return x.reshape(*x.shape[: at - 1], -1, *x.shape[at + 1 :])


def gather_on_grid(
    part: Float[Array, "..."],
    axis: int,
    group: int,
    dtype: str,
    gather: Callable[[Array], Array],
    levels: int = grid.LEVELS["int4"],
) -> Float[Array, "..."]:
    """Inside `jax.shard_map`: the grid values, in `dtype`, of the array whose parts of the masters the devices hold.

    axis    the grouped one, counted from the end; `group` is even
    gather  brings the parts of an array of any shape of this rank together, and may join axes behind the grouped one; linear

    Backward: as if the values had been gathered in `dtype`, straight through to the masters.
    """

    @jax.custom_vjp
    def gathered(part):
        codes, scales = grid.quantize(part, axis, group, levels)
        bytes_ = gather(pairs(codes, axis, group))
        whole_axis = axis + part.ndim - bytes_.ndim
        codes = unpaired(bytes_, whole_axis, group)
        # As their bits: XLA may widen a bf16 collective, on CPU it does.
        bits = gather(lax.bitcast_convert_type(scales.astype(jnp.bfloat16), jnp.uint16))
        scales = lax.bitcast_convert_type(bits, jnp.bfloat16).astype(jnp.float32)
        return grid.dequantize(codes, scales, whole_axis, group).astype(dtype)

    def backward(_, g):
        (mine,) = jax.linear_transpose(gather, jax.ShapeDtypeStruct(part.shape, g.dtype))(g)
        return (mine.astype(part.dtype),)

    gathered.defvjp(lambda part: (gathered(part), None), backward)
    return gathered(part)
