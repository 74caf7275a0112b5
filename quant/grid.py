"""The INT4 grid, defined once: training forward, PTQ, export, import and INT4 inference all call this file. (On Hopper GPUs
the training forward calls quant/grid_gpu.py, which has to give the same numbers; `verify --run` on one compares with it.)

Kimi's grid: 32 consecutive inputs share one bf16 scale, codes are the 15 integers of [-7, 7]. For a group x:

    a = bf16(max |x|)          the absmax is rounded first, which makes the map a fixed point:
    s = bf16(a / 7)            quantising a dequantised group gives the same scale and codes again
    q = round_half_even(x / s)
    value = bf16(q * s)        an all-zero group has q = 0, and s = 1 so that nothing divides by zero

`lax.reduce_precision` does every bf16 rounding: XLA may drop the rounding of an `astype` chain between fused
operations. XLA also turns `a / 7.0` into a product, which is harmless for a bf16 `a` (no quotient of one lies near the middle
of two bf16 numbers), but would not be for `x / s`: with bf16 masters one quotient in 400 is the middle of two codes, and chips
divide with errors of their own, as XLA's programs for CPUs do. So the code is set right by comparing products that float32
holds exactly (`nearest`): every chip finds the same one. With these rules 0 of 7.9 M weights differ between a jitted forward
and the exported file; without them, a quarter (docs/quantization.md).
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int8, Int32

from configs.schema import ConfigError

LEVELS = {"int4": 7, "int3": 3}
"""Largest code of each training grid: they are symmetric, and -8 is never used. int3 is there to see where damage begins."""


def bf16_round(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """float32 values rounded to the nearest bfloat16, kept as float32."""
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def split_groups(w: Array, axis: int, group: int) -> Array:
    """[..., I, ...] -> [..., I/group, group, ...]; `axis` counts from the end (negative). ConfigError where groups do not fit,
    as in a run without a grid, whose widths are free."""
    size = w.shape[axis]
    if size % group:
        raise ConfigError(
            f"an axis of {size} inputs cannot be cut into groups of {group}: weights of such widths have no place on the grid"
        )
    at = w.ndim + axis
    return w.reshape(*w.shape[:at], size // group, group, *w.shape[at + 1 :])


def quantize(
    w: Float[Array, "..."], axis: int, group: int, levels: int = LEVELS["int4"]
) -> tuple[Int8[Array, "..."], Float[Array, "..."]]:
    """Codes (int8 in [-levels, levels], shape of `w`) and scales (bf16 values as float32, `axis` shortened to I/group)."""
    x = split_groups(w.astype(jnp.float32), axis, group)
    absmax = bf16_round(largest(x, axis))
    scales = bf16_round(absmax / levels)
    scales = jnp.where(scales == 0, jnp.ones_like(scales), scales)
    scale = jnp.broadcast_to(scales, x.shape)
    codes = jnp.clip(nearest(x, scale, jnp.round(x / scale)), -levels, levels)
    return codes.astype(jnp.int8).reshape(w.shape), jnp.squeeze(scales, axis)


def largest(x: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """max |x| of float32 along an axis that stays, or NaN where one is NaN, which so makes its whole group NaN and the loss too.
    Non-negative numbers are in the order of their bits. A maximum of floats passes NaN over in XLA's programs for CPUs and in
    Triton's, and training would go on with zero in its place.
    """
    bits = jnp.max(lax.bitcast_convert_type(jnp.abs(x), jnp.int32), axis=axis, keepdims=True)
    return lax.bitcast_convert_type(bits, jnp.float32)


def nearest(x: Float[Array, "..."], scale: Float[Array, "..."], guess: Float[Array, "..."]) -> Int32[Array, "..."]:
    """round_half_even(x / scale) from a guess that is at most one off; bf16 scales.

    guess * scale has at most 12 bits and lies within a factor of two of x, so product and difference are exact. And a float32
    quotient of such numbers is a middle only where the true one is: this is also what an exact division gives.
    """
    code, rest = guess.astype(jnp.int32), 2 * (x - guess * scale)
    odd, far = code & 1 != 0, jnp.abs(rest)
    return code + jnp.where((far > scale) | (odd & (far == scale)), jnp.where(rest > 0, 1, -1), 0)


def dequantize(codes: Int8[Array, "..."], scales: Float[Array, "..."], axis: int, group: int) -> Float[Array, "..."]:
    """bf16(code * scale), as float32."""
    q = split_groups(codes.astype(jnp.float32), axis, group)
    return bf16_round(q * jnp.expand_dims(scales, axis)).reshape(codes.shape)


def on_grid(w: Float[Array, "..."], axis: int, group: int, levels: int = LEVELS["int4"]) -> Float[Array, "..."]:
    """The grid values of `w`, as float32; no gradient is defined here (quant/served.py passes it straight through)."""
    return dequantize(*quantize(w, axis, group, levels), axis, group)
