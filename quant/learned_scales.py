"""Learned step sizes (LSQ, arXiv 1902.08153): the scale of a group is a parameter with a gradient of its own.

Weights inside the range get the plain straight-through gradient, clipped ones none: their share goes to the scale.
Scales belong to AdamW, without weight decay, and start from the least-squares search.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from quant import grid
from quant.codecs import CODECS

LOW, HIGH = -8, 7


def initial_scales(w: Float[Array, "..."], axis: int, group: int) -> Float[Array, "..."]:
    """float32 scales, `axis` shortened to I/group."""
    return CODECS["mse"].quantize(w, axis, group)[1]


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def learned_grid(w: Float[Array, "..."], scales: Float[Array, "..."], axis: int, group: int) -> Float[Array, "..."]:
    """bf16(code * bf16(scale)) as float32: what a pack-quantized file with these scales serves."""
    codes, rounded, _ = _encode(w, scales, axis, group)
    return grid.dequantize(codes.reshape(w.shape), jnp.squeeze(rounded, axis), axis, group)


def _encode(w, scales, axis, group):
    x = grid.split_groups(w.astype(jnp.float32), axis, group)
    rounded = jnp.expand_dims(grid.bf16_round(scales), axis)
    steps = x / jnp.broadcast_to(rounded, x.shape)
    return jnp.clip(jnp.round(steps), LOW, HIGH), rounded, steps


def _forward(w, scales, axis, group):
    return learned_grid(w, scales, axis, group), (w, scales)


def _backward(axis, group, saved, g):
    w, scales = saved
    codes, _, steps = _encode(w, scales, axis, group)
    inside = (steps >= LOW) & (steps <= HIGH)
    g = grid.split_groups(g, axis, group)
    slope = jnp.where(inside, codes - steps, codes)
    # 1/sqrt(group * HIGH) keeps the scale's update in proportion to the weights' (section 2.2 of the paper).
    ds = jnp.sum(g * slope, axis=axis) / jnp.sqrt(jnp.float32(group * HIGH))
    return jnp.where(inside, g, 0).reshape(w.shape).astype(w.dtype), ds.astype(scales.dtype)


learned_grid.defvjp(_forward, _backward)
