"""The loss that forms its gradients in the forward pass, against float64, the other form, and what it may hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import cross_entropy, token_loss
from model.transformer import bind
from tests.model.networks import call_for, random_params, small
from tests.model.test_cross_entropy import inputs
from train.plan.census import census

FACTORS = jnp.float32(0.5), jnp.float32(0.01)


def wanted(hidden, head, targets, weights):
    """Loss, sum of weighted nll, and gradients, in float64."""
    h, w, t, share = (np.asarray(x, np.float64) for x in (hidden, head, targets, weights))
    logits, t = h @ w, t.astype(int)
    lse = np.log(np.exp(logits).sum(-1))
    nll = lse - logits[np.arange(len(t)), t]
    a, b = (float(f) for f in FACTORS)
    dlogits = np.exp(logits - lse[:, None]) * (a + 2 * b * lse)[:, None] - a * np.eye(w.shape[1])[t]
    dlogits *= share[:, None]
    return np.sum(share * (a * nll + b * lse**2)), np.sum(share * nll), dlogits @ w.T, h.T @ dlogits


@pytest.mark.parametrize("logits_at_a_time", [1, 300, 2**20])
@pytest.mark.parametrize("N, V", [(24, 32), (57, 75), (1, 20)])
def test_values_and_gradients(N, V, logits_at_a_time, monkeypatch):
    """Token by token, some at a time with a ragged end, all at once. The loss's own gradient is one factor of all."""
    monkeypatch.setattr(token_loss, "LOGITS", logits_at_a_time)
    hidden, head, targets, weights = inputs(N, 16, V)

    def loss(hidden, head):
        loss, nll = token_loss.with_gradients(hidden, head, targets, weights, *FACTORS)
        return 3 * loss, nll

    (value, nll), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, head)
    want, want_nll, *want_grads = wanted(hidden, head, targets, weights)
    for mine, other in ((value, 3 * want), (nll, want_nll), *zip(grads, (3 * g for g in want_grads), strict=True)):
        np.testing.assert_allclose(mine, other, atol=2e-6 * np.abs(other).max())  # float32 sums of under 100 terms
    np.testing.assert_allclose(loss(hidden, head)[0], value, rtol=1e-6)  # without a gradient it is another program


def test_a_target_that_is_no_entry_has_the_logit_zero():
    """As in the registry's forms: a row of padding may name any."""
    hidden, head, targets, weights = inputs(24, 16, 32)
    targets = targets.at[3].set(-1).at[5].set(32)

    def of(loss):
        return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, head)

    mine = of(lambda h, w: token_loss.with_gradients(h, w, targets, weights, *FACTORS))
    want = of(lambda h, w: token_loss._sums(*cross_entropy.reference(h, w, targets), weights, *FACTORS))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(b).max()), mine, want)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_both_forms_agree(dtype):
    """A GPU's and a CPU's, on a network's own head; up to one rounding of the logits' gradients in bfloat16."""
    cfg, rows = small(), (2, 24)
    hidden, _, targets, weights = inputs(48, cfg.hidden_size, cfg.vocab_size, dtype)

    def of(platform, hidden, params):
        call = call_for(np.zeros(rows, np.int32), platform=platform)
        return token_loss.weighted(hidden, bind(cfg, params).head, targets.reshape(rows), weights, *FACTORS, call)

    run = jax.value_and_grad(of, (1, 2), has_aux=True)
    (loss, nll), (dhidden, grads) = run("hopper", hidden.reshape(*rows, -1), params := random_params(cfg))
    (want, want_nll), (want_hidden, want_grads) = run("cpu", hidden.reshape(*rows, -1), params)
    np.testing.assert_allclose([loss, nll], [want, want_nll], rtol=1e-5)
    for mine, other in ((dhidden, want_hidden), (grads["head"], want_grads["head"])):
        assert mine.dtype == other.dtype
        mine, other = np.asarray(mine, np.float32), np.asarray(other, np.float32)
        assert np.abs(mine - other).max() <= (1e-2 if dtype == jnp.bfloat16 else 2e-6) * np.abs(other).max()


@pytest.mark.parametrize("N, tiles", [(100, (1, 100)), (16384, (2, 8192)), (20480, (3, 6912)), (36864, (5, 7424))])
def test_tiles_are_equal_and_whole(N, tiles):
    """Of 65,536 entries; little is added."""
    found = jax.eval_shape(lambda x: token_loss._in_tiles(x, 65536), jax.ShapeDtypeStruct((N,), jnp.int32)).shape
    assert found == tiles and found[0] * found[1] < 1.02 * N


def test_three_products_with_some_logits_at_a_time(monkeypatch):
    """Of the compiled program: each logit is formed once, and no array holds those of all tokens."""
    monkeypatch.setattr(token_loss, "LOGITS", 2**17)
    N, D, V = 512, 64, 1024
    shapes = jax.ShapeDtypeStruct((N, D), jnp.float32), jax.ShapeDtypeStruct((D, V), jnp.float32)

    def loss(hidden, head):
        return token_loss.with_gradients(hidden, head, jnp.zeros(N, jnp.int32), jnp.ones(N), *FACTORS)[0]

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes).compile()
    assert census(compiled.as_text()).flops == 3 * 2 * N * D * V
    assert f"[{N},{V}]" not in compiled.as_text()
