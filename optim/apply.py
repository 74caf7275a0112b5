"""Adding updates to the weights, in the dtype the weights are kept in."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, UInt32


def _noise(shape: tuple[int, ...], key: PRNGKeyArray) -> UInt32[Array, "..."]:
    """32 random bits per element, a hash of its indices and the key.

    Rounding needs no more than well mixed bits, and this is plain arithmetic on iotas: XLA fuses it into the sum it is
    used in and any sharding cuts it, while `jax.random.bits` keeps an array of the weights' size in memory. Mixer:
    C. Wellons, "Prospecting for hash functions" (lowbias32).
    """
    h = jnp.broadcast_to(jax.random.bits(key, (), jnp.uint32), shape)
    for axis in (axis for axis, size in enumerate(shape) if size > 1):
        h = h + (jax.lax.broadcasted_iota(jnp.uint32, shape, axis) + 1) * np.uint32(0x9E3779B9)
        h = (h ^ (h >> 16)) * np.uint32(0x7FEB352D)
        h = (h ^ (h >> 15)) * np.uint32(0x846CA68B)
        h = h ^ (h >> 16)
    return h


def stochastic_round(x: Float[Array, "..."], key: PRNGKeyArray) -> Array:
    """float32 to bfloat16, up or down with the probability that keeps the expected value.

    x is a whole number of steps between bfloat16 values and a fraction of one; a random number of 16 bits in [0, 1) is added to
    the fraction, and what is not whole is cut off. A value that is a bfloat16 already is returned unchanged, and so is what is
    not finite. At the ends: below 2**-75 a step may be taken for a larger one, below 2**-114 nothing is drawn, and what is
    nearest to infinity becomes it.

    It is plain arithmetic without a look at the bits, because XLA for GPUs copies the sums of all gradients before it adds to
    them in a way that it cannot see through.
    """
    x = x.astype(jnp.float32)
    near = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    # Three quarters of x round to the power of two below x, or half of it for a power of two, whose fraction is none.
    step = 2.0**-7 * jax.lax.reduce_precision(0.75 * jnp.abs(x) + 2.0**-100, exponent_bits=8, mantissa_bits=0)
    noise = 2.0**-16 * (_noise(x.shape, key) >> 16).astype(jnp.float32)
    rounded = near + step * jnp.floor((x - near) / step + noise)
    return jnp.where(jnp.isfinite(near) & (x != near), rounded, near).astype(jnp.bfloat16)


def apply_updates(params: Mapping[str, Array], updates: Mapping[str, Array], key: PRNGKeyArray | None) -> dict[str, Array]:
    """params + updates. float32 weights: a plain sum. bfloat16 weights: the float32 sum, stochastically rounded.

    `key` may be None when no weight is bfloat16. Every array gets its own stream, derived from its place in the
    sorted order of the paths, so the order of the dict does not matter.
    """

    def add(index: int, path: str) -> Array:
        total = params[path].astype(jnp.float32) + updates[path]
        if params[path].dtype == jnp.float32:
            return total
        if key is None:
            raise ValueError(f"{path} is kept in {params[path].dtype}; stochastic rounding needs a random key")
        return stochastic_round(total, jax.random.fold_in(key, index))

    index = {path: i for i, path in enumerate(sorted(params))}
    return {path: add(index[path], path) for path in params}
