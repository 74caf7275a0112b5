"""Every cross-entropy implementation against float64, its gradients, and the memory of K2's vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import cross_entropy


def inputs(N, D, V, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(N), 4)
    return (
        jax.random.normal(keys[0], (N, D), dtype),
        jax.random.normal(keys[1], (D, V)),
        jax.random.randint(keys[2], (N,), 0, V),
        jax.random.uniform(keys[3], (N,)),
    )


def total(hidden, head, targets, weights, name, z_loss):
    """A weighted loss with z-loss, so that the gradients of both results are exercised."""
    nll, lse = cross_entropy.IMPLEMENTATIONS[name](hidden, head, targets, 24)
    return jnp.sum(weights * (nll + z_loss * lse**2)), (nll, lse)


@pytest.mark.parametrize("name", cross_entropy.IMPLEMENTATIONS)
@pytest.mark.parametrize("N, V, z_loss", [(24, 32, 0.0), (48, 64, 1e-2), (57, 75, 1e-2), (7, 20, 0.0)])
def test_values_and_gradients(name, N, V, z_loss, monkeypatch):
    """Whole tiles, several tiles, ragged ends of tokens and vocabulary, less than a tile."""
    monkeypatch.setattr(cross_entropy, "TILE", 32)
    hidden, head, targets, weights = inputs(N, 16, V)
    run = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
    (_, (nll, lse)), (dhidden, dhead) = run(hidden, head, targets, weights, name, z_loss)

    h, w, t = np.asarray(hidden, np.float64), np.asarray(head, np.float64), np.asarray(targets)
    logits = h @ w
    want_lse = np.log(np.exp(logits).sum(-1))
    want_nll = want_lse - logits[np.arange(N), t]
    # d/dlogits of weight * (nll + z * lse^2)
    softmax = np.exp(logits - want_lse[:, None])
    dlogits = softmax * (1 + 2 * z_loss * want_lse)[:, None] - np.eye(V)[t]
    dlogits *= np.asarray(weights, np.float64)[:, None]
    for mine, other in ((nll, want_nll), (lse, want_lse), (dhidden, dlogits @ w.T), (dhead, h.T @ dlogits)):
        np.testing.assert_allclose(mine, other, atol=2e-6 * np.abs(other).max())  # float32 sums of under 100 terms


def test_bfloat16_inputs_give_float32_losses_and_head_gradients():
    hidden, head, targets, weights = inputs(48, 16, 64, jnp.bfloat16)
    grads = jax.grad(total, argnums=(0, 1), has_aux=True)
    (dhidden, dhead), (nll, _) = grads(hidden, head, targets, weights, "tiled", 0.0)
    (want_hidden, want_head), (want, _) = grads(hidden, head, targets, weights, "reference", 0.0)
    assert (dhidden.dtype, dhead.dtype, nll.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    np.testing.assert_allclose(nll, want, rtol=1e-5)
    for mine, other in ((dhidden, want_hidden), (dhead, want_head)):
        mine, other = np.asarray(mine, np.float32), np.asarray(other, np.float32)
        assert np.abs(mine - other).max() <= 1e-2 * np.abs(other).max()  # one bfloat16 rounding of dlogits


def test_memory_at_the_vocabulary_of_k2():
    """Loss, z-loss and gradients of 8,192 tokens and 163,840 entries: one array of logits would be 5.4 GB."""
    N, D, V = 8192, 64, 163840

    def loss(hidden, head, targets):
        nll, lse = cross_entropy.chunked(hidden, head, targets)
        return jnp.sum(nll) + 1e-4 * jnp.sum(lse**2)

    shapes = (
        jax.ShapeDtypeStruct((N, D), jnp.float32),
        jax.ShapeDtypeStruct((D, V), jnp.float32),
        jax.ShapeDtypeStruct((N,), jnp.int32),
    )
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*shapes).compile()
    assert f"[{N},{V}]" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 64e6
