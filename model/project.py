"""Products written in the order that every backend does well, XLA's CPU backend included.

That backend has fast kernels (bfloat16 ones five to thirty times faster than its fallback) for products whose left
operand is summed over its last axis; for sums over two axes at once it transposes and then uses them. What it is given
should be finished: an activation function that is fused with the transposition takes longer than the product.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from model.in_stack import InStack


def project(axes: str, x: Array, w: Array | InStack) -> Array:
    """einsum(axes, x, w), `axes` such as "BSR,RHd->BSHd"; an axis of x is kept, or w's too. The first of the result is kept.
    Rows of an array that lies in its stack are multiplied there where the kernel for single rows takes its widths."""
    if not isinstance(w, InStack):
        return _project(axes, x, w)
    from model.kernels import grouped_matmul_row  # as in model/grouped_matmul.py

    of_x, of_w, _ = axes.replace("->", ",").split(",")
    summed = sum(axis in of_w for axis in of_x)
    inputs = math.prod(w.shape[:summed])
    rows, stack = x.reshape(-1, inputs), w.stack.reshape(len(w.stack), inputs, -1)
    if not grouped_matmul_row.takes(x.dtype, stack):
        return _project(axes, x, w.cut())
    out = grouped_matmul_row.rows(rows, stack, jnp.full(len(rows), w.layer, jnp.int32))
    return out.reshape(*x.shape[: x.ndim - summed], *w.shape[summed:])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project(axes: str, x: Array, w: Array) -> Array:
    """`project` of an array.

    The gradients are those of einsum. Autodiff would form the weight's as (g, x) and transpose the result; on a CPU
    it is 20 times slower in bfloat16 and twice slower in float32 than (x, g). It is summed in float32.
    """
    return _product(axes, x, w)


def _product(axes: str, x: Array, w: Array) -> Array:
    """einsum(axes, x, w). XLA for GPUs turns the product of a single row, as in decoding for one reader, into elementwise
    products, which it rounds to bfloat16 and writes to memory, as many as there are weights. There the row gets a second one."""
    of_x, of_w, out = axes.replace("->", ",").split(",")
    if any(size > 1 for axis, size in zip(of_x, x.shape) if axis not in of_w):
        return jnp.einsum(axes, x, w)

    def of_two(x, w):
        more = jnp.einsum(axes, jnp.concatenate([x, jnp.zeros_like(x)], of_x.index(out[0])), w)
        return lax.slice_in_dim(more, 0, 1, axis=0)

    return lax.platform_dependent(x, w, cuda=of_two, default=lambda x, w: jnp.einsum(axes, x, w))


def _forward(axes, x, w):
    return _product(axes, x, w), (x, w)


def _backward(axes, saved, g):
    x, w = finished(*saved)
    inputs, out = axes.split("->")
    of_x, of_w = inputs.split(",")
    dx = jnp.einsum(f"{out},{of_w}->{of_x}", g, w)
    dw = jnp.einsum(f"{of_x},{out}->{of_w}", x, g, preferred_element_type=jnp.float32)
    return dx, dw.astype(w.dtype)


_project.defvjp(_forward, _backward)


def finished(*arrays: Array) -> tuple[Array, ...]:
    """The same, but on a CPU computed before, not inside, what uses them."""
    return lax.platform_dependent(*arrays, cpu=lambda *x: lax.optimization_barrier(x), default=lambda *x: x)


def outer_sum(x: Float[Array, "*batch N A"], y: Float[Array, "*batch N B"]) -> Float[Array, "*batch A B"]:
    """sum_n x[n, a] * y[n, b] in float32, with N as two axes where it is even, for the reason above."""
    x, y = finished(x, y)
    n = x.shape[-2]
    if n % 2:
        return jnp.einsum("...na,...nb->...ab", x, y, preferred_element_type=jnp.float32)
    x, y = (z.reshape(*z.shape[:-2], 2, n // 2, z.shape[-1]) for z in (x, y))
    return jnp.einsum("...hna,...hnb->...ab", x, y, preferred_element_type=jnp.float32)
