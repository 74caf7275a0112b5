"""Learning rate as a function of the step."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from configs.schema import ConfigError, OptimConfig

MOONLIGHT_SECOND_PEAK = 1e-4 / 4.2e-4
"""Peak of Moonlight's third stage over that of its first (arXiv 2502.16982, section 3.4)."""

MOONLIGHT_REWARM_STEPS = 100


def _cosine(progress: Array, last: float) -> Array:
    """From 1 at progress 0 to `last` at progress 1."""
    return last + (1 - last) * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))


def learning_rate(cfg: OptimConfig, total_steps: int) -> Callable[[int | Array], Float[Array, ""]]:
    """Learning rate (float32) of optimizer step 0, 1, ..., total_steps - 1.

    All schedules start with a linear warm-up: step s < W runs at (s + 1) / W of the peak.

    wsd        constant, then a cosine over the last `decay_fraction` of the steps down to `final_lr_ratio` (Kimi K2).
    cosine     one cosine from the end of the warm-up to `final_lr_ratio`.
    moonlight  cosine down to `final_lr_ratio`; over the last `decay_fraction` of the steps a short second warm-up to
               0.24 of the peak and a line to zero.
    constant   nothing after the warm-up.
    """
    if total_steps < 1:
        raise ConfigError(f"a schedule needs at least one step, not {total_steps}")
    warm, final = cfg.warmup_steps, cfg.final_lr_ratio
    tail = round(total_steps * cfg.decay_fraction)
    body = total_steps - tail

    def factor(step: Array) -> Array:
        if cfg.schedule == "constant":
            return jnp.ones_like(step)
        if cfg.schedule == "wsd":
            return _cosine((step - body + 1) / max(tail, 1), final) if tail else jnp.ones_like(step)
        if cfg.schedule == "cosine":
            return _cosine((step - warm + 1) / max(total_steps - warm, 1), final)
        first = _cosine((step - warm + 1) / max(body - warm, 1), final)
        rewarm = max(1, min(MOONLIGHT_REWARM_STEPS, tail // 10))
        up = final + (MOONLIGHT_SECOND_PEAK - final) * jnp.clip((step - body + 1) / rewarm, 0.0, 1.0)
        down = jnp.clip((total_steps - 1 - step) / max(tail - rewarm, 1), 0.0, 1.0)
        return jnp.where(step < body, first, jnp.minimum(up, MOONLIGHT_SECOND_PEAK * down))

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        warmup = jnp.minimum(1.0, (step + 1) / max(warm, 1))
        return jnp.asarray(cfg.lr * warmup * factor(step), jnp.float32)

    return rate
