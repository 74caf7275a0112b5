"""Small optax transforms that both groups share. They read the one step counter through the extra argument `step`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from configs.param_spec import Specs


def global_norm(tree: Mapping[str, Array]) -> Float[Array, ""]:
    """Root of the sum of all squares, float32; 0 for an empty tree."""
    return jnp.sqrt(sum((jnp.sum(jnp.square(x.astype(jnp.float32))) for x in tree.values()), jnp.float32(0)))


def clip_to(grads: Mapping[str, Array], limit: float) -> dict[str, Array]:
    """Gradients scaled down together where their global norm exceeds `limit`; float32, because a factor rounded to bfloat16
    would miss the limit."""
    norm = global_norm(grads)
    factor = jnp.where(norm > limit, limit / norm, 1.0)
    return {path: g.astype(jnp.float32) * factor for path, g in grads.items()}


def add_decayed_weights(specs: Specs, rate: float) -> optax.GradientTransformation:
    """Decoupled weight decay: + rate * weight where the spec decays; the learning rate is applied after, and so is
    not multiplied by any shape factor (Moonlight, torch and optax agree)."""

    def update(updates, state, params):
        decayed = {
            path: u + rate * params[path].astype(jnp.float32) if rate and specs[path].decay else u for path, u in updates.items()
        }
        return decayed, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_by_rate(rate: Callable[[Array], Array]) -> optax.GradientTransformationExtraArgs:
    """Times -rate(step): what is returned is added to the weights."""

    def update(updates, state, params=None, *, step, **_):
        lr = rate(step)
        return {path: -lr * u for path, u in updates.items()}, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
