"""Ways to choose codes and scales for a group of weights, behind one interface.

A codec turns weights into what a checkpoint stores and back. `kimi7` is what this project trains and exports; the
others read or imitate what other tools write. The INT4 codecs share one dequantisation, because their file does:
bf16(code * scale). MXFP4 has its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from quant import grid

Encoded = tuple[Int8[Array, "..."], Float[Array, "..."]]
"""Codes with the shape of the weights, and scales (bf16 values as float32) with the grouped axis shortened."""

HQQ_POWER, HQQ_BETA, HQQ_STEPS = 0.7, 10.0, 20
"""Norm of the residual, sharpness and iterations of the half-quadratic fit (Badri and Shaji, HQQ, 2023)."""


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


def round_to(x: Array, scales: Array, low: int = -8, high: int = 7) -> Array:
    """Nearest codes (float32) of grouped weights for scales that broadcast to them; a zero scale gives code 0."""
    safe = jnp.where(scales == 0, jnp.full_like(scales, jnp.inf), scales)
    return jnp.clip(jnp.round(x / jnp.broadcast_to(safe, x.shape)), low, high)


def _encoded(w: Array, x: Array, scales: Array, axis: int, low: int = -8, high: int = 7) -> Encoded:
    """Pack up a choice of scales (grouped axis kept as 1)."""
    scales = jnp.where(scales == 0, jnp.ones_like(scales), scales)
    return round_to(x, scales, low, high).astype(jnp.int8).reshape(w.shape), jnp.squeeze(scales, axis)


def _groups(w: Array, axis: int, group: int) -> tuple[Array, Array]:
    x = grid.split_groups(w.astype(jnp.float32), axis, group)
    return x, grid.bf16_round(jnp.max(jnp.abs(x), axis=axis, keepdims=True))


def absmax_over(w: Float[Array, "..."], axis: int, group: int, steps: float) -> Encoded:
    """scale = absmax / steps. 7.5 is compressed-tensors' default, with codes of [-8, 7]."""
    x, absmax = _groups(w, axis, group)
    return _encoded(w, x, grid.bf16_round(absmax / steps), axis)


def least_squares(w: Float[Array, "..."], axis: int, group: int, signed: bool, high: int = 7) -> Encoded:
    """The bf16 scale, of a search around absmax / (high + 0.5), with the least squared error of the group.

    `signed` also tries negative scales, which put the code -8 on the other side: the best this file format can hold,
    legal for it, but untested in engines.
    """
    x, absmax = _groups(w, axis, group)

    def error(scales):
        return jnp.sum(jnp.square(grid.bf16_round(round_to(x, scales, -high - 1, high) * scales) - x), axis=axis, keepdims=True)

    def consider(best, ratio):
        scales = grid.bf16_round(absmax / (high + 0.5) * ratio)
        e = error(scales)
        return (jnp.where(e < best[1], scales, best[0]), jnp.minimum(e, best[1])), None

    ratios = jnp.linspace(0.6, 1.1, 51)
    if signed:
        ratios = jnp.concatenate([ratios, -ratios])
    start = grid.bf16_round(absmax / (high + 0.5))
    (scales, _), _ = jax.lax.scan(consider, (start, error(start)), ratios)
    return _encoded(w, x, scales, axis, -high - 1, high)


def half_quadratic(w: Float[Array, "..."], axis: int, group: int) -> Encoded:
    """HQQ's calibration-free fit, on the scale alone because this format has no zero point.

    Alternates between a sparse residual e = shrink(x - s q), in units of the step, and the scale that fits x - e in
    least squares. Outliers end up in e, and the scale serves the rest.
    """
    x, absmax = _groups(w, axis, group)

    def step(scales, beta):
        q = round_to(x, scales)
        r = x / jnp.where(scales == 0, jnp.ones_like(scales), scales) - q
        e = jnp.sign(r) * jax.nn.relu(jnp.abs(r) - jnp.power(jnp.abs(r) + 1e-6, HQQ_POWER - 1) / beta)
        dot = jnp.sum((x - e * scales) * q, axis=axis, keepdims=True)
        norm = jnp.sum(q * q, axis=axis, keepdims=True)
        return jnp.where(norm > 0, dot / jnp.maximum(norm, 1e-30), scales), None

    scales, _ = jax.lax.scan(step, grid.bf16_round(absmax / 7.5), HQQ_BETA * 1.01 ** jnp.arange(HQQ_STEPS))
    return _encoded(w, x, grid.bf16_round(scales), axis)


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of the four-bit float with two exponent bits and one of mantissa; code 8 and up are their negatives."""


def microscaled(w: Float[Array, "..."], axis: int, group: int) -> Encoded:
    """MXFP4 (OCP Microscaling 1.0): a power of two per group, E2M1 codes 0..15, ties to the even code."""
    x = grid.split_groups(w.astype(jnp.float32), axis, group)
    _, exponent = jnp.frexp(jnp.max(jnp.abs(x), axis=axis, keepdims=True))
    scales = jnp.ldexp(jnp.float32(1), jnp.clip(exponent - 3, -127, 127))
    y = jnp.abs(x) / scales
    middles = [(low + high) / 2 for low, high in zip(E2M1, E2M1[1:])]
    code = sum((y >= m if i % 2 else y > m).astype(jnp.int8) for i, m in enumerate(middles))
    return (code + 8 * (x < 0)).astype(jnp.int8).reshape(w.shape), jnp.squeeze(scales, axis)


def microscaled_values(codes: Array, scales: Array, axis: int, group: int) -> Array:
    magnitude = jnp.asarray(E2M1)[codes & 7]
    x = grid.split_groups(jnp.where(codes >= 8, -magnitude, magnitude), axis, group)
    return (x * jnp.expand_dims(scales, axis)).reshape(codes.shape)


KIMI7 = Codec("kimi7", -7, 7, True, grid.quantize)

CODECS = {
    codec.name: codec
    for codec in (
        KIMI7,
        Codec("ct75", -8, 7, False, partial(absmax_over, steps=7.5)),
        Codec("int3", -3, 3, True, partial(grid.quantize, levels=grid.LEVELS["int3"])),
        Codec("mse", -8, 7, False, partial(least_squares, signed=False)),
        Codec("mse3", -4, 3, False, partial(least_squares, signed=False, high=3)),
        Codec("mse_signed", -8, 7, False, partial(least_squares, signed=True)),
        Codec("hqq", -8, 7, False, half_quadratic),
        Codec("mxfp4", 0, 15, True, microscaled, microscaled_values),
    )
}
"""By name; all but mxfp4 can be written into the same pack-quantized file."""


def jitted(codec: Codec) -> Callable[[Array, int, int], Encoded]:
    """The codec's `quantize`, compiled once per shape."""
    return jax.jit(codec.quantize, static_argnums=(1, 2))
