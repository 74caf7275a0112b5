"""Rotary positions with YaRN, on adjacent pairs (x0, x1), (x2, x3), ... as DeepSeek-V3 checkpoints store them."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from configs.schema import ModelConfig


def inverse_frequencies(cfg: ModelConfig) -> np.ndarray:
    """[rope/2] float32 radians per position; YaRN (arXiv 2309.00071, section 3.2) when yarn_factor > 1."""
    dim = cfg.qk_rope_head_dim
    plain = 1.0 / cfg.rope_theta ** (np.arange(0, dim, 2, dtype=np.float32) / dim)
    if cfg.yarn_factor == 1.0:
        return plain.astype(np.float32)

    def pair_of(rotations: float) -> float:
        return dim * math.log(cfg.yarn_original_positions / (rotations * 2 * math.pi)) / (2 * math.log(cfg.rope_theta))

    low = max(math.floor(pair_of(cfg.yarn_beta_fast)), 0)
    high = min(math.ceil(pair_of(cfg.yarn_beta_slow)), dim - 1)
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / max(high - low, 0.001), 0, 1)
    return (plain / cfg.yarn_factor * ramp + plain * (1 - ramp)).astype(np.float32)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 or mscale == 0 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(cfg: ModelConfig) -> float:
    """Multiplies q·k: (nope + rope)^-1/2, times YaRN's m^2."""
    m = _mscale(cfg.yarn_factor, cfg.yarn_mscale_all_dim)
    return cfg.qk_head_dim**-0.5 * m * m


def rotation(cfg: ModelConfig, positions_BS: Int[Array, "B S"]) -> tuple[Array, Array]:
    """cos, sin [B, S, rope/2] in float32, with YaRN's multiplier."""
    angles = positions_BS[..., None].astype(jnp.float32) * inverse_frequencies(cfg)
    size = _mscale(cfg.yarn_factor, cfg.yarn_mscale) / _mscale(cfg.yarn_factor, cfg.yarn_mscale_all_dim)
    return jnp.cos(angles) * size, jnp.sin(angles) * size


def rotate(x: Float[Array, "B S *H rope"], cos: Array, sin: Array) -> Float[Array, "B S *H rope"]:
    """Rotate adjacent pairs; cos and sin are [B, S, rope/2]."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    if x.ndim == 4:
        cos, sin = cos[:, :, None], sin[:, :, None]
    even, odd = pairs[..., 0], pairs[..., 1]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape).astype(x.dtype)
