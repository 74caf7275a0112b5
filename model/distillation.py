"""KL(teacher || student) per token over a large vocabulary, without ever holding all logits of either.

The same shape of code as cross_entropy.py: `reference` is the definition, `tiled` holds one tile of both networks' logits
at a time, forward and backward, and `divergences` is what the loss calls. With student logits z, teacher logits y and
p = softmax(y):

    KL = sum p (y - z) - lse(y) + lse(z)        dKL/dz = softmax(z) - p

A registry entry returns (lse(z), lse(y), sum p (y - z)): three numbers per token, from which the parts of a vocabulary that
lie on several devices can be put together. The teacher gets no gradient.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from model import cross_entropy
from model.call import Call
from model.cross_entropy import columns, logits_of, tokens_in_tiles
from model.shards import ONE_DEVICE, Shards

Sums = tuple[Float[Array, "N"], Float[Array, "N"], Float[Array, "N"]]


def divergences(
    hidden_BSD: Float[Array, "B S D"], head: nnx.Param, taught_BSD: Float[Array, "B S D"], teacher_head: nnx.Param, call: Call
) -> Float[Array, "N"]:
    """KL of every token in nats, float32. Each device of the tensor axis knows a part of the vocabulary."""
    shards = call.shards
    of_width, of_vocabulary = shards.stored(head.spec)
    hidden, taught = (x.reshape(-1, x.shape[-1]) for x in (hidden_BSD, taught_BSD))
    lse, lse_t, cross = chunked(hidden, call.part(head), taught, teacher_head[...], cross_entropy.TILE, shards, of_width)
    if of_vocabulary:
        lse, _ = cross_entropy.over_parts(lse, shards, of_vocabulary)
        lse_t, probability = cross_entropy.over_parts(lse_t, shards, of_vocabulary)
        cross = shards.total(probability * cross, of_vocabulary)
    return cross - lse_t + lse


def reference(
    hidden_ND: Float[Array, "N D"],
    head_DV: Float[Array, "D V"],
    taught_ND: Float[Array, "N D"],
    teacher_DV: Float[Array, "D V"],
    tokens: int = 0,
    shards: Shards = ONE_DEVICE,
    over: tuple[str, ...] = (),
) -> Sums:
    """lse(z), lse(y) and sum p (y - z), float32 (`tokens` is not used). Heads hold the rows of D that this device
    stores; the devices along the mesh axes `over` store the others."""

    def logits(x, w):
        return jnp.dot(x, shards.gather_axis(w.astype(x.dtype), over, 0), preferred_element_type=jnp.float32)

    z, y = logits(hidden_ND, head_DV), lax.stop_gradient(logits(taught_ND, teacher_DV))
    lse, lse_t = (jax.nn.logsumexp(x, axis=-1) for x in (z, y))
    return lse, lse_t, jnp.sum(jax.nn.softmax(y, axis=-1) * (y - z), axis=-1)


def tiled(
    hidden_ND: Float[Array, "N D"],
    head_DV: Float[Array, "D V"],
    taught_ND: Float[Array, "N D"],
    teacher_DV: Float[Array, "D V"],
    tokens: int = cross_entropy.TILE,
    shards: Shards = ONE_DEVICE,
    over: tuple[str, ...] = (),
) -> Sums:
    """The same, by tiles of TILE vocabulary entries and `tokens` tokens; the student's gradients as in cross_entropy.py."""
    hidden, taught = tokens_in_tiles(hidden_ND, tokens), tokens_in_tiles(taught_ND, tokens)
    sums = _tiles(hidden, head_DV, taught, teacher_DV, min(cross_entropy.TILE, head_DV.shape[1]), shards, over)
    return tuple(x.reshape(-1)[: len(hidden_ND)] for x in sums)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _tiles(hidden_nCD, head_DV, taught_nCD, teacher_DV, width: int, shards: Shards, over: tuple[str, ...]):
    def of_columns(v, carry):
        weights, _, new = columns(head_DV, v, width, hidden_nCD.dtype, shards, over)
        teacher, _, _ = columns(teacher_DV, v, width, taught_nCD.dtype, shards, over)

        def of_tokens(tile):
            hidden, taught, top, total, top_t, total_t, cross = tile
            z, y = logits_of(hidden, weights, new), logits_of(taught, teacher, new)
            new_top, new_top_t = jnp.maximum(top, jnp.max(z, axis=-1)), jnp.maximum(top_t, jnp.max(y, axis=-1))
            total = total * jnp.exp(top - new_top) + jnp.sum(jnp.exp(z - new_top[:, None]), axis=-1)
            p, rescale = jnp.exp(y - new_top_t[:, None]), jnp.exp(top_t - new_top_t)
            cross = cross * rescale + jnp.sum(p * jnp.where(new, y - z, 0.0), axis=-1)
            return new_top, total, new_top_t, total_t * rescale + jnp.sum(p, axis=-1), cross

        return lax.map(of_tokens, (hidden_nCD, taught_nCD, *carry))

    zero = jnp.zeros(hidden_nCD.shape[:2], jnp.float32)
    start = zero - jnp.inf, zero, zero - jnp.inf, zero, zero
    top, total, top_t, total_t, cross = lax.fori_loop(0, -(-head_DV.shape[1] // width), of_columns, start)
    return top + jnp.log(total), top_t + jnp.log(total_t), cross / total_t


def _tiles_forward(hidden, head, taught, teacher, width, shards, over):
    lse, lse_t, cross = _tiles(hidden, head, taught, teacher, width, shards, over)
    return (lse, lse_t, cross), (hidden, head, taught, teacher, lse, lse_t)


def _tiles_backward(width, shards, over, saved, gradients):
    """dz = softmax(z) * g_lse - p * g_cross, both rebuilt from the saved log-sum-exps."""
    hidden_nCD, head_DV, taught_nCD, teacher_DV, lse_nC, lse_t_nC = saved
    g_lse_nC, _, g_cross_nC = gradients

    def of_columns(v, carry):
        dhidden_nCD, dhead_DV = carry
        weights, start, new = columns(head_DV, v, width, hidden_nCD.dtype, shards, over)
        teacher, _, _ = columns(teacher_DV, v, width, taught_nCD.dtype, shards, over)

        def dlogits_of(hidden, taught, lse, lse_t, g_lse, g_cross):
            softmax = jnp.exp(logits_of(hidden, weights, new) - lse[:, None])
            p = jnp.exp(logits_of(taught, teacher, new) - lse_t[:, None])
            return softmax * g_lse[:, None] - p * g_cross[:, None]

        tiles = hidden_nCD, taught_nCD, lse_nC, lse_t_nC, g_lse_nC, g_cross_nC
        dweights, dhidden_nCD = cross_entropy.gradients_of_columns(dlogits_of, tiles, weights, dhidden_nCD)
        return dhidden_nCD, cross_entropy.add_columns(dhead_DV, dweights, start, shards, over)

    start = jnp.zeros(hidden_nCD.shape, jnp.float32), jnp.zeros(head_DV.shape, jnp.float32)
    dhidden, dhead = lax.fori_loop(0, -(-head_DV.shape[1] // width), of_columns, start)
    return dhidden.astype(hidden_nCD.dtype), dhead.astype(head_DV.dtype), None, None


_tiles.defvjp(_tiles_forward, _tiles_backward)

IMPLEMENTATIONS = {"reference": reference, "tiled": tiled}


def chunked(
    hidden_ND: Float[Array, "N D"],
    head_DV: Float[Array, "D V"],
    taught_ND: Float[Array, "N D"],
    teacher_DV: Float[Array, "D V"],
    tokens: int = cross_entropy.TILE,
    shards: Shards = ONE_DEVICE,
    over: tuple[str, ...] = (),
) -> Sums:
    """`reference` where all logits fit a tile, else `tiled`."""
    small = len(hidden_ND) * head_DV.shape[1] <= tokens * cross_entropy.TILE
    return (reference if small else tiled)(hidden_ND, head_DV, taught_ND, teacher_DV, tokens, shards, over)
