"""QK-Clip: query and key projections of a head shrink when its largest attention logit passes a limit.

Per layer and head, gamma = min(1, tau / S) with S the largest scaled, pre-softmax logit of the step. Each block of
the last axis of a clipped projection is multiplied by gamma ** power, powers from `ParamSpec.clip_powers`: 0.5 for
the position-free query and key, 1 for the rotated query, whose partner key is shared by all heads and stays. Every
logit of the head then shrinks by exactly gamma. Source: Kimi K2 report, section 2.1.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from configs.param_spec import ParamSpec, Specs
from configs.schema import ConfigError


class QKClipState(NamedTuple):
    """What the last step did: heads shrunk (all layers together), and the smallest gamma (1 when none)."""

    clipped: Int[Array, ""]
    smallest: Float[Array, ""]


def gammas(max_logits: Float[Array, "L H"], tau: float) -> Float[Array, "L H"]:
    """min(1, tau / S). A maximum that is not finite is left to the guard on the loss: shrinking a head to zero
    because of one overflow would lose it for good."""
    clipped = jnp.isfinite(max_logits) & (max_logits > tau)
    return jnp.where(clipped, tau / jnp.where(clipped, max_logits, 1.0), 1.0)


def _factors(spec: ParamSpec, gamma: Float[Array, "L H"]) -> Array:
    """gamma ** power, shaped to broadcast against the stored array."""
    powers = np.repeat([p for _, p in spec.clip_powers], [n for n, _ in spec.clip_powers]).astype(np.float32)
    mine = gamma[np.array(spec.layers)]
    sizes = {"heads": mine.shape[1]}
    if "layers" in spec.axes:
        sizes["layers"] = mine.shape[0]
    mine = mine.reshape([sizes.get(axis, 1) for axis in spec.axes])
    return mine ** jnp.asarray(powers)


def qk_clip(specs: Specs, tau: float) -> optax.GradientTransformationExtraArgs:
    """Last in a chain: u becomes (p + u) * factor - p. `update` needs `max_logits`, float32 [num_hidden_layers, H],
    the maximum over batch, positions, microbatches and shards, never over layers.

    Where the factor is 1 the update passes through unchanged, bit for bit. Momentum is not rescaled.
    """
    if not tau > 0:
        raise ConfigError(f"optim.qk_clip_tau must be above 0, not {tau}; use None to switch QK-Clip off")
    clipped_paths = [path for path, spec in specs.items() if spec.clip_powers]
    if not clipped_paths:
        raise ConfigError("optim.qk_clip_tau is set, but no parameter declares clip_powers; set it to None")
    for path in clipped_paths:
        spec = specs[path]
        expected = spec.shape[spec.axis("layers")] if "layers" in spec.axes else 1
        if len(spec.layers) != expected:
            raise ConfigError(
                f"{path} stands for {expected} layers but names {len(spec.layers)} of them in "
                "ParamSpec.layers, so QK-Clip cannot find its heads"
            )
        if spec.axes[-1] == "heads":
            raise ConfigError(f"{path}: clip_powers cut the last axis, which cannot be the heads axis itself")
    reached = sorted({layer for path in clipped_paths for layer in specs[path].layers})

    def init(params):
        return QKClipState(jnp.zeros((), jnp.int32), jnp.ones((), jnp.float32))

    def update(updates, state, params, *, max_logits, **_):
        gamma = gammas(max_logits.astype(jnp.float32), tau)
        out = dict(updates)
        for path in clipped_paths:
            factor = _factors(specs[path], gamma)
            p, u = params[path].astype(jnp.float32), updates[path]
            out[path] = jnp.where(factor == 1, u, (p + u) * factor - p)
        mine = gamma[np.array(reached)]
        return out, QKClipState(jnp.sum(mine < 1).astype(jnp.int32), jnp.min(mine))

    return optax.GradientTransformationExtraArgs(init, update)
