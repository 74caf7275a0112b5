"""Learned step sizes (LSQ, arXiv 1902.08153): the scale of a group is a parameter with a gradient of its own.

Weights inside the range get the plain straight-through gradient, clipped ones none: their share goes to the scale.
Scales start from the least-squares search. train/scale_learning.py learns them for weights that stay as they are.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from quant import grid
from quant.codecs import Encoded


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def learned_grid(
    w: Float[Array, "..."], scales: Float[Array, "..."], axis: int, group: int, high: int = 7
) -> Float[Array, "..."]:
    """bf16(code * bf16(scale)) as float32, codes in [-high - 1, high]: what a pack-quantized file with these scales serves."""
    return grid.dequantize(*encode(w, scales, axis, group, high), axis, group)


@partial(jax.jit, static_argnums=(2, 3, 4))
def encode(w: Float[Array, "..."], scales: Float[Array, "..."], axis: int, group: int, high: int = 7) -> Encoded:
    """Codes and bf16 scales of `learned_grid`."""
    codes, rounded, _ = _steps(w, scales, axis, group, high)
    return codes.astype(jnp.int8).reshape(w.shape), jnp.squeeze(rounded, axis)


def _steps(w, scales, axis, group, high):
    x = grid.split_groups(w.astype(jnp.float32), axis, group)
    rounded = jnp.expand_dims(grid.bf16_round(scales), axis)
    steps = x / jnp.broadcast_to(rounded, x.shape)
    return jnp.clip(jnp.round(steps), -high - 1, high), rounded, steps


def _forward(w, scales, axis, group, high):
    return learned_grid(w, scales, axis, group, high), (w, scales)


def _backward(axis, group, high, saved, g):
    w, scales = saved
    codes, _, steps = _steps(w, scales, axis, group, high)
    inside = (steps >= -high - 1) & (steps <= high)
    g = grid.split_groups(g, axis, group)
    slope = jnp.where(inside, codes - steps, codes)
    # 1/sqrt(group * high) keeps the scale's update in proportion to the weights' (section 2.2 of the paper).
    ds = jnp.sum(g * slope, axis=axis) / jnp.sqrt(jnp.float32(group * high))
    return jnp.where(inside, g, 0).reshape(w.shape).astype(w.dtype), ds.astype(scales.dtype)


learned_grid.defvjp(_forward, _backward)
