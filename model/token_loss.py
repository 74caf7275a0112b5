"""The loss of a training step's tokens, in three products with the head where a GPU holds all of it.

A loss whose gradient is asked for later has to form every logit twice, because they are too many to be kept: four products,
two of them for the gradients. Here it is known beforehand what each token's loss counts in the step, so the forward pass forms
the gradients beside the loss, some tokens with all of their logits at a time, and forms each logit once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from model import cross_entropy
from model.call import Call
from model.project import outer_sum

LOGITS = 2**29
"""Logits at a time, 2 GiB: so many that adding to the gradient of the head, once for each time, is little work."""

ALIGNED = 128
"""Tokens at a time are a multiple of this, as a matrix unit wants what it sums over."""

GPUS = ("gpu", "hopper")
"""Platforms that do so. A CPU's products are fastest on tiles that stay in cache; on TPUs, most of which have 16 to 32 GiB,
it was not tried."""


def weighted(
    hidden_BSD: Float[Array, "B S D"],
    head: nnx.Param,
    targets_BS: Int[Array, "B S"],
    weights_N: Float[Array, "N"],
    nll_factor: Float[Array, ""],
    square_factor: Float[Array, ""],
    call: Call,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(nll_factor * sum(weight * nll) + square_factor * sum(weight * lse**2), sum(weight * nll)), float32, lse being the
    log-sum-exp of a token's logits. Only the first carries a gradient, and only for hidden and head.
    """
    in_parts = any(call.shards.stored(head.spec))
    if in_parts or call.platform not in GPUS:
        nll, lse = cross_entropy.losses(hidden_BSD, head, targets_BS, call)
        return _sums(nll, lse, weights_N, nll_factor, square_factor)
    hidden_ND = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])
    loss, nll = with_gradients(hidden_ND, call.part(head), targets_BS.reshape(-1), weights_N, nll_factor, square_factor)
    return loss, lax.stop_gradient(nll)


def _sums(nll_N, lse_N, weights_N, nll_factor, square_factor):
    nll = jnp.sum(weights_N * nll_N)
    return nll_factor * nll + square_factor * jnp.sum(weights_N * lse_N**2), lax.stop_gradient(nll)


@jax.custom_vjp
def with_gradients(
    hidden_ND: Float[Array, "N D"],
    head_DV: Float[Array, "D V"],
    targets_N: Int[Array, "N"],
    weights_N: Float[Array, "N"],
    nll_factor: Float[Array, ""],
    square_factor: Float[Array, ""],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The same with one device's arrays. Who asks for no gradient gets the sums by the tiles of cross_entropy.py."""
    return _sums(*cross_entropy.chunked(hidden_ND, head_DV, targets_N), weights_N, nll_factor, square_factor)


def _forward(hidden_ND, head_DV, targets_N, weights_N, nll_factor, square_factor):
    head = head_DV.astype(hidden_ND.dtype)

    def of_tokens(carry, tile):
        loss, total, dhead = carry
        hidden_CD, targets_C, weights_C = tile
        logits = jnp.dot(hidden_CD, head, preferred_element_type=jnp.float32)
        top = jnp.max(logits, axis=-1)
        size = jnp.sum(jnp.exp(logits - top[:, None]), axis=-1)
        lse = top + jnp.log(size)
        nll = lse - cross_entropy.target_logits(logits, targets_C)
        of_nll, of_lse = weights_C * nll_factor, 2 * weights_C * square_factor * lse
        hit = jnp.arange(logits.shape[1]) == targets_C[:, None]
        dlogits = jnp.exp(logits - lse[:, None]) * (of_nll + of_lse)[:, None] - jnp.where(hit, of_nll[:, None], 0.0)
        dlogits = dlogits.astype(hidden_CD.dtype)
        dhidden = jnp.dot(dlogits, head.T, preferred_element_type=jnp.float32).astype(hidden_CD.dtype)
        more, of_weights = _sums(nll, lse, weights_C, nll_factor, square_factor)
        return (loss + more, total + of_weights, dhead + outer_sum(hidden_CD, dlogits)), dhidden

    start = jnp.float32(0), jnp.float32(0), jnp.zeros(head_DV.shape, jnp.float32)
    tiles = tuple(_in_tiles(x, head_DV.shape[1]) for x in (hidden_ND, targets_N, weights_N))
    (loss, nll, dhead), dhidden = lax.scan(of_tokens, start, tiles)
    return (loss, nll), (dhidden.reshape(-1, hidden_ND.shape[1])[: len(hidden_ND)], dhead.astype(head_DV.dtype))


def _in_tiles(x: Array, vocabulary: int) -> Array:
    """[N, ...] -> [n, C, ...], as few and as equal tiles as have about LOGITS logits each, of whole ALIGNED where there are
    several. Filled up with zeros, which weigh nothing."""
    n = -(-len(x) * vocabulary // LOGITS)
    size = -(-len(x) // n)
    size = size if n == 1 else -(-size // ALIGNED) * ALIGNED
    pad = -len(x) % size
    return jnp.pad(x, ((0, pad), *[(0, 0)] * (x.ndim - 1))).reshape(-1, size, *x.shape[1:])


def _backward(saved, gradients):
    """What was formed, times the loss's own gradient."""
    dhidden, dhead = saved
    return (dhidden * gradients[0]).astype(dhidden.dtype), (dhead * gradients[0]).astype(dhead.dtype), None, None, None, None


with_gradients.defvjp(_forward, _backward)
