"""Adam's direction, with its weight decay left to `optim.transforms`: the rule of torch.optim.AdamW.

No Nesterov term anywhere: `optax.contrib.muon` passes its own flag on and so runs NAdamW on this group.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array


class AdamState(NamedTuple):
    mu: dict[str, Array]
    nu: dict[str, Array]


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps); moments in float32. `update` needs `step`, counted from 0."""

    def init(params):
        zeros = {path: jnp.zeros(p.shape, jnp.float32) for path, p in params.items()}
        return AdamState(zeros, dict(zeros))

    def update(grads, state, params=None, *, step, **_):
        t = step.astype(jnp.float32) + 1
        mu = {path: b1 * state.mu[path] + (1 - b1) * g.astype(jnp.float32) for path, g in grads.items()}
        nu = {path: b2 * state.nu[path] + (1 - b2) * g.astype(jnp.float32) ** 2 for path, g in grads.items()}
        m_scale, v_scale = 1 / (1 - b1**t), 1 / (1 - b2**t)
        out = {path: m_scale * mu[path] / (jnp.sqrt(v_scale * nu[path]) + eps) for path in grads}
        return out, AdamState(mu, nu)

    return optax.GradientTransformationExtraArgs(init, update)
