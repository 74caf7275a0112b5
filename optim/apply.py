"""Adding updates to the weights, in the dtype the weights are kept in."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray


def stochastic_round(x: Float[Array, "..."], key: PRNGKeyArray) -> Array:
    """float32 to bfloat16, up or down with the probability that keeps the expected value.

    bfloat16 is the upper half of float32's bits: adding 16 random bits below the cut and truncating rounds up
    exactly as often as the discarded part demands. A value that is a bfloat16 already is returned unchanged, and
    so are infinities and NaN.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type(((bits + noise) >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def apply_updates(params: Mapping[str, Array], updates: Mapping[str, Array],
                  key: PRNGKeyArray | None) -> dict[str, Array]:
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
