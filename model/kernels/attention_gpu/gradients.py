"""The two backward kernels: one sums over keys, one over queries."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from kernels.hopper import plgpu
from model.kernels.attention_gpu import frame
from model.kernels.attention_gpu.frame import GROUPS, LOG2E, ROWS, TILE
from model.kernels.intervals import Intervals


def backward(
    q, k, v, g: Float[Array, "B S H v"], lse: Float[Array, "B H S"], delta: Float[Array, "B H S"], seen: Intervals, scale: float
) -> tuple[Array, Array, Array]:
    """dq, dk, dv for the cotangent g of the output; delta: sum over v of g * output."""
    return (of_queries(q, k, v, g, lse, delta, seen, scale), *of_keys(q, k, v, g, lse, delta, seen, scale))


def of_queries(q, k, v, g, lse, delta, seen: Intervals, scale: float) -> Float[Array, "B S H k"]:
    """dq: for each tile of queries the sum over the keys it sees."""
    (B, S, H, dk), dv, dtype = q.shape, v.shape[-1], q.dtype
    n, keys = S // TILE, ROWS
    stages = frame.ring(keys * (dk + dv) * 2, TILE * (dk + dv) * 2, 3)

    def attention_of_queries(
        q,
        k,
        v,
        g,
        lse,
        delta,
        low,
        high,
        spans,
        dq,
        q_own,
        g_own,
        k_ring,
        v_ring,
        lse_own,
        delta_own,
        low_own,
        high_own,
        ready,
        filled,
        freed,
    ):
        batch, head, group = (lax.axis_index(name) for name in ("batch", "head", "group"))
        i = n - 1 - lax.axis_index("tile")
        span = tuple(spans[batch, i, at] for at in range(4))

        @pl.when(group < GROUPS)
        def compute():
            plgpu.set_max_registers(240, action="increase")
            at = pl.ds(i * TILE + group * ROWS, ROWS)
            for source, own in (
                (q.at[batch, at, head], q_own),
                (g.at[batch, at, head], g_own),
                (lse.at[batch, head, at], lse_own),
                (delta.at[batch, head, at], delta_own),
                (low.at[batch, at], low_own),
                (high.at[batch, at], high_own),
            ):
                plgpu.copy_gmem_to_smem(source, own.at[group], ready.at[group])
            plgpu.barrier_wait(ready.at[group])

            def run(total):
                def step(j, _, masked):
                    slot = lax.rem(j - span[0], jnp.int32(stages))
                    plgpu.barrier_wait(filled.at[slot])
                    s = frame.logits(q_own.at[group], k_ring.at[slot])
                    p = jnp.exp2(s * (scale * LOG2E) - frame.rows(lse_own[group] * LOG2E, s.shape))
                    if masked:
                        key = lax.broadcasted_iota(jnp.int32, s.shape, 1) + j * keys
                        p = jnp.where(
                            (key >= frame.rows(low_own[group], s.shape)) & (key <= frame.rows(high_own[group], s.shape)), p, 0.0
                        )
                    dp = frame.logits(g_own.at[group], v_ring.at[slot])
                    ds = (p * (dp - frame.rows(delta_own[group], s.shape))).astype(dtype)
                    frame.multiply(total, ds, k_ring.at[slot])
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(freed.at[slot])
                    return ()

                frame.in_three(span, step)
                return total[...]

            total = pl.run_scoped(run, plgpu.ACC((ROWS, dk), jnp.float32))
            q_own[group] = (total * scale).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_own.at[group], dq.at[batch, at, head])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(group == GROUPS)
        def fetch():
            def of(x):
                return lambda j: x.at[batch, pl.ds(j * keys, keys), head]

            frame.fetch(span, stages, ((((of(k), k_ring), (of(v), v_ring)), filled, freed),))

    number = partial(plgpu.SMEM, (GROUPS, ROWS))
    return frame.call(
        attention_of_queries,
        jax.ShapeDtypeStruct(q.shape, dtype),
        (
            frame.tiles(GROUPS, ROWS, dk, dtype=dtype),
            frame.tiles(GROUPS, ROWS, dv, dtype=dtype),
            frame.tiles(stages, keys, dk, dtype=dtype),
            frame.tiles(stages, keys, dv, dtype=dtype),
            number(jnp.float32),
            number(jnp.float32),
            number(jnp.int32),
            number(jnp.int32),
            plgpu.Barrier(num_arrivals=6, num_barriers=GROUPS),
            *frame.barriers(stages, 2),
        ),
        (B, H, n),
        (q, k, v, g, lse, delta, seen.low, seen.high, seen.keys_of_queries(TILE, keys, k.shape[1])),
        2 * dk + dv,
    )


def of_keys(q, k, v, g, lse, delta, seen: Intervals, scale: float) -> tuple[Float[Array, "B T H k"], Float[Array, "B T H v"]]:
    """dk, dv: for each tile of keys the sum over the queries that see it. Everything is transposed: keys are the rows."""
    (B, T, H, dk), dv, dtype = k.shape, v.shape[-1], k.dtype
    queries = ROWS
    stages = frame.ring(queries * (dk + dv) * 2, TILE * (dk + dv) * 2, 3)

    def attention_of_keys(
        q,
        k,
        v,
        g,
        lse,
        delta,
        low,
        high,
        spans,
        dk_out,
        dv_out,
        k_own,
        v_own,
        q_ring,
        g_ring,
        lse_ring,
        delta_ring,
        low_ring,
        high_ring,
        ready,
        filled,
        freed,
    ):
        batch, head, group, i = (lax.axis_index(name) for name in ("batch", "head", "group", "tile"))
        span = tuple(spans[batch, i, at] for at in range(4))
        rings = (q_ring, g_ring, lse_ring, delta_ring, low_ring, high_ring)

        @pl.when(group < GROUPS)
        def compute():
            plgpu.set_max_registers(240, action="increase")
            at = pl.ds(i * TILE + group * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(k.at[batch, at, head], k_own.at[group], ready.at[group])
            plgpu.copy_gmem_to_smem(v.at[batch, at, head], v_own.at[group], ready.at[group])
            plgpu.barrier_wait(ready.at[group])

            def run(dk_total, dv_total):
                def step(j, _, masked):
                    slot = lax.rem(j - span[0], jnp.int32(stages))
                    plgpu.barrier_wait(filled.at[slot])
                    shape = (ROWS, queries)
                    # This is `group`, but the compiler must not know that nothing here depends on j: before the loop it would
                    # form all addresses in k_own and v_own, 40 registers. dk, dv and two tiles of logits leave fewer of 240:
                    # at 192 and 128 ptxas then spills, and makes every product wait for the one before (its C7512).
                    own = jnp.minimum(group, j + GROUPS)
                    s = frame.logits(k_own.at[own], q_ring.at[slot])
                    p = jnp.exp2(s * (scale * LOG2E) - frame.cols(lse_ring[slot] * LOG2E, shape))
                    if masked:
                        key = lax.broadcasted_iota(jnp.int32, shape, 0) + (i * TILE + group * ROWS)
                        p = jnp.where(
                            (key >= frame.cols(low_ring[slot], shape)) & (key <= frame.cols(high_ring[slot], shape)), p, 0.0
                        )
                    dp = frame.logits(v_own.at[own], g_ring.at[slot])
                    ds = (p * (dp - frame.cols(delta_ring[slot], shape))).astype(dtype)
                    frame.multiply(dv_total, p.astype(dtype), g_ring.at[slot])
                    frame.multiply(dk_total, ds, q_ring.at[slot])
                    plgpu.wgmma_wait(0)
                    plgpu.commit_smem()  # rows' numbers were read by ordinary loads; the copy engine writes there next
                    plgpu.barrier_arrive(freed.at[slot])
                    return ()

                frame.in_three(span, step)
                return dk_total[...], dv_total[...]

            dk_total, dv_total = pl.run_scoped(run, plgpu.ACC((ROWS, dk), jnp.float32), plgpu.ACC((ROWS, dv), jnp.float32))
            k_own[group] = (dk_total * scale).astype(dtype)
            v_own[group] = dv_total.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k_own.at[group], dk_out.at[batch, at, head])
            plgpu.copy_smem_to_gmem(v_own.at[group], dv_out.at[batch, at, head])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(group == GROUPS)
        def fetch():
            def at(j):
                return pl.ds(j * queries, queries)

            sources = (
                lambda j: q.at[batch, at(j), head],
                lambda j: g.at[batch, at(j), head],
                lambda j: lse.at[batch, head, at(j)],
                lambda j: delta.at[batch, head, at(j)],
                lambda j: low.at[batch, at(j)],
                lambda j: high.at[batch, at(j)],
            )
            frame.fetch(span, stages, ((tuple(zip(sources, rings)), filled, freed),))

    number = partial(plgpu.SMEM, (stages, queries))
    return frame.call(
        attention_of_keys,
        (jax.ShapeDtypeStruct(k.shape, dtype), jax.ShapeDtypeStruct(v.shape, dtype)),
        (
            frame.tiles(GROUPS, ROWS, dk, dtype=dtype),
            frame.tiles(GROUPS, ROWS, dv, dtype=dtype),
            frame.tiles(stages, queries, dk, dtype=dtype),
            frame.tiles(stages, queries, dv, dtype=dtype),
            number(jnp.float32),
            number(jnp.float32),
            number(jnp.int32),
            number(jnp.int32),
            plgpu.Barrier(num_arrivals=2, num_barriers=GROUPS),
            *frame.barriers(stages, 6),
        ),
        (B, H, T // TILE),
        (q, k, v, g, lse, delta, seen.low, seen.high, seen.queries_of_keys(queries, TILE, T)),
        2 * dk + 2 * dv,
    )
