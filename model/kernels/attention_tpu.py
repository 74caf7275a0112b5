"""Causal attention within documents on TPU: Pallas kernels for the forward pass, dq, and dk with dv.

Logits are held transposed, [keys, queries], so that everything there is one of per query (its range of keys, running
maximum, sum, log-sum-exp) is a row of lanes and reductions go over sublanes. The grid walks tiles of keys innermost, only
those that some query of the tile may see: the bounds are prefetched, and what lies outside them is neither fetched nor
computed. The mathematics is attention_chunked.py's; arrays here are [B, H, S, d].
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels.tpu import LANES, dot
from model.kernels.attention_chunked import MASKED
from model.kernels.grouped_matmul_tpu import VMEM_LIMIT
from model.kernels.intervals import document_starts


def attend(
    q: Float[Array, "B S H k"],
    k: Float[Array, "B T H k"],
    v: Float[Array, "B T H v"],
    segments: Int[Array, "B T"],
    at: Int[Array, "S"],
    scale: float,
    chunk: int,
) -> tuple[Float[Array, "B S H v"], Float[Array, "H"]]:
    """As `attention.reference`, in tiles of `chunk` positions, whole lanes on a chip. max_logit carries no gradient."""
    S, T = q.shape[1], k.shape[1]
    rows, keys = (min(chunk, -(-n // LANES) * LANES) for n in (S, T))

    def whole_tiles(x, size):
        return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, -x.shape[1] % size), (0, 0)))

    reach = Reach.of(jnp.pad(segments, ((0, 0), (0, -T % keys))), jnp.pad(at, (0, -S % rows), mode="edge"), rows, keys)
    out, top = _attend(whole_tiles(q, rows), whole_tiles(k, keys), whole_tiles(v, keys), reach, scale)
    return jnp.swapaxes(out[:, :, :S], 1, 2), jnp.max(top[..., :S], axis=(0, 2, 3))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Reach:
    """Who sees whom, in tiles of `rows` queries and `keys` keys.

    low, high     [B, 1, S] the keys that each query sees, both included; low is T where there are none, in padding
    first, end    [B, S/rows] the tiles of keys that a tile of queries needs
    begin, stop   [B, T/keys] the tiles of queries that need a tile of keys
    """

    low: Array
    high: Array
    first: Array
    end: Array
    begin: Array
    stop: Array
    rows: int = field(metadata={"static": True})
    keys: int = field(metadata={"static": True})

    @classmethod
    def of(cls, segments: Int[Array, "B T"], at: Int[Array, "S"], rows: int, keys: int) -> Reach:
        start = document_starts(segments)[:, at]
        first = start[:, ::rows] // keys
        end = jnp.broadcast_to(at[rows - 1 :: rows] // keys + 1, first.shape)
        tiles = jnp.arange(segments.shape[1] // keys)[:, None]
        low = jnp.where(segments[:, at] > 0, start, segments.shape[1])[:, None]
        of_keys = (jnp.sum(bound[:, None] <= tiles, axis=-1) for bound in (end, first))
        return cls(*(x.astype(jnp.int32) for x in (low, jnp.broadcast_to(at, low.shape), first, end, *of_keys)), rows, keys)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, reach, scale: float):
    out, _, top = _forward(q, k, v, reach, scale)
    return out, top


def _attend_forward(q, k, v, reach, scale):
    out, lse, top = _forward(q, k, v, reach, scale)
    # Named, so that a remat policy that keeps them spares the backward pass a second forward pass.
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return (out, top), (q, k, v, reach, out, lse)


def _attend_backward(scale, saved, gradients):
    q, k, v, reach, out, lse = saved
    g = gradients[0]
    delta = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)[:, :, None]
    dk, dv = _keys_gradient(q, k, v, reach, g, lse, delta, scale)
    return _queries_gradient(q, k, v, reach, g, lse, delta, scale), dk, dv, None


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(q, k, v, reach, scale: float):
    """Output [B, H, S, v], log-sum-exp and maximum [B, H, 1, S] of every query."""
    (B, H, S, _), width = q.shape, v.shape[-1]
    row = jax.ShapeDtypeStruct((B, H, 1, S), jnp.float32)
    out, lse, top = _call(
        _forward_kernel,
        reach,
        (q, k, v),
        (),
        scale,
        products=(q, v),
        outputs=[jax.ShapeDtypeStruct((B, H, width, S), v.dtype), row, row],
        scratch=[(width, None), (1, None), (1, None)],
    )
    return jnp.swapaxes(out, 2, 3), lse, top


def _queries_gradient(q, k, v, reach, g, lse, delta, scale: float):
    B, H, S, width = q.shape
    (dq,) = _call(
        _queries_kernel,
        reach,
        (q, k, v, g),
        (lse, delta),
        scale,
        products=(q, v, q),
        outputs=[jax.ShapeDtypeStruct((B, H, width, S), q.dtype)],
        scratch=[(width, None)],
    )
    return jnp.swapaxes(dq, 2, 3)


def _keys_gradient(q, k, v, reach, g, lse, delta, scale: float):
    return _call(
        _keys_kernel,
        reach,
        (q, k, v, g),
        (lse, delta),
        scale,
        products=(q, v, q, v),
        by_keys=True,
        outputs=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        scratch=[(None, x.shape[-1]) for x in (k, v)],
    )


def _call(kernel, reach: Reach, arrays, per_query, scale: float, *, products, outputs, scratch, by_keys: bool = False):
    """A kernel over tiles of queries and, innermost, the keys they need; or, `by_keys`, the other way round. None in a shape
    of scratch is the outer tile. products: one array as wide as each product, for the cost: of one document a row, which
    is half of all tiles and the diagonal, and of whole lanes."""
    q, k = arrays[:2]
    (B, H, S, _), T, lengths = q.shape, k.shape[2], (reach.rows, reach.keys)
    counts = S // lengths[0], T // lengths[1]
    outer, inner = (1, 0) if by_keys else (0, 1)

    def place(which: int):
        """Index of the tile of queries (0) or keys (1) at a grid step: the inner one stays where there is nothing to do."""
        if which == outer:
            return lambda b, o, i, first, end: o
        # Keys behind a device's last query are needed by nobody: first and end are then the number of tiles.
        return lambda b, o, i, first, end: jnp.minimum(
            jnp.clip(i, first[b, o], jnp.maximum(end[b, o] - 1, first[b, o])), counts[which] - 1
        )

    def tall(which: int, width: int):
        return pl.BlockSpec((1, 1, lengths[which], width), lambda b, h, o, i, *s: (b, h, place(which)(b, o, i, *s), 0))

    def flat(height: int):
        return pl.BlockSpec((1, 1, height, lengths[0]), lambda b, h, o, i, *s: (b, h, 0, place(0)(b, o, i, *s)))

    def of_output(x):
        return tall(1, x.shape[3]) if by_keys else flat(x.shape[2])

    span = pl.BlockSpec((1, 1, lengths[0]), lambda b, h, o, i, *s: (b, 0, place(0)(b, o, i, *s)))
    sides = (0, 1, 1, 0)  # q, k, v, and the output's gradient
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(B, H, counts[outer], counts[inner]),
        in_specs=[span, span, *(tall(side, x.shape[3]) for side, x in zip(sides, arrays)), *(flat(1) for _ in per_query)],
        out_specs=[of_output(x) for x in outputs],
        scratch_shapes=[pltpu.VMEM(tuple(n or lengths[outer] for n in shape), jnp.float32) for shape in scratch],
    )
    tiles = B * H * counts[0] * (counts[1] + 1) / 2
    width = sum(-(-x.shape[3] // LANES) * LANES for x in products)
    moved = sum(x.shape[3] * x.dtype.itemsize for x, side in zip(arrays, sides) if side == inner) * tiles * lengths[inner]
    moved += sum(x.size * x.dtype.itemsize for x, side in zip(arrays, sides) if side == outer)
    moved += sum(x.size * x.dtype.itemsize for x in outputs)
    cost = pl.CostEstimate(
        flops=int(2 * tiles * lengths[0] * lengths[1] * width),
        bytes_accessed=int(moved),
        transcendentals=int(tiles * lengths[0] * lengths[1]),
    )
    params = pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
    )
    run = pl.pallas_call(
        partial(kernel, scale=scale), grid_spec=spec, out_shape=outputs, compiler_params=params, cost_estimate=cost
    )
    bounds = (reach.begin, reach.stop) if by_keys else (reach.first, reach.end)
    return run(*bounds, reach.low, reach.high, *arrays, *per_query)


def _span(first, end):
    """The inner grid step, and the range of those in which this outer tile has work."""
    b, o = pl.program_id(0), pl.program_id(2)
    return pl.program_id(3), first[b, o], end[b, o]


def _logits(low, high, q, k, key_tile, scale: float) -> Float[Array, "T S"]:
    """Scaled logits of a tile, masked."""
    logits = dot(k[0, 0], q[0, 0], 1, 1) * scale
    key = key_tile * logits.shape[0] + lax.broadcasted_iota(jnp.int32, logits.shape, 0)
    return jnp.where((key >= low[0]) & (key <= high[0]), logits, MASKED)


def _forward_kernel(first, end, low, high, q, k, v, out, lse, top, total_out, running, total, *, scale: float):
    j, start, stop = _span(first, end)

    @pl.when(j == start)
    def _():
        total_out[...], total[...] = jnp.zeros_like(total_out), jnp.zeros_like(total)
        running[...] = jnp.full_like(running, MASKED)

    @pl.when((j >= start) & (j < stop))
    def _():
        logits = _logits(low, high, q, k, j, scale)
        largest = jnp.maximum(running[...], jnp.max(logits, axis=0, keepdims=True))
        weights, shrink = jnp.exp(logits - largest), jnp.exp(running[...] - largest)
        total[...] = total[...] * shrink + jnp.sum(weights, axis=0, keepdims=True)
        total_out[...] = total_out[...] * shrink + dot(v[0, 0], weights.astype(v.dtype), 0, 0)
        running[...] = largest

    @pl.when(j == stop - 1)
    def _():
        out[0, 0] = (total_out[...] / total[...]).astype(out.dtype)
        lse[0, 0], top[0, 0] = running[...] + jnp.log(total[...]), running[...]


def _logits_gradient(low, high, q, k, v, g, lse, delta, key_tile, scale: float):
    """Attention weights of a tile, and the gradient of its logits before scaling: arXiv 2205.14135, appendix B.4."""
    weights = jnp.exp(_logits(low, high, q, k, key_tile, scale) - lse[0, 0])
    return weights, (weights * (dot(v[0, 0], g[0, 0], 1, 1) - delta[0, 0]) * scale).astype(q.dtype)


def _queries_kernel(first, end, low, high, q, k, v, g, lse, delta, dq, total, *, scale: float):
    j, start, stop = _span(first, end)

    @pl.when(j == start)
    def _():
        total[...] = jnp.zeros_like(total)

    @pl.when((j >= start) & (j < stop))
    def _():
        _, dlogits = _logits_gradient(low, high, q, k, v, g, lse, delta, j, scale)
        total[...] += dot(k[0, 0], dlogits, 0, 0)

    @pl.when(j == stop - 1)
    def _():
        dq[0, 0] = total[...].astype(dq.dtype)


def _keys_kernel(begin, stop, low, high, q, k, v, g, lse, delta, dk, dv, total_k, total_v, *, scale: float):
    i, start, stop = _span(begin, stop)

    @pl.when(i == 0)
    def _():
        total_k[...], total_v[...] = jnp.zeros_like(total_k), jnp.zeros_like(total_v)

    @pl.when((i >= start) & (i < stop))
    def _():
        weights, dlogits = _logits_gradient(low, high, q, k, v, g, lse, delta, pl.program_id(2), scale)
        total_k[...] += dot(dlogits, q[0, 0], 1, 0)
        total_v[...] += dot(weights.astype(v.dtype), g[0, 0], 1, 0)

    @pl.when(i == pl.num_programs(3) - 1)
    def _():
        dk[0, 0], dv[0, 0] = total_k[...].astype(dk.dtype), total_v[...].astype(dv.dtype)
