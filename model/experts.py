"""The experts that one device holds, on rows that are here: sort, two grouped matmuls, combine."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from model import dispatch
from model.grouped_matmul import block_rows, gradients, grouped_matmul, implementation
from model.layers import swiglu

Weights = tuple[Float[Array, "E D 2*F"], Float[Array, "E F D"]]
"""Gate and up in one array, and down."""


def apply(x_ND: Float[Array, "N D"], experts_NK: Int[Array, "N K"], gates_NK: Float[Array, "N K"], weights: Weights,
          platform: str) -> Float[Array, "N D"]:
    """Sum over each token's experts of gate * expert(x). The gate is applied before the down projection, which is linear:
    the K outputs then only need adding, and need not be kept for the gate's gradient."""
    gate_up, down = weights
    block = block_rows(experts_NK.size, len(down), platform)
    to = checkpoint_name(dispatch.plan(experts_NK, len(down), block), "routing")
    name = implementation(platform)
    hidden = _matmul_of_copies(x_ND, gate_up, to, name)
    gates = dispatch.gates_to_slots(gates_NK, to)[:, None]
    hidden = (swiglu(hidden).astype(jnp.float32) * gates).astype(x_ND.dtype)
    return dispatch.from_slots(grouped_matmul(hidden, down, to.block_expert, name), to)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _matmul_of_copies(x_ND: Float[Array, "N D"], w: Array, to: dispatch.Dispatch, name: str) -> Float[Array, "M F"]:
    """grouped_matmul of every token's copies in its slots. The copies, [M, D] with M >= N * K, are not kept for the
    gradient of the weights: the backward pass makes them again from the tokens."""
    return grouped_matmul(dispatch.to_slots(x_ND, to), w, to.block_expert, name)


def _copies_forward(x_ND, w, to, name):
    return _matmul_of_copies(x_ND, w, to, name), (x_ND, w, to)


def _copies_backward(name, saved, g):
    x_ND, w, to = saved
    dx_MD, dw, _ = gradients(name, (dispatch.to_slots(x_ND, to), w, to.block_expert), g)
    return dispatch.from_slots(dx_MD, to), dw, None


_matmul_of_copies.defvjp(_copies_forward, _copies_backward)
