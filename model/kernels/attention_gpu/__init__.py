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

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from kernels import hopper
from kernels.hopper import plgpu
from model.kernels.attention_gpu.frame import ROWS, TILE
from model.kernels.attention_gpu.gradients import backward
from model.kernels.attention_gpu.outputs import forward
from model.kernels.intervals import Intervals

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
    # The barrier keeps jax 0.11's XLA from running the kernel twice, once for what is kept and once for what goes on.
    out, lse, top = lax.optimization_barrier(forward(q, k, v, seen, scale))
    # Named, so that a remat policy that keeps them spares the backward pass a second forward pass.
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return (out, jnp.max(top, axis=(0, 2))), (q, k, v, seen, out, lse)


def _attend_backward(scale, saved, gradients):
    q, k, v, seen, out, lse = saved
    g = gradients[0]
    delta = jnp.einsum("BSHv,BSHv->BHS", g.astype(jnp.float32), out.astype(jnp.float32))
    return *backward(q, k, v, g, lse, delta, seen, scale), None


_attend.defvjp(_attend_forward, _attend_backward)
