"""Causal attention within packed documents, with the largest logit of every head.

One registry, one signature: `(q, k, v, segments, scale) -> (out, max_logit)`. `reference` holds all logits at once
and is the definition.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

MASKED = -1e30
"""Logit of a key that may not be seen; finite, so that a fully masked (padding) row gives numbers, not NaN."""


def visible_BST(segments_BS: Int[Array, "B S"]) -> Array:
    """Which keys a query sees: earlier or its own position, same document, no padding."""
    S = segments_BS.shape[1]
    same = (segments_BS[:, :, None] == segments_BS[:, None, :]) & (segments_BS[:, None, :] > 0)
    return same & jnp.tri(S, dtype=bool)


def reference(q: Float[Array, "B S H k"], k: Float[Array, "B S H k"], v: Float[Array, "B S H v"],
              segments: Int[Array, "B S"], scale: float) -> tuple[Float[Array, "B S H v"], Float[Array, "H"]]:
    """softmax(q k^T scale) v with all logits in memory; max_logit carries no gradient."""
    logits = jnp.einsum("BSHd,BTHd->BHST", q, k, preferred_element_type=jnp.float32) * scale
    logits = jnp.where(visible_BST(segments)[:, None], logits, MASKED)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("BHST,BTHv->BSHv", weights, v), jax.lax.stop_gradient(jnp.max(logits, axis=(0, 2, 3)))


IMPLEMENTATIONS = {"reference": reference}


def causal(q, k, v, segments, scale: float, platform: str) -> tuple[Array, Array]:
    """Attention by the implementation that suits the platform and the sequence length."""
    return IMPLEMENTATIONS["reference"](q, k, v, segments, scale)
