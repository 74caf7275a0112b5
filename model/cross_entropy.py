"""Cross-entropy over a large vocabulary without ever holding all logits, nor all of a head that is stored in parts.

One registry, one signature: `(hidden, head, targets, tokens, shards, over) -> (nll, lse)`. `reference` is the definition.
`tiled` holds one tile of logits at a time, forward and backward, so its memory depends neither on the number of tokens
nor on the vocabulary. `losses` is what a network calls.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from model.call import Call
from model.project import outer_sum
from model.shards import ONE_DEVICE, Shards

TILE = 2048
"""Tokens and vocabulary entries of one tile: 16 MiB of float32 logits. A tile's products read and write about
8 * D * 2 * TILE bytes for 6 * D * TILE**2 operations: far above the ratio where memory, not arithmetic, is the limit."""


def losses(
    hidden_BSD: Float[Array, "B S D"], head: nnx.Param, targets_BS: Int[Array, "B S"], call: Call
) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """Negative log-likelihood and log-sum-exp of every token, float32.

    Each device of the tensor axis knows a part of the vocabulary; they exchange three numbers per token.
    """
    shards, part, targets = call.shards, call.part(head), targets_BS.reshape(-1)
    of_width, of_vocabulary = shards.stored(head.spec)
    hidden = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])
    targets -= shards.index(*of_vocabulary) * part.shape[1]
    nll, lse = chunked(hidden, part, targets, TILE, shards, of_width)
    if not of_vocabulary:
        return nll, lse
    target_logit, (lse, _) = shards.total(lse - nll, of_vocabulary), over_parts(lse, shards, of_vocabulary)
    return lse - target_logit, lse


def over_parts(lse_N: Float[Array, "N"], shards: Shards, axes: tuple[str, ...]) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """The log-sum-exp of a whole vocabulary from those of the parts that the devices along these mesh axes know, and the
    probability of this device's part. That is not exp(lse of the part - lse of the whole): both are rounded as much as the
    logits are large, and such probabilities would not add up to 1."""
    top = shards.largest(lse_N, axes)
    part = jnp.exp(lse_N - top)
    whole = shards.total(part, axes)
    return top + jnp.log(whole), part / whole


def reference(
    hidden_ND: Float[Array, "N D"],
    head_DV: Float[Array, "D V"],
    targets_N: Int[Array, "N"],
    tokens: int = 0,
    shards: Shards = ONE_DEVICE,
    over: tuple[str, ...] = (),
) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """Negative log-likelihood of each target and the log-sum-exp of its logits, float32 (`tokens` is not used).

    A target outside [0, V) has the logit 0. `head_DV` holds the rows of D that this device stores; the devices along
    the mesh axes `over` store the others.
    """
    head_DV = shards.gather_axis(head_DV.astype(hidden_ND.dtype), over, 0)
    logits = jnp.dot(hidden_ND, head_DV, preferred_element_type=jnp.float32)
    lse = jax.nn.logsumexp(logits, axis=-1)
    return lse - target_logits(logits, targets_N), lse


def target_logits(logits_NV: Float[Array, "N V"], targets_N: Int[Array, "N"]) -> Float[Array, "N"]:
    """0 for a target outside [0, V)."""
    here = (targets_N >= 0) & (targets_N < logits_NV.shape[1])
    found = jnp.take_along_axis(logits_NV, jnp.where(here, targets_N, 0)[:, None], axis=-1)[:, 0]
    return jnp.where(here, found, 0.0)


def tiled(
    hidden_ND: Float[Array, "N D"],
    head_DV: Float[Array, "D V"],
    targets_N: Int[Array, "N"],
    tokens: int = TILE,
    shards: Shards = ONE_DEVICE,
    over: tuple[str, ...] = (),
) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """The same, by tiles of TILE vocabulary entries and `tokens` tokens.

    A tile of the head is cast, and gathered, where it is used; its gradient is summed in float32 and handed back to the
    devices that store it before the next tile is begun.
    """
    N = len(targets_N)
    hidden, targets = tokens_in_tiles(hidden_ND, tokens), tokens_in_tiles(targets_N, tokens)
    nll, lse = _tiles(hidden, head_DV, targets, min(TILE, head_DV.shape[1]), shards, over)
    return nll.reshape(-1)[:N], lse.reshape(-1)[:N]


def tokens_in_tiles(x: Array, tokens: int) -> Array:
    """[N, ...] -> [n, C, ...] with C at most `tokens`, filled up with zeros."""
    n = -(-len(x) // tokens)
    pad = -len(x) % n
    return jnp.pad(x, ((0, pad), *[(0, 0)] * (x.ndim - 1))).reshape(n, -1, *x.shape[1:])


def columns(head_DV, v: Array, width: int, dtype, shards: Shards, over) -> tuple[Array, Array, Array]:
    """Vocabulary tile v: its weights, its first column, and which of its columns no earlier tile had: the last tile is
    shifted to the left where the width does not divide the vocabulary."""
    start = jnp.minimum(v * width, head_DV.shape[1] - width)
    new = start + jnp.arange(width) >= v * width
    part = lax.dynamic_slice_in_dim(head_DV, start, width, axis=1).astype(dtype)
    return shards.gather_axis(part, over, 0), start, new


def logits_of(hidden_CD, weights_DW, new_W) -> Float[Array, "C W"]:
    """Logits of one tile, -inf in the columns that an earlier tile had."""
    return jnp.where(new_W, jnp.dot(hidden_CD, weights_DW, preferred_element_type=jnp.float32), -jnp.inf)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _tiles(hidden_nCD, head_DV, targets_nC, width: int, shards: Shards, over: tuple[str, ...]):
    def of_columns(v, carry):
        weights, start, new = columns(head_DV, v, width, hidden_nCD.dtype, shards, over)

        def of_tokens(tile):
            hidden_CD, targets_C, top, total, target_logit = tile
            logits = logits_of(hidden_CD, weights, new)
            new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
            total = total * jnp.exp(top - new_top) + jnp.sum(jnp.exp(logits - new_top[:, None]), axis=-1)
            hit = start + jnp.arange(width) == targets_C[:, None]
            return new_top, total, target_logit + jnp.sum(jnp.where(hit & new, logits, 0.0), axis=-1)

        return lax.map(of_tokens, (hidden_nCD, targets_nC, *carry))

    zero = jnp.zeros(targets_nC.shape, jnp.float32)
    count = -(-head_DV.shape[1] // width)
    top, total, target_logit = lax.fori_loop(0, count, of_columns, (zero - jnp.inf, zero, zero))
    lse = top + jnp.log(total)
    return lse - target_logit, lse


def _tiles_forward(hidden, head, targets, width, shards, over):
    nll, lse = _tiles(hidden, head, targets, width, shards, over)
    return (nll, lse), (hidden, head, targets, lse)


def _tiles_backward(width, shards, over, saved, gradients):
    """dlogits = softmax * (g_nll + g_lse) - onehot(target) * g_nll, rebuilt from the saved log-sum-exp."""
    hidden_nCD, head_DV, targets_nC, lse_nC = saved

    def of_columns(v, carry):
        dhidden_nCD, dhead_DV = carry
        weights, start, new = columns(head_DV, v, width, hidden_nCD.dtype, shards, over)

        def dlogits_of(hidden_CD, targets_C, lse_C, g_nll, g_lse):
            softmax = jnp.exp(logits_of(hidden_CD, weights, new) - lse_C[:, None])
            hit = (start + jnp.arange(width) == targets_C[:, None]) & new
            return softmax * (g_nll + g_lse)[:, None] - jnp.where(hit, g_nll[:, None], 0.0)

        tiles = hidden_nCD, targets_nC, lse_nC, *gradients
        dweights, dhidden_nCD = gradients_of_columns(dlogits_of, tiles, weights, dhidden_nCD)
        return dhidden_nCD, add_columns(dhead_DV, dweights, start, shards, over)

    start = jnp.zeros(hidden_nCD.shape, jnp.float32), jnp.zeros(head_DV.shape, jnp.float32)
    count = -(-head_DV.shape[1] // width)
    dhidden, dhead = lax.fori_loop(0, count, of_columns, start)
    return dhidden.astype(hidden_nCD.dtype), dhead.astype(head_DV.dtype), None


def gradients_of_columns(
    dlogits_of: Callable[..., Float[Array, "C W"]],
    tiles: tuple[Array, ...],
    weights_DW: Float[Array, "D W"],
    dhidden_nCD: Float[Array, "n C D"],
) -> tuple[Float[Array, "D W"], Float[Array, "n C D"]]:
    """The gradient of one vocabulary tile's weights, and `dhidden_nCD` with what the tile adds to it. dlogits_of(*tile) of
    each of the n in `tiles`, of which hidden [n, C, D] is the first.

    Both sums are what the loop carries, so they are added to in place: given to it and taken from it by tiles, the second is
    copied once for every vocabulary tile."""

    def of_tokens(sums, numbered):
        (dweights, dhidden), (i, (hidden, *others)) = sums, numbered
        dlogits = dlogits_of(hidden, *others).astype(hidden.dtype)
        more = dhidden[i] + jnp.dot(dlogits, weights_DW.T, preferred_element_type=jnp.float32)
        return (dweights + outer_sum(hidden, dlogits), lax.dynamic_update_index_in_dim(dhidden, more, i, 0)), None

    start = jnp.zeros(weights_DW.shape, jnp.float32), dhidden_nCD
    return lax.scan(of_tokens, start, (jnp.arange(len(dhidden_nCD)), tiles))[0]


def add_columns(dhead_DV: Array, dweights_DW: Array, start: Array, shards: Shards, over: tuple[str, ...]) -> Array:
    """A tile's gradient, summed over the devices that used it, added to the part of the head that this device stores. The
    shifted last tile meets columns that an earlier one has written: their gradient in it is zero."""
    part = lax.dynamic_slice_in_dim(dhead_DV, start, dweights_DW.shape[1], axis=1) + shards.scatter_axis(dweights_DW, over, 0)
    return lax.dynamic_update_slice_in_dim(dhead_DV, part, start, axis=1)


_tiles.defvjp(_tiles_forward, _tiles_backward)

IMPLEMENTATIONS = {"reference": reference, "tiled": tiled}


def chunked(
    hidden_ND: Float[Array, "N D"],
    head_DV: Float[Array, "D V"],
    targets_N: Int[Array, "N"],
    tokens: int = TILE,
    shards: Shards = ONE_DEVICE,
    over: tuple[str, ...] = (),
) -> tuple[Float[Array, "N"], Float[Array, "N"]]:
    """Negative log-likelihood and log-sum-exp per token: `reference` where all logits fit a tile, else `tiled`."""
    small = len(targets_N) * head_DV.shape[1] <= tokens * TILE
    return (reference if small else tiled)(hidden_ND, head_DV, targets_N, tokens, shards, over)
