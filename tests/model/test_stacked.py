"""The loop over stacked layers whose gradients are added to sums in place, against autodiff of lax.scan."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from model import stacked

L, D = 3, 8


def layer(x, weights, number, setting):
    """Two products, one measurement that the loss uses too, one array to keep, a setting of which it takes a part."""
    hidden = checkpoint_name(jnp.tanh(x @ weights["in"]), "hidden") * setting[number]
    x = x + hidden @ weights["out"]
    return x, {"size": jnp.sum(x**2), "most": lax.stop_gradient(jnp.max(x))}


BODIES = {
    "everything kept": layer,
    "nothing kept": jax.checkpoint(layer),
    "named kept": jax.checkpoint(layer, policy=jax.checkpoint_policies.save_only_these_names("hidden")),
}


@pytest.mark.parametrize("name, kept", [("everything kept", None), ("nothing kept", 1), ("named kept", 2)])
def test_gradients_and_what_is_kept(name, kept):
    """The sums come back with exactly the gradients of lax.scan added, the input's gradient is the same, and of the
    weights and the setting nothing is stacked a second time: only the layers' inputs, and what is named, are kept for the way
    back."""
    body, rng = BODIES[name], np.random.default_rng(0)
    x, setting = jnp.asarray(rng.normal(size=(4, D)), jnp.float32), jnp.full((5, 1, D), 0.7, jnp.float32)
    layers = {k: jnp.asarray(rng.normal(size=(L, D, D)) / 3, jnp.float32) for k in ("in", "out")}
    start = {k: jnp.asarray(rng.normal(size=(L, D, D)), jnp.float32) for k in layers}

    def loss(x, measured):
        return jnp.sum(x * 0.3) + jnp.sum(measured["size"] * jnp.arange(1.0, L + 1))

    def plain(x, layers):
        return loss(*lax.scan(lambda x, w: body(x, *w, setting), x, stacked.numbered(layers)))

    def adding(x, sums):
        return loss(*stacked.run(body, False, x, layers, stacked.Sums(sums, None, lambda total, g, seed, i: total + g), setting))

    value, (dx, grads) = jax.jit(jax.value_and_grad(plain, (0, 1)))(x, layers)
    mine, (my_dx, sums) = jax.jit(jax.value_and_grad(adding, (0, 1)))(x, start)
    np.testing.assert_allclose(mine, value, rtol=1e-6)
    np.testing.assert_allclose(my_dx, dx, rtol=1e-5, atol=1e-6)
    for k in layers:
        np.testing.assert_allclose(sums[k], start[k] + grads[k], rtol=1e-5, atol=1e-5)

    sums = stacked.Sums(start, None, lambda total, *_: total)
    saved = jax.eval_shape(lambda *a: stacked._forward(body, False, *a)[1], x, layers, sums, setting)
    shapes = [leaf.shape for leaf in saved.kept if leaf.ndim > 1]
    assert (L, D, D) not in shapes and (L, 5, 1, D) not in shapes and (kept is None or shapes == [(L, 4, D)] * kept)
