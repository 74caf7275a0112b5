"""The cache that decoding appends to: one latent per token and layer, [L, B, T, R+rope], nothing per head.

It is one array that is written where it lies (donate it, or carry it through a loop) and read block by block, as far
as the longest row reaches: neither a step's time nor its memory depends on the room that is left behind the rows.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from model.kernels.attention_chunked import MASKED

BLOCK = 512
"""Positions read at once. T must be a multiple of it, or smaller."""


def write(
    cache_LBTR: Float[Array, "L B T R+rope"],
    layer: int | Int[Array, ""],
    positions_BS: Int[Array, "B S"],
    latents_BSR: Float[Array, "B S R+rope"],
) -> Float[Array, "L B T R+rope"]:
    """The cache with these tokens of one layer; positions behind its end are dropped."""
    rows = jnp.arange(latents_BSR.shape[0])[:, None]
    return cache_LBTR.at[layer, rows, positions_BS].set(latents_BSR.astype(cache_LBTR.dtype), mode="drop")


def attend(
    queries_BSHR: Float[Array, "B S H R+rope"],
    cache_LBTR: Float[Array, "L B T R+rope"],
    layer: int | Int[Array, ""],
    positions_BS: Int[Array, "B S"],
    scale: float,
    rank: int,
) -> Float[Array, "B S H R"]:
    """softmax(q c^T scale) c[..., :rank] over the cached positions up to each query's own, with a running maximum and
    sum over blocks (arXiv 2205.14135). Queries carry kv_b's key half (model/mla.py)."""
    B, S, H, width = queries_BSHR.shape
    T = cache_LBTR.shape[2]
    block = min(BLOCK, T)
    if T % block:
        raise ValueError(f"a cache of {T} positions is not a multiple of {block}")

    def body(index, state):
        highest_BHS, total_BHS, out_BHSR = state
        cached_BTR = jax.lax.dynamic_slice(cache_LBTR, (layer, 0, index * block, 0), (1, B, block, width))[0]
        logits = jnp.einsum("BSHR,BTR->BHST", queries_BSHR, cached_BTR, preferred_element_type=jnp.float32) * scale
        seen_BST = index * block + jnp.arange(block) <= positions_BS[..., None]
        logits = jnp.where(seen_BST[:, None], logits, MASKED)
        higher = jnp.maximum(highest_BHS, logits.max(axis=-1))
        weights = jnp.exp(logits - higher[..., None])
        shrink = jnp.exp(highest_BHS - higher)
        found = jnp.einsum(
            "BHST,BTR->BHSR", weights.astype(cached_BTR.dtype), cached_BTR[..., :rank], preferred_element_type=jnp.float32
        )
        return higher, total_BHS * shrink + weights.sum(axis=-1), out_BHSR * shrink[..., None] + found

    start = (jnp.full((B, H, S), MASKED, jnp.float32), jnp.zeros((B, H, S), jnp.float32), jnp.zeros((B, H, S, rank), jnp.float32))
    blocks = jnp.max(jnp.where(positions_BS < T, positions_BS, 0)) // block + 1  # behind the end: padding, which reads nothing
    _, total, out = jax.lax.fori_loop(0, blocks, body, start)
    return jnp.swapaxes(out / total[..., None], 1, 2).astype(queries_BSHR.dtype)
