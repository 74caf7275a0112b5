"""The forward kernel: output, log-sum-exp and largest logit of every row."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from kernels.hopper import plgpu
from model.kernels.attention_chunked import MASKED
from model.kernels.attention_gpu import frame
from model.kernels.attention_gpu.frame import GROUPS, LOG2E, ROWS, TILE
from model.kernels.intervals import Intervals


def forward(
    q: Float[Array, "B S H k"], k: Float[Array, "B T H k"], v: Float[Array, "B T H v"], seen: Intervals, scale: float
) -> tuple[Float[Array, "B S H v"], Float[Array, "B H S"], Float[Array, "B H S"]]:
    """Output, log-sum-exp and largest logit of every row. S and T are whole TILEs. A row that sees nothing gives zeros."""
    (B, S, H, dk), dv, dtype = q.shape, v.shape[-1], q.dtype
    n, keys = S // TILE, TILE
    stages = frame.ring(keys * (dk + dv) * 2, TILE * dk * 2, 2)
    to_log2, nothing = scale * LOG2E, MASKED / scale

    def attention_outputs(
        q,
        k,
        v,
        low,
        high,
        spans,
        out,
        lse,
        top,
        q_own,
        k_ring,
        v_ring,
        low_own,
        high_own,
        lse_own,
        top_own,
        ready,
        k_filled,
        k_freed,
        v_filled,
        v_freed,
        turn,
    ):
        batch, head, group = (lax.axis_index(name) for name in ("batch", "head", "group"))
        i = n - 1 - lax.axis_index("tile")  # the longest first
        span = tuple(spans[batch, i, at] for at in range(4))

        def take_turns():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        @pl.when(group < GROUPS)
        def compute():
            plgpu.set_max_registers(240, action="increase")
            at = pl.ds(i * TILE + group * ROWS, ROWS)
            own = q_own.at[group]
            plgpu.copy_gmem_to_smem(q.at[batch, at, head], own, ready.at[group])
            plgpu.copy_gmem_to_smem(low.at[batch, at], low_own.at[group], ready.at[group])
            plgpu.copy_gmem_to_smem(high.at[batch, at], high_own.at[group], ready.at[group])
            plgpu.barrier_wait(ready.at[group])
            pl.when(group == 1)(take_turns)

            def step(j, carry, masked):
                total, largest, norm = carry
                slot = lax.rem(j - span[0], jnp.int32(stages))
                plgpu.barrier_wait(k_filled.at[slot])
                s = frame.logits(own, k_ring.at[slot], take_turns)
                plgpu.barrier_arrive(k_freed.at[slot])
                if masked:
                    key = lax.broadcasted_iota(jnp.int32, s.shape, 1) + j * keys
                    sees = (key >= frame.rows(low_own[group], s.shape)) & (key <= frame.rows(high_own[group], s.shape))
                    s = jnp.where(sees, s, nothing)
                new = jnp.maximum(largest, jnp.max(s, axis=1))
                shrink = jnp.exp2((largest - new) * to_log2)
                p = jnp.exp2(s * to_log2 - frame.rows(new * to_log2, s.shape))
                if masked:  # where a row has seen nothing yet p is 1, and from a fused multiply-add 2**(rounding of 1e30)
                    p = jnp.where(sees, p, 0.0)
                norm = norm * shrink + jnp.sum(p, axis=1)
                p = p.astype(dtype)
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(v_filled.at[slot])
                plgpu.barrier_wait(turn)

                def values(part):
                    frame.multiply(part, p, v_ring.at[slot])
                    return part[...]

                part = pl.run_scoped(values, plgpu.ACC((ROWS, dv), jnp.float32))
                plgpu.barrier_arrive(v_freed.at[slot])
                return total * frame.rows(shrink, total.shape) + part, new, norm

            start = (jnp.zeros((ROWS, dv), jnp.float32), jnp.full((ROWS,), nothing, jnp.float32), jnp.zeros((ROWS,), jnp.float32))
            total, largest, norm = frame.in_three(span, step, start)
            pl.when(group == 0)(take_turns)
            take_turns()  # nobody reads the ring any more: the output goes out through it
            norm = jnp.maximum(norm, 1e-30)
            v_ring[group, pl.ds(0, ROWS)] = (total / frame.rows(norm, total.shape)).astype(dtype)
            lse_own[group] = largest * scale + jnp.log(norm)
            top_own[group] = largest * scale
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(v_ring.at[group, pl.ds(0, ROWS)], out.at[batch, at, head])
            plgpu.copy_smem_to_gmem(lse_own.at[group], lse.at[batch, head, at])
            plgpu.copy_smem_to_gmem(top_own.at[group], top.at[batch, head, at])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(group == GROUPS)
        def fetch():
            def of(x):
                return lambda j: x.at[batch, pl.ds(j * keys, keys), head]

            frame.fetch(span, stages, ((((of(k), k_ring),), k_filled, k_freed), (((of(v), v_ring),), v_filled, v_freed)))

    per_row = jax.ShapeDtypeStruct((B, H, S), jnp.float32)
    number = partial(plgpu.SMEM, (GROUPS, ROWS))
    return frame.call(
        attention_outputs,
        (jax.ShapeDtypeStruct((B, S, H, dv), dtype), per_row, per_row),
        (
            frame.tiles(GROUPS, ROWS, dk, dtype=dtype),
            frame.tiles(stages, keys, dk, dtype=dtype),
            frame.tiles(stages, keys, dv, dtype=dtype),
            number(jnp.int32),
            number(jnp.int32),
            number(jnp.float32),
            number(jnp.float32),
            plgpu.Barrier(num_arrivals=3, num_barriers=GROUPS),
            *frame.barriers(stages, 1),
            *frame.barriers(stages, 1),
            plgpu.Barrier(num_arrivals=GROUPS),
        ),
        (B, H, n),
        (q, k, v, seen.low, seen.high, seen.keys_of_queries(TILE, keys, k.shape[1])),
        dk + dv,
    )
