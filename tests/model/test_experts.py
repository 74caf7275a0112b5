"""The block of experts on one device: what it keeps for the backward pass."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import dispatch, experts

N, D, F, E, K = 96, 40, 24, 8, 3


def problem(dtype):
    keys = jax.random.split(jax.random.key(0), 6)
    chosen = jax.lax.top_k(jax.random.normal(keys[0], (N, E)), K)[1]
    x, g = (jax.random.normal(key, (N, D), dtype) for key in keys[1:3])
    gates = jax.nn.softmax(jax.random.normal(keys[3], (N, K)))
    return chosen, g, (x, gates, (jax.random.normal(keys[4], (E, D, 2 * F), dtype), jax.random.normal(keys[5], (E, F, D), dtype)))


def with_copies_kept(x, gates, weights, chosen):
    """experts.apply on a GPU without a rule of its own for the copies."""
    to = experts.slots(chosen, weights, "gpu")
    first = partial(experts._matmul_of_kept_copies, x)
    return dispatch.from_slots(experts.in_slots(first, gates, weights, to, "gpu"), to)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_copies_of_tokens_are_made_again(dtype):
    """The backward pass is given the tokens and their places, not a row of D for every slot; every bit is the same."""
    chosen, g, args = problem(dtype)
    slots = len(experts.slots(chosen, args[2], "gpu").token_of)
    out, pull = jax.vjp(lambda *args: experts.apply(args[0], chosen, args[1], args[2], "gpu"), *args)
    want, plain_pull = jax.vjp(lambda *args: with_copies_kept(*args, chosen), *args)

    def kept(pull):
        return [x.shape for x in jax.tree.leaves(pull) if hasattr(x, "shape")]

    assert (slots, D) in kept(plain_pull) and (slots, D) not in kept(pull) and (N, D) in kept(pull)
    np.testing.assert_array_equal(out, want)
    jax.tree.map(np.testing.assert_array_equal, pull(g), plain_pull(g))
