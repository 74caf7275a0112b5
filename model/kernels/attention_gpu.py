"""Attention on Hopper GPUs: three Pallas kernels of our own, each with the tensor cores fed by the copy engine.

A block of threads is three warpgroups: two that compute, 64 rows each, and one that fetches tiles into a ring of shared
memory ahead of them. Logits live in registers only. `forward` is the online softmax of arXiv 2205.14135 and gives every
row's largest logit and log-sum-exp; `backward` is two kernels, one that sums over keys (dq) and one that sums over queries
(dk, dv). Together they form the logits twice, 7 products where one kernel with atomic adds needs 5, and give the same bits
in every run. The order of two computing warpgroups in `forward`, one multiplying while the other exponentiates, is that of
FlashAttention-3 (arXiv 2407.08608).

What a query sees is an interval of keys, so that is all a kernel is told: model/kernels/intervals.py. Tiles that nobody sees
are never fetched, tiles that everybody sees whole are not masked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from kernels import hopper
from kernels.hopper import plgpu
from model.kernels.attention_chunked import MASKED
from model.kernels.intervals import Intervals

ROWS = 64
"""Rows of a warpgroup: those of one matrix instruction."""

GROUPS = 2
TILE = ROWS * GROUPS

LOG2E = math.log2(math.e)

WIDEST = (192, 128)
"""Of a head's queries and keys, and of its values: what fits in registers beside a tile of logits."""


def refusal(q: Array, v: Array) -> str:
    """Why these cannot be worked on here, empty if they can."""
    if plgpu is None:
        return "this jax has no Mosaic GPU, which the Hopper kernels are written in"
    if hopper.miscompiles():
        return "CUDA 12.8.0 to 12.9.0 miscompile causal masks; install nvidia-cuda-nvcc-cu12 12.9.86 or newer, or jax[cuda13]"
    widths = q.shape[-1], v.shape[-1]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"the Hopper kernels multiply bfloat16 and float16, not {q.dtype.name}"
    if any(width % ROWS or not 0 < width <= most for width, most in zip(widths, WIDEST)):
        return (
            f"heads of {widths[0]} and {widths[1]} are not whole multiples of {ROWS} up to {WIDEST[0]} and {WIDEST[1]}, "
            "which the Hopper kernels take"
        )
    return ""


def attend(
    q: Float[Array, "B S H k"],
    k: Float[Array, "B T H k"],
    v: Float[Array, "B T H v"],
    segments: Int[Array, "B T"],
    at: Int[Array, "S"],
    scale: float,
    chunk: int = 0,
) -> tuple[Float[Array, "B S H v"], Float[Array, "H"]]:
    """Attention output and every head's largest visible logit, as `attention.reference`; `chunk` is not used.

    Operands for which `refusal` has no reason. Documents must be contiguous. Padding gives zeros; `max_logit` carries no
    gradient.
    """
    S = q.shape[1]

    def whole_tiles(x):
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % TILE), (0, 0), (0, 0)))

    q, k, v = map(whole_tiles, (q, k, v))
    out, top = _attend(q, k, v, Intervals.of(segments, at, q.shape[1], k.shape[1]), scale)
    return out[:, :S], top


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, seen: Intervals, scale: float):
    out, _, top = forward(q, k, v, seen, scale)
    return out, jnp.max(top, axis=(0, 2))


def _attend_forward(q, k, v, seen, scale):
    out, lse, top = forward(q, k, v, seen, scale)
    # Named, so that a remat policy that keeps them spares the backward pass a second forward pass.
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return (out, jnp.max(top, axis=(0, 2))), (q, k, v, seen, out, lse)


def _attend_backward(scale, saved, gradients):
    q, k, v, seen, out, lse = saved
    g = gradients[0]
    delta = jnp.einsum("BSHv,BSHv->BHS", g.astype(jnp.float32), out.astype(jnp.float32))
    return *backward(q, k, v, g, lse, delta, seen, scale), None


_attend.defvjp(_attend_forward, _attend_backward)


def _ring(per_stage: int, held: int, most: int) -> int:
    """Stages of the ring of tiles that fit beside what a block holds throughout."""
    return min(most, (hopper.SHARED_BYTES - 8192 - held) // per_stage)  # 8 KiB for rows' numbers and barriers


def _tiles(*shape: int, dtype):
    """Shared memory as the matrix instructions read it."""
    return plgpu.SMEM(shape, dtype, transforms=hopper.swizzled(dtype, shape[-1]))


def _rows(x: Array, shape: tuple[int, int]) -> Array:
    return lax.broadcast_in_dim(x, shape, (0,))


def _cols(x: Array, shape: tuple[int, int]) -> Array:
    return lax.broadcast_in_dim(x, shape, (1,))


def multiply(total, x, tile, transposed: bool = False) -> None:
    """total += x @ tile, or @ its transpose; x in shared memory or in registers. The only place that does: Pallas'
    interpreter takes operands neither from registers nor, before jax 0.12, transposed, and tests stand in for it here."""
    plgpu.wgmma(total, x, hopper.transpose(tile) if transposed else tile)


def _logits(x, tile, meanwhile: Callable = lambda: None) -> Array:
    """x @ tile^T in registers; `meanwhile` runs while it is multiplied."""

    def run(total):
        multiply(total, x, tile, transposed=True)
        meanwhile()
        return total[...]

    return pl.run_scoped(run, plgpu.ACC((x.shape[0], tile.shape[0]), jnp.float32))


def _in_three(span: tuple[Array, ...], step: Callable, carry=()):
    """Tiles of which some rows see some, all see all, and again some see some."""
    first, inside, outside, end = span
    carry = lax.fori_loop(first, inside, partial(step, masked=True), carry)
    carry = lax.fori_loop(inside, outside, partial(step, masked=False), carry)
    return lax.fori_loop(outside, end, partial(step, masked=True), carry)


def _fetch(span: tuple[Array, ...], stages: int, streams) -> None:
    """Copy every tile of the span into its place in the rings, when that is free. A stream is (what is copied, filled,
    freed): pairs of a source as a function of the tile and its ring, and the barriers that they share."""
    plgpu.set_max_registers(24, action="decrease")
    first, end = span[0], span[-1]

    def step(j, _):
        slot = lax.rem(j - first, jnp.int32(stages))
        for copies, filled, freed in streams:

            @pl.when(j - first >= stages)
            def _(freed=freed):
                plgpu.barrier_wait(freed.at[slot])

            for source, ring in copies:
                plgpu.copy_gmem_to_smem(source(j), ring.at[slot], filled.at[slot])
        return ()

    lax.fori_loop(first, end, step, ())


def _barriers(stages: int, copies: int) -> tuple:
    """filled, freed of a stream."""
    return (plgpu.Barrier(num_arrivals=copies, num_barriers=stages), plgpu.Barrier(num_arrivals=GROUPS, num_barriers=stages))


def _call(body: Callable, outputs, scratch, grid: tuple[int, int, int], operands: tuple[Array, ...], products: int):
    """The kernel on its operands. products: columns of operands and results per pair of a query and a key, half of which
    see each other where a row is one document: what kernels/hopper.py states to launch.py plan."""
    kernel = plgpu.kernel(
        body,
        out_type=outputs,
        scratch_types=scratch,
        grid=grid,
        grid_names=("batch", "head", "tile"),
        num_threads=GROUPS + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
    )
    (B, S, H, _), T = operands[0].shape, operands[1].shape[1]
    moved = sum(x.size * x.dtype.itemsize for x in (*operands, *jax.tree.leaves(outputs)))
    with hopper.stated(B * H * S * T * products, moved):
        return kernel(*operands)


def forward(
    q: Float[Array, "B S H k"], k: Float[Array, "B T H k"], v: Float[Array, "B T H v"], seen: Intervals, scale: float
) -> tuple[Float[Array, "B S H v"], Float[Array, "B H S"], Float[Array, "B H S"]]:
    """Output, log-sum-exp and largest logit of every row. S and T are whole TILEs. A row that sees nothing gives zeros."""
    (B, S, H, dk), dv, dtype = q.shape, v.shape[-1], q.dtype
    n, keys = S // TILE, TILE
    stages = _ring(keys * (dk + dv) * 2, TILE * dk * 2, 2)
    to_log2, nothing = scale * LOG2E, MASKED / scale

    def body(
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
                s = _logits(own, k_ring.at[slot], take_turns)
                plgpu.barrier_arrive(k_freed.at[slot])
                if masked:
                    key = lax.broadcasted_iota(jnp.int32, s.shape, 1) + j * keys
                    sees = (key >= _rows(low_own[group], s.shape)) & (key <= _rows(high_own[group], s.shape))
                    s = jnp.where(sees, s, nothing)
                new = jnp.maximum(largest, jnp.max(s, axis=1))
                shrink = jnp.exp2((largest - new) * to_log2)
                p = jnp.exp2(s * to_log2 - _rows(new * to_log2, s.shape))
                if masked:  # where a row has seen nothing yet p is 1, and from a fused multiply-add 2**(rounding of 1e30)
                    p = jnp.where(sees, p, 0.0)
                norm = norm * shrink + jnp.sum(p, axis=1)
                p = p.astype(dtype)
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(v_filled.at[slot])
                plgpu.barrier_wait(turn)

                def values(part):
                    multiply(part, p, v_ring.at[slot])
                    return part[...]

                part = pl.run_scoped(values, plgpu.ACC((ROWS, dv), jnp.float32))
                plgpu.barrier_arrive(v_freed.at[slot])
                return total * _rows(shrink, total.shape) + part, new, norm

            start = (jnp.zeros((ROWS, dv), jnp.float32), jnp.full((ROWS,), nothing, jnp.float32), jnp.zeros((ROWS,), jnp.float32))
            total, largest, norm = _in_three(span, step, start)
            pl.when(group == 0)(take_turns)
            take_turns()  # nobody reads the ring any more: the output goes out through it
            norm = jnp.maximum(norm, 1e-30)
            v_ring[group, pl.ds(0, ROWS)] = (total / _rows(norm, total.shape)).astype(dtype)
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

            _fetch(span, stages, ((((of(k), k_ring),), k_filled, k_freed), (((of(v), v_ring),), v_filled, v_freed)))

    per_row = jax.ShapeDtypeStruct((B, H, S), jnp.float32)
    number = partial(plgpu.SMEM, (GROUPS, ROWS))
    return _call(
        body,
        (jax.ShapeDtypeStruct((B, S, H, dv), dtype), per_row, per_row),
        (
            _tiles(GROUPS, ROWS, dk, dtype=dtype),
            _tiles(stages, keys, dk, dtype=dtype),
            _tiles(stages, keys, dv, dtype=dtype),
            number(jnp.int32),
            number(jnp.int32),
            number(jnp.float32),
            number(jnp.float32),
            plgpu.Barrier(num_arrivals=3, num_barriers=GROUPS),
            *_barriers(stages, 1),
            *_barriers(stages, 1),
            plgpu.Barrier(num_arrivals=GROUPS),
        ),
        (B, H, n),
        (q, k, v, seen.low, seen.high, seen.keys_of_queries(TILE, keys, k.shape[1])),
        dk + dv,
    )


def backward(
    q, k, v, g: Float[Array, "B S H v"], lse: Float[Array, "B H S"], delta: Float[Array, "B H S"], seen: Intervals, scale: float
) -> tuple[Array, Array, Array]:
    """dq, dk, dv for the cotangent g of the output; delta: sum over v of g * output."""
    return (_queries(q, k, v, g, lse, delta, seen, scale), *_keys(q, k, v, g, lse, delta, seen, scale))


def _queries(q, k, v, g, lse, delta, seen: Intervals, scale: float) -> Float[Array, "B S H k"]:
    """dq: for each tile of queries the sum over the keys it sees."""
    (B, S, H, dk), dv, dtype = q.shape, v.shape[-1], q.dtype
    n, keys = S // TILE, ROWS
    stages = _ring(keys * (dk + dv) * 2, TILE * (dk + dv) * 2, 3)

    def body(
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
                    s = _logits(q_own.at[group], k_ring.at[slot])
                    p = jnp.exp2(s * (scale * LOG2E) - _rows(lse_own[group] * LOG2E, s.shape))
                    if masked:
                        key = lax.broadcasted_iota(jnp.int32, s.shape, 1) + j * keys
                        p = jnp.where((key >= _rows(low_own[group], s.shape)) & (key <= _rows(high_own[group], s.shape)), p, 0.0)
                    dp = _logits(g_own.at[group], v_ring.at[slot])
                    ds = (p * (dp - _rows(delta_own[group], s.shape))).astype(dtype)
                    multiply(total, ds, k_ring.at[slot])
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(freed.at[slot])
                    return ()

                _in_three(span, step)
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

            _fetch(span, stages, ((((of(k), k_ring), (of(v), v_ring)), filled, freed),))

    number = partial(plgpu.SMEM, (GROUPS, ROWS))
    return _call(
        body,
        jax.ShapeDtypeStruct(q.shape, dtype),
        (
            _tiles(GROUPS, ROWS, dk, dtype=dtype),
            _tiles(GROUPS, ROWS, dv, dtype=dtype),
            _tiles(stages, keys, dk, dtype=dtype),
            _tiles(stages, keys, dv, dtype=dtype),
            number(jnp.float32),
            number(jnp.float32),
            number(jnp.int32),
            number(jnp.int32),
            plgpu.Barrier(num_arrivals=6, num_barriers=GROUPS),
            *_barriers(stages, 2),
        ),
        (B, H, n),
        (q, k, v, g, lse, delta, seen.low, seen.high, seen.keys_of_queries(TILE, keys, k.shape[1])),
        2 * dk + dv,
    )


def _keys(q, k, v, g, lse, delta, seen: Intervals, scale: float) -> tuple[Float[Array, "B T H k"], Float[Array, "B T H v"]]:
    """dk, dv: for each tile of keys the sum over the queries that see it. Everything is transposed: keys are the rows."""
    (B, T, H, dk), dv, dtype = k.shape, v.shape[-1], k.dtype
    queries = ROWS
    stages = _ring(queries * (dk + dv) * 2, TILE * (dk + dv) * 2, 3)

    def body(
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
                    s = _logits(k_own.at[own], q_ring.at[slot])
                    p = jnp.exp2(s * (scale * LOG2E) - _cols(lse_ring[slot] * LOG2E, shape))
                    if masked:
                        key = lax.broadcasted_iota(jnp.int32, shape, 0) + (i * TILE + group * ROWS)
                        p = jnp.where((key >= _cols(low_ring[slot], shape)) & (key <= _cols(high_ring[slot], shape)), p, 0.0)
                    dp = _logits(v_own.at[own], g_ring.at[slot])
                    ds = (p * (dp - _cols(delta_ring[slot], shape))).astype(dtype)
                    multiply(dv_total, p.astype(dtype), g_ring.at[slot])
                    multiply(dk_total, ds, q_ring.at[slot])
                    plgpu.wgmma_wait(0)
                    plgpu.commit_smem()  # rows' numbers were read by ordinary loads; the copy engine writes there next
                    plgpu.barrier_arrive(freed.at[slot])
                    return ()

                _in_three(span, step)
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
            _fetch(span, stages, ((tuple(zip(sources, rings)), filled, freed),))

    number = partial(plgpu.SMEM, (stages, queries))
    return _call(
        body,
        (jax.ShapeDtypeStruct(k.shape, dtype), jax.ShapeDtypeStruct(v.shape, dtype)),
        (
            _tiles(GROUPS, ROWS, dk, dtype=dtype),
            _tiles(GROUPS, ROWS, dv, dtype=dtype),
            _tiles(stages, queries, dk, dtype=dtype),
            _tiles(stages, queries, dv, dtype=dtype),
            number(jnp.float32),
            number(jnp.float32),
            number(jnp.int32),
            number(jnp.int32),
            plgpu.Barrier(num_arrivals=2, num_barriers=GROUPS),
            *_barriers(stages, 6),
        ),
        (B, H, T // TILE),
        (q, k, v, g, lse, delta, seen.low, seen.high, seen.queries_of_keys(queries, TILE, T)),
        2 * dk + 2 * dv,
    )
