"""The experts that one device holds, on rows that are here: sort, two grouped matmuls, combine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from model import dispatch
from model.grouped_matmul import block_rows, gradients, grouped_matmul, implementation
from model.layers import swiglu
from model.remat import HIDDEN

Weights = tuple[Float[Array, "E D 2*F"], Float[Array, "E F D"]]
"""Gate and up in one array, and down."""

EVEN_LOAD = "even_load_"
"""Name scope, with the share of rows behind it that have work if every expert gets the same number of pairs: kernels skip
the others, and who counts a compiled program's operations reads it there (train/plan/census.py)."""


def apply(
    x_ND: Float[Array, "N D"],
    experts_NK: Int[Array, "N K"],
    gates_NK: Float[Array, "N K"],
    weights: Weights,
    platform: str,
    filled: float = 1.0,
) -> Float[Array, "N D"]:
    """Sum over each token's experts of gate * expert(x); the expert E is nobody and gives zero. `filled`: the share of pairs
    that are expected not to be nobody's.
    """
    to = slots(experts_NK, weights, platform)
    # A CPU has the memory for the copies; making them twice would take a twentieth of the block's time.
    first = partial(_matmul_of_kept_copies if platform == "cpu" else _matmul_of_copies, x_ND)
    return dispatch.from_slots(in_slots(first, gates_NK, weights, to, platform, filled), to)


def slots(experts_NK: Int[Array, "N K"], weights: Weights, platform: str) -> dispatch.Dispatch:
    """Where pairs go, in blocks that suit the platform. Weights at four bits or still in their stack are only served."""
    held, trained = len(weights[1]), isinstance(weights[1], jax.Array)
    block = block_rows(experts_NK.size, held, platform, trained)
    return checkpoint_name(dispatch.plan(experts_NK, held, block, platform), "routing")


def in_slots(
    first: Callable[[Array, dispatch.Dispatch, str], Float[Array, "M 2*F"]],
    gates_NK: Float[Array, "N K"],
    weights: Weights,
    to: dispatch.Dispatch,
    platform: str,
    filled: float = 1.0,
) -> Float[Array, "M D"]:
    """gate * expert(row) of every slot; zero for padding, whatever row it has. first(gate_up, to, name): the rows in their
    slots times the first weights.

    The gate is applied before the down projection, which is linear: the K outputs then only need adding, and need not be
    kept for the gate's gradient.
    """
    gate_up, down = weights
    name, M = implementation(platform), len(to.token_of)
    busy = min(filled * gates_NK.size + len(down) * (to.block - 1) / 2, M)
    with jax.named_scope(f"{EVEN_LOAD}{busy / M:.4f}"):
        hidden = checkpoint_name(first(gate_up, to, name), HIDDEN)
        gates = dispatch.gates_to_slots(gates_NK, to)[:, None]
        hidden = (swiglu(hidden).astype(jnp.float32) * gates).astype(hidden.dtype)
        return grouped_matmul(hidden, down, to.block_expert, name)


def _matmul_of_kept_copies(x_ND: Float[Array, "N D"], w: Array, to: dispatch.Dispatch, name: str) -> Float[Array, "M F"]:
    """grouped_matmul of every token's copies in its slots."""
    return grouped_matmul(dispatch.to_slots(x_ND, to), w, to.block_expert, name)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _matmul_of_copies(x_ND: Float[Array, "N D"], w: Array, to: dispatch.Dispatch, name: str) -> Float[Array, "M F"]:
    """The same, but the copies, [M, D] with M >= N * K, are not kept for the gradient of the weights: the backward pass
    makes them again from the tokens."""
    return _matmul_of_kept_copies(x_ND, w, to, name)


def _copies_forward(x_ND, w, to, name):
    return _matmul_of_copies(x_ND, w, to, name), (x_ND, w, to)


def _copies_backward(name, saved, g):
    x_ND, w, to = saved
    dx_MD, dw, _ = gradients(name, (dispatch.to_slots(x_ND, to), w, to.block_expert), g)
    return dispatch.from_slots(dx_MD, to), dw, None


_matmul_of_copies.defvjp(_copies_forward, _copies_backward)
