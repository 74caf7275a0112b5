"""The experts that one device holds, on rows that are here: sort, two grouped matmuls, combine."""

from __future__ import annotations

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from model import dispatch
from model.grouped_matmul import block_rows, grouped_matmul, implementation
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
    hidden = grouped_matmul(dispatch.to_slots(x_ND, to), gate_up, to.block_expert, name)
    gates = dispatch.gates_to_slots(gates_NK, to)[:, None]
    hidden = (swiglu(hidden).astype(jnp.float32) * gates).astype(x_ND.dtype)
    return dispatch.from_slots(grouped_matmul(hidden, down, to.block_expert, name), to)
