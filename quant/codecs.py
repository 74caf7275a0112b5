"""Ways to choose codes and scales for a group of weights, behind one interface.

A codec turns weights into what a checkpoint stores and back. `kimi7` is what this project trains and exports; the
others read or imitate what other tools write into the same file. All INT4 codecs share one dequantisation, because
the file does: bf16(code * scale).
"""

from __future__ import annotations

from dataclasses import dataclass
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from quant import grid

Encoded = tuple[Int8[Array, "..."], Float[Array, "..."]]
"""Codes with the shape of the weights, and scales (bf16 values as float32) with the grouped axis shortened."""


@dataclass(frozen=True)
class Codec:
    """One rule.

    low, high    codes it uses
    fixed_point  whether quantising a dequantised weight gives the same codes and scales again; only then may a
                 checkpoint be trained further without its original masters
    quantize     (weights, axis, group) -> Encoded; `axis` counts from the end
    dequantize   (codes, scales, axis, group) -> weights as float32
    """

    name: str
    low: int
    high: int
    fixed_point: bool
    quantize: Callable[[Array, int, int], Encoded]
    dequantize: Callable[[Array, Array, int, int], Array] = grid.dequantize

    def fake(self, w: Float[Array, "..."], axis: int, group: int) -> Float[Array, "..."]:
        """The weights a reader of the file gets, as float32."""
        return self.dequantize(*self.quantize(w, axis, group), axis, group)


def absmax_75(w: Float[Array, "..."], axis: int, group: int) -> Encoded:
    """compressed-tensors' default: scale = absmax / 7.5, codes of [-8, 7]."""
    x = grid.split_groups(w.astype(jnp.float32), axis, group)
    scales = grid.bf16_round(grid.bf16_round(jnp.max(jnp.abs(x), axis=axis, keepdims=True)) / 7.5)
    return round_to(x, scales, axis, w.shape)


def round_to(x: Array, scales: Array, axis: int, shape: tuple[int, ...], low: int = -8, high: int = 7) -> Encoded:
    """Nearest codes of grouped weights `x` for bf16 `scales` (grouped axis kept as 1), in the shape of the weights."""
    scales = jnp.where(scales == 0, jnp.ones_like(scales), scales)
    codes = jnp.clip(jnp.round(x / jnp.broadcast_to(scales, x.shape)), low, high)
    return codes.astype(jnp.int8).reshape(shape), jnp.squeeze(scales, axis)


KIMI7 = Codec("kimi7", -7, 7, True, grid.quantize)
CT75 = Codec("ct75", -8, 7, False, absmax_75)

CODECS = {codec.name: codec for codec in (KIMI7, CT75)}


def jitted(codec: Codec) -> Callable[[Array, int, int], Encoded]:
    """The codec's `quantize`, compiled once per shape."""
    return jax.jit(codec.quantize, static_argnums=(1, 2))
