"""The router bias follows the experts' loads, once per optimizer step; no gradient reaches it.

sign     b += rate * sign(mean load - load), DeepSeek-V3 (arXiv 2408.15664).
centred  the same step minus its mean over the experts, so that the bias keeps its average (Moonlight, appendix C).
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array, Num

from configs.param_spec import Specs


def router_bias_updates(
    specs: Specs, paths: list[str], rate: float, rule: str, expert_counts: Num[Array, "L E"]
) -> dict[str, Array]:
    """Additive float32 updates. `expert_counts`: tokens per MoE layer and expert of the whole global batch, all
    microbatches and shards summed; row i is the i-th layer that owns a router bias."""
    owners = sorted(layer for path in paths for layer in specs[path].layers)
    counts = expert_counts.astype(jnp.float32)
    step = jnp.sign(jnp.sum(counts, axis=-1, keepdims=True) - counts.shape[-1] * counts)  # a mean would be rounded
    if rule == "centred":
        step = step - jnp.mean(step, axis=-1, keepdims=True)
    out: Mapping[str, Array] = {}
    for path in paths:
        rows = [owners.index(layer) for layer in specs[path].layers]
        mine = step if len(paths) == 1 else step[jnp.array(rows)]
        out[path] = rate * mine.reshape(specs[path].shape)
    return out
