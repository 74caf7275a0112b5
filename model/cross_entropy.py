"""Cross-entropy over a large vocabulary without ever holding all logits.

One registry, one signature: `(hidden, head, targets, tokens) -> (nll, lse)`. `reference` is the definition. `tiled`
holds one tile of logits at a time, forward and backward, so its memory depends neither on the number of tokens nor
on the vocabulary.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from model.project import outer_sum

TILE = 2048
"""Tokens and vocabulary entries of one tile: 16 MiB of float32 logits. A tile's products read and write about
8 * D * 2 * TILE bytes for 6 * D * TILE**2 operations: far above the ratio where memory, not arithmetic, is the limit."""


def reference(hidden_ND: Float[Array, "N D"], head_DV: Float[Array, "D V"], targets_N: Int[Array, "N"], tokens: int = 0
              ) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """Negative log-likelihood of each target and the log-sum-exp of its logits, float32 (`tokens` is not used)."""
    logits = jnp.dot(hidden_ND, head_DV.astype(hidden_ND.dtype), preferred_element_type=jnp.float32)
    lse = jax.nn.logsumexp(logits, axis=-1)
    return lse - jnp.take_along_axis(logits, targets_N[:, None], axis=-1)[:, 0], lse


def tiled(hidden_ND: Float[Array, "N D"], head_DV: Float[Array, "D V"], targets_N: Int[Array, "N"], tokens: int = TILE
          ) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """The same, tile by tile of `tokens` (over all devices) by TILE vocabulary entries.

    Tile i takes tokens i, i + n, i + 2n, ...: where tokens are split over devices, each device has its share of every
    tile. The head is cast inside a tile: its gradient is accumulated in float32.
    """
    N = len(targets_N)
    n = -(-N // tokens)
    pad = -N % n
    hidden = jnp.pad(hidden_ND, ((0, pad), (0, 0))).reshape(-1, n, hidden_ND.shape[1]).swapaxes(0, 1)
    targets = jnp.pad(targets_N, (0, pad)).reshape(-1, n).T
    nll, lse = _tiles(hidden, head_DV, targets, min(TILE, head_DV.shape[1]))
    return nll.T.reshape(-1)[:N], lse.T.reshape(-1)[:N]


def _columns(head_DV, v: Array, width: int, dtype) -> tuple[Array, Array, Array]:
    """Vocabulary tile v: its weights, its first column, and which of its columns no earlier tile had: the last tile is
    shifted to the left where the width does not divide the vocabulary."""
    start = jnp.minimum(v * width, head_DV.shape[1] - width)
    new = start + jnp.arange(width) >= v * width
    return lax.dynamic_slice_in_dim(head_DV, start, width, axis=1).astype(dtype), start, new


def _logits(hidden_CD, weights_DW, new_W) -> Float[Array, "C W"]:
    return jnp.where(new_W, jnp.dot(hidden_CD, weights_DW, preferred_element_type=jnp.float32), -jnp.inf)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _tiles(hidden_nCD, head_DV, targets_nC, width: int):
    def of_tokens(hidden_and_targets):
        hidden_CD, targets_C = hidden_and_targets

        def of_columns(v, carry):
            top, total, target_logit = carry
            weights, start, new = _columns(head_DV, v, width, hidden_CD.dtype)
            logits = _logits(hidden_CD, weights, new)
            new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
            total = total * jnp.exp(top - new_top) + jnp.sum(jnp.exp(logits - new_top[:, None]), axis=-1)
            hit = start + jnp.arange(width) == targets_C[:, None]
            return new_top, total, target_logit + jnp.sum(jnp.where(hit & new, logits, 0.0), axis=-1)

        zero = jnp.zeros(targets_C.shape, jnp.float32)
        count = -(-head_DV.shape[1] // width)
        top, total, target_logit = lax.fori_loop(0, count, of_columns, (zero - jnp.inf, zero, zero))
        lse = top + jnp.log(total)
        return lse - target_logit, lse

    return lax.map(of_tokens, (hidden_nCD, targets_nC))


def _tiles_forward(hidden, head, targets, width):
    nll, lse = _tiles(hidden, head, targets, width)
    return (nll, lse), (hidden, head, targets, lse)


def _tiles_backward(width, saved, gradients):
    """dlogits = softmax * (g_nll + g_lse) - onehot(target) * g_nll, rebuilt from the saved log-sum-exp."""
    hidden_nCD, head_DV, targets_nC, lse_nC = saved

    def of_tokens(dhead, tile):
        hidden_CD, targets_C, lse_C, g_nll, g_lse = tile

        def of_columns(v, carry):
            dhidden, dhead = carry
            weights, start, new = _columns(head_DV, v, width, hidden_CD.dtype)
            softmax = jnp.exp(_logits(hidden_CD, weights, new) - lse_C[:, None])
            hit = (start + jnp.arange(width) == targets_C[:, None]) & new
            dlogits = (softmax * (g_nll + g_lse)[:, None] - jnp.where(hit, g_nll[:, None], 0.0)).astype(hidden_CD.dtype)
            dhidden += jnp.dot(dlogits, weights.T, preferred_element_type=jnp.float32)
            part = lax.dynamic_slice_in_dim(dhead, start, width, axis=1)
            part += outer_sum(hidden_CD, dlogits)
            return dhidden, lax.dynamic_update_slice_in_dim(dhead, part, start, axis=1)

        zero = jnp.zeros(hidden_CD.shape, jnp.float32)
        count = -(-head_DV.shape[1] // width)
        dhidden, dhead = lax.fori_loop(0, count, of_columns, (zero, dhead))
        return dhead, dhidden.astype(hidden_CD.dtype)

    dhead, dhidden = lax.scan(of_tokens, jnp.zeros(head_DV.shape, jnp.float32),
                              (hidden_nCD, targets_nC, lse_nC, *gradients))
    return dhidden, dhead.astype(head_DV.dtype), None


_tiles.defvjp(_tiles_forward, _tiles_backward)

IMPLEMENTATIONS = {"reference": reference, "tiled": tiled}


def chunked(hidden_ND: Float[Array, "N D"], head_DV: Float[Array, "D V"], targets_N: Int[Array, "N"], tokens: int = TILE
            ) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """Negative log-likelihood and log-sum-exp per token: `reference` where all logits fit a tile, else `tiled`.

    `tokens` is the tile's share of tokens over all devices: multiply TILE by the devices that split them.
    """
    small = len(targets_N) * head_DV.shape[1] <= tokens * TILE
    return (reference if small else tiled)(hidden_ND, head_DV, targets_N, tokens)
