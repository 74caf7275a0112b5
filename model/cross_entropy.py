"""Cross-entropy over a large vocabulary without ever holding all logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

CHUNK = 2048
"""Tokens whose logits exist at one time."""


def chunked(hidden_ND: Float[Array, "N D"], head_DV: Float[Array, "D V"], targets_N: Int[Array, "N"], chunk: int = CHUNK
            ) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """Negative log-likelihood of each target and the log-sum-exp of its logits, float32.

    Chunks are scanned and recomputed in the backward pass, so the peak is chunk*V floats, not N*V. The head is cast
    inside the chunk: its gradient is then accumulated in the head's own dtype.
    """
    def one(hidden_CD, targets_C):
        logits = jnp.dot(hidden_CD, head_DV.astype(hidden_CD.dtype), preferred_element_type=jnp.float32)
        lse = jax.nn.logsumexp(logits, axis=-1)
        return lse - jnp.take_along_axis(logits, targets_C[:, None], axis=-1)[:, 0], lse

    N = len(targets_N)
    if chunk >= N:
        return one(hidden_ND, targets_N)
    pad = -N % chunk
    hidden = jnp.pad(hidden_ND, ((0, pad), (0, 0))).reshape(-1, chunk, hidden_ND.shape[-1])
    targets = jnp.pad(targets_N, (0, pad)).reshape(-1, chunk)
    nll, lse = jax.lax.map(lambda ht: jax.checkpoint(one)(*ht), (hidden, targets))
    return nll.reshape(-1)[:N], lse.reshape(-1)[:N]
