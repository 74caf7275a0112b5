"""The block of experts on one device: what it keeps for the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import dispatch, experts
from model.grouped_matmul import block_rows, grouped_matmul, implementation
from model.layers import swiglu

N, D, F, E, K = 96, 40, 24, 8, 3


def problem(dtype):
    keys = jax.random.split(jax.random.key(0), 6)
    chosen = jax.lax.top_k(jax.random.normal(keys[0], (N, E)), K)[1]
    x, g = (jax.random.normal(key, (N, D), dtype) for key in keys[1:3])
    gates = jax.nn.softmax(jax.random.normal(keys[3], (N, K)))
    return chosen, g, (x, gates, (jax.random.normal(keys[4], (E, D, 2 * F), dtype), jax.random.normal(keys[5], (E, F, D), dtype)))


def plainly(x, gates, weights, chosen):
    """experts.apply, written without a rule of its own for the copies."""
    gate_up, down = weights
    to, name = dispatch.plan(chosen, E, block_rows(chosen.size, E)), implementation("cpu")
    hidden = grouped_matmul(dispatch.to_slots(x, to), gate_up, to.block_expert, name)
    hidden = (swiglu(hidden).astype(jnp.float32) * dispatch.gates_to_slots(gates, to)[:, None]).astype(x.dtype)
    return dispatch.from_slots(grouped_matmul(hidden, down, to.block_expert, name), to)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_copies_of_tokens_are_made_again(dtype):
    """The backward pass is given the tokens and their places, not a row of D for every slot; every bit is the same."""
    chosen, g, args = problem(dtype)
    slots = len(dispatch.plan(chosen, E, block_rows(chosen.size, E)).token_of)
    out, pull = jax.vjp(lambda *args: experts.apply(args[0], chosen, args[1], args[2], "cpu"), *args)
    want, plain_pull = jax.vjp(lambda *args: plainly(*args, chosen), *args)

    def kept(pull):
        return [x.shape for x in jax.tree.leaves(pull) if hasattr(x, "shape")]

    assert (slots, D) in kept(plain_pull) and (slots, D) not in kept(pull) and (N, D) in kept(pull)
    np.testing.assert_array_equal(out, want)
    jax.tree.map(np.testing.assert_array_equal, pull(g), plain_pull(g))
