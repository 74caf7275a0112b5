"""Causal attention within packed documents, with the largest logit of every head.

One registry, one signature: `(q, k, v, segments, at, scale, chunk) -> (out, max_logit)`. Keys are those of a whole row;
queries may be some of its positions, `at`, ascending (a device's part of a long row). `reference` holds all logits at
once and is the definition; `chunked`, `hopper` and `tpu` are linear in memory and skip what nobody may see. Documents are
contiguous, numbered from 1; 0 is padding, whose outputs are finite and meaningless.
"""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from model.kernels.attention_chunked import MASKED, chunked

CHUNK = {"cpu": 128, "gpu": 512, "hopper": 512, "tpu": 1024}
"""Positions per chunk. On a CPU a tile of 128 x 128 stays in cache: bench/attention.py. On a TPU the products of a tile
should take longer than what a grid step costs besides, a third of a microsecond."""


def visible_BST(segments_BT: Int[Array, "B T"], at_S: Int[Array, "S"]) -> Array:
    """Which keys a query sees: earlier or its own position, same document, no padding."""
    same = (segments_BT[:, at_S, None] == segments_BT[:, None, :]) & (segments_BT[:, None, :] > 0)
    return same & (at_S[:, None] >= jnp.arange(segments_BT.shape[1]))


def reference(
    q: Float[Array, "B S H k"],
    k: Float[Array, "B T H k"],
    v: Float[Array, "B T H v"],
    segments: Int[Array, "B T"],
    at: Int[Array, "S"],
    scale: float,
    chunk: int = 0,
) -> tuple[Float[Array, "B S H v"], Float[Array, "H"]]:
    """softmax(q k^T scale) v with all logits in memory (`chunk` is not used); max_logit carries no gradient. Divided by the
    weights' sum is the product, which is smaller than the weights."""
    logits = jnp.einsum("BSHd,BTHd->BHST", q, k, preferred_element_type=jnp.float32) * scale
    logits = jnp.where(visible_BST(segments, at)[:, None], logits, MASKED)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1))  # exp's gradient is the same whatever is subtracted
    weights = jnp.exp(logits - top[..., None])
    out = jnp.einsum("BHST,BTHv->BSHv", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    out = (out / jnp.swapaxes(jnp.sum(weights, axis=-1), 1, 2)[..., None]).astype(v.dtype)
    return checkpoint_name(out, "attention_out"), jnp.max(top, axis=(0, 2))


def _hopper(*operands):
    from model.kernels import attention_gpu  # here and below: Pallas takes longer to import than jax, and a CPU needs none

    return attention_gpu.attend(*operands)


def _tpu(*operands):
    from model.kernels import attention_tpu

    return attention_tpu.attend(*operands)


IMPLEMENTATIONS = {"reference": reference, "chunked": chunked, "hopper": _hopper, "tpu": _tpu}


def implementation(platform: str, seq_len: int) -> str:
    """Which entry suits the platform and the sequence length: from two chunks on, tiles win on time and memory."""
    if platform == "hopper":
        from model.kernels import attention_gpu

        if seq_len > attention_gpu.TILE:
            return "hopper"
    if seq_len <= CHUNK[platform]:
        return "reference"
    return "tpu" if platform == "tpu" else "chunked"


def causal(q, k, v, segments, at, scale: float, platform: str) -> tuple[Array, Array]:
    """Attention by the implementation of the platform the program is compiled for; shapes as `reference`. Where the
    Hopper kernels do not take the operands, a warning says why, and another GPU's entry is used."""
    name = implementation(platform, k.shape[1])
    if name == "hopper":
        from model.kernels import attention_gpu

        if why := attention_gpu.refusal(q, v):
            warnings.warn(f"attention goes through XLA: {why}", stacklevel=2)
            name = implementation("gpu", k.shape[1])
    return IMPLEMENTATIONS[name](q, k, v, segments, at, scale, CHUNK[platform])
