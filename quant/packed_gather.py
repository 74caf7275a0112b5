"""Gather codes and scales over `fsdp` instead of bf16 weights: 0.28 of the bytes, the same numbers.

The forward pass sees only grid values, so the owner of a shard may quantise it and send four bits. Unpacking after the
gather gives exactly what quantising the whole array gives, as long as no group crosses a shard (quant/coverage.py).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, UInt8

from quant import grid


def _pairs(codes: Array) -> UInt8[Array, "... half"]:
    """Two codes in a byte along the last axis: not every platform's collectives keep 4-bit elements packed."""
    nibbles = (codes + 8).astype(jnp.uint8)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def _unpair(pairs: UInt8[Array, "... half"]) -> Array:
    nibbles = jnp.stack([pairs & 15, pairs >> 4], axis=-1)
    return nibbles.reshape(*pairs.shape[:-1], -1).astype(jnp.int8) - 8


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def gather_on_grid(shard: Float[Array, "..."], axis: int, group: int, mesh_axis: str, dim: int) -> Float[Array, "..."]:
    """Inside `jax.shard_map`: the whole array's grid values (float32) from every device's shard of the masters.

    axis        the grouped axis, counted from the end
    mesh_axis   the mesh axis the masters are split over
    dim         the array axis that is split; the last axis must be even

    Backward: gradients are summed and split over `mesh_axis`, straight through to the masters.
    """
    codes, scales = grid.quantize(shard, axis, group)
    gather = partial(lax.all_gather, axis_name=mesh_axis, axis=dim, tiled=True)
    codes = _unpair(gather(_pairs(codes)))
    # As their bits: XLA may widen a bf16 collective, on CPU it does.
    scales = lax.bitcast_convert_type(
        gather(lax.bitcast_convert_type(scales.astype(jnp.bfloat16), jnp.uint16)), jnp.bfloat16
    )
    return grid.dequantize(codes, scales.astype(jnp.float32), axis, group)


def _forward(shard, axis, group, mesh_axis, dim):
    return gather_on_grid(shard, axis, group, mesh_axis, dim), jnp.zeros((), shard.dtype)


def _backward(axis, group, mesh_axis, dim, like, g):
    return (lax.psum_scatter(g, mesh_axis, scatter_dimension=dim, tiled=True).astype(like.dtype),)


gather_on_grid.defvjp(_forward, _backward)
