"""What the backward pass recomputes instead of keeping."""

from __future__ import annotations

from collections.abc import Callable

import jax

NAMES = ("kv_latent", "attention_out")
"""Kept by the "names" policy besides a layer's input: cheap to hold, dear to recompute."""


def wrap(layer: Callable, policy: str) -> Callable:
    """`layer(x, call)` under the policy none, layer (recompute all of it) or names (all but NAMES)."""
    def run(layer, x, call):
        return layer(x, call)

    if policy == "names":
        run = jax.checkpoint(run, policy=jax.checkpoint_policies.save_only_these_names(*NAMES))
    elif policy == "layer":
        run = jax.checkpoint(run)
    return lambda x, call: run(layer, x, call)
