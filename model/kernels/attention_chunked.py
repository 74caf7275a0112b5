"""Causal attention with memory linear in the sequence: online softmax over key chunks, in plain XLA.

The forward pass is the running maximum, sum and output of arXiv 1805.02867 / 2205.14135; the backward pass rebuilds
the weights of one (query, key) tile at a time from the log-sum-exp. Both visit the same tiles: for each chunk of
queries, the key chunks from the start of its earliest document up to the diagonal. The bounds are data, so tiles that
nobody may see cost nothing. Gradients come from the custom rule only; loops with such bounds have none of their own.

Inside this file arrays are [B, H, S, d]; n chunks of C positions.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from model.kernels.intervals import document_starts
from model.project import outer_sum

MASKED = -1e30
"""Logit of a key that may not be seen; finite, so that a fully masked (padding) row gives numbers, not NaN."""


def chunked(
    q: Float[Array, "B S H k"],
    k: Float[Array, "B T H k"],
    v: Float[Array, "B T H v"],
    segments: Int[Array, "B T"],
    at: Int[Array, "S"],
    scale: float,
    chunk: int,
) -> tuple[Float[Array, "B S H v"], Float[Array, "H"]]:
    """Attention output and every head's largest visible logit, as `attention.reference`.

    Documents must be contiguous. A tile is B * H * chunk**2 floats; `max_logit` carries no gradient.
    """
    S, T = q.shape[1], k.shape[1]
    chunk = min(chunk, S + S % 2)

    def whole_chunks(x):
        return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, -x.shape[1] % chunk), (0, 0)))

    at = jnp.pad(at, (0, -S % chunk), mode="edge")
    segments = jnp.pad(segments, ((0, 0), (0, -T % chunk)))
    places = Places(at, segments[:, at], segments)
    out, top = _attend(whole_chunks(q), whole_chunks(k), whole_chunks(v), places, scale, chunk)
    return jnp.swapaxes(out[:, :, :S], 1, 2), jnp.max(top[:, :, :S], axis=(0, 2))


class Places(NamedTuple):
    """Of queries and keys: the queries' positions, ascending, and the documents of both."""

    at: Int[Array, "S"]
    queries: Int[Array, "B S"]
    keys: Int[Array, "B T"]

    def bounds(self, chunk: int) -> tuple[Int[Array, "n"], Int[Array, "n"]]:
        """For each query chunk the first key chunk that any of its documents reaches back to, and the end: the chunk
        behind its last query's."""
        return jnp.min(self.starts()[:, ::chunk], axis=0) // chunk, self.at[chunk - 1 :: chunk] // chunk + 1

    def starts(self) -> Int[Array, "B S"]:
        """Where each query's document begins."""
        return document_starts(self.keys)[:, self.at]


def _part(x: Array, i: Array, chunk: int, axis: int = 2) -> Array:
    return lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis)


def _tile(q, k, places: Places, i, j, scale: float, chunk: int) -> Float[Array, "B H C C"]:
    """Scaled logits of query chunk i against key chunk j, masked."""
    logits = jnp.einsum("BHSd,BHTd->BHST", _part(q, i, chunk), _part(k, j, chunk), preferred_element_type=jnp.float32)
    query, key = _part(places.queries, i, chunk, 1), _part(places.keys, j, chunk, 1)
    earlier = _part(places.at, i, chunk, 0)[:, None] >= j * chunk + jnp.arange(chunk)
    visible = earlier & (query[:, :, None] == key[:, None, :]) & (key[:, None, :] > 0)
    return jnp.where(visible[:, None], logits * scale, MASKED)


def _forward(q, k, v, places: Places, scale: float, chunk: int):
    """Output, log-sum-exp and maximum of every query."""
    B, H, S, _ = q.shape
    first, end = places.bounds(chunk)

    def queries(i):
        def keys(j, carry):
            top, total, out = carry
            logits = _tile(q, k, places, i, j, scale, chunk)
            new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
            weights, shrink = jnp.exp(logits - new_top[..., None]), jnp.exp(top - new_top)
            step = jnp.einsum("BHST,BHTv->BHSv", weights.astype(v.dtype), _part(v, j, chunk), preferred_element_type=jnp.float32)
            return new_top, total * shrink + jnp.sum(weights, axis=-1), out * shrink[..., None] + step

        start = (
            jnp.full((B, H, chunk), MASKED, jnp.float32),
            jnp.zeros((B, H, chunk), jnp.float32),
            jnp.zeros((B, H, chunk, v.shape[-1]), jnp.float32),
        )
        top, total, out = lax.fori_loop(first[i], end[i], keys, start)
        return (out / total[..., None]).astype(v.dtype), top + jnp.log(total), top

    return tuple(_whole(x) for x in lax.map(queries, jnp.arange(S // chunk)))


def _whole(parts: Float[Array, "n B H C ..."]) -> Float[Array, "B H S ..."]:
    """Stacked chunks back to one axis of positions."""
    x = jnp.moveaxis(parts, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _backward(q, k, v, places: Places, out, lse, g, scale: float, chunk: int):
    """dq, dk, dv: equations of arXiv 2205.14135, appendix B.4."""
    first, end = places.bounds(chunk)
    delta = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def queries(grads, i):
        q_i, g_i, lse_i, delta_i = (_part(x, i, chunk) for x in (q, g, lse, delta))

        def keys(j, carry):
            dq, dk, dv = carry
            weights = jnp.exp(_tile(q, k, places, i, j, scale, chunk) - lse_i[..., None])
            dweights = jnp.einsum("BHSv,BHTv->BHST", g_i, _part(v, j, chunk), preferred_element_type=jnp.float32)
            dlogits = (weights * (dweights - delta_i[..., None]) * scale).astype(q.dtype)
            dq += jnp.einsum("BHST,BHTd->BHSd", dlogits, _part(k, j, chunk), preferred_element_type=jnp.float32)
            dk = _add_part(dk, outer_sum(dlogits, q_i), j, chunk)
            dv = _add_part(dv, outer_sum(weights.astype(v.dtype), g_i), j, chunk)
            return dq, dk, dv

        dq, dk, dv = lax.fori_loop(first[i], end[i], keys, (jnp.zeros(q_i.shape, jnp.float32), *grads))
        return (dk, dv), dq.astype(q.dtype)

    start = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
    (dk, dv), dq = lax.scan(queries, start, jnp.arange(q.shape[2] // chunk))
    return _whole(dq), dk.astype(k.dtype), dv.astype(v.dtype)


def _add_part(x: Array, part: Array, j: Array, chunk: int) -> Array:
    return lax.dynamic_update_slice_in_dim(x, _part(x, j, chunk) + part, j * chunk, axis=2)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q, k, v, places: Places, scale: float, chunk: int):
    out, _, top = _forward(q, k, v, places, scale, chunk)
    return out, top


def _attend_forward(q, k, v, places, scale, chunk):
    out, lse, top = _forward(q, k, v, places, scale, chunk)
    # Named, so that a remat policy that keeps them spares the backward pass a second forward pass.
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return (out, top), (q, k, v, places, out, lse)


def _attend_backward(scale, chunk, saved, gradients):
    return *_backward(*saved, gradients[0], scale, chunk), None


_attend.defvjp(_attend_forward, _attend_backward)
