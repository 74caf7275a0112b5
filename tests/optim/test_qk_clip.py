"""QK-Clip: exact where it must not act, tau where it must, per layer and head."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optim_table import NOPE, ROPE, H, L, Q, R, arrays, k2_table, matrix, spec

from configs.schema import ConfigError, OptimConfig
from optim.build import build_optimizer
from optim.qk_clip import gammas, qk_clip

TAU = 2.0


@pytest.fixture(scope="module")
def clip():
    """The table's weights and some updates, unclipped and clipped with layer 0 under tau and layers 1..3 above."""
    specs = k2_table()
    params, updates = arrays(specs, 0), arrays(specs, 1, 0.01)
    logits = np.full((L + 1, H), 1.0, np.float32)
    logits[1, 0], logits[1, 2], logits[2, 1], logits[3] = 3.0, 50.0, TAU, 2.5
    t = qk_clip(specs, TAU)
    out, state = jax.jit(lambda u, p, m: t.update(u, t.init(p), p, max_logits=m))(updates, params, jnp.asarray(logits))
    before, after = ({k: params[k] + u[k] for k in params} for u in (updates, out))
    return specs, logits, before, after, updates, out, state


def head_logits(w, layer, c_q, c_kv, k_rope):
    """Largest logit of every head of a stacked layer for fixed latents, as MLA computes it (unscaled)."""
    q = np.einsum("sr,rhd->shd", c_q, np.asarray(w["q_b"][layer], np.float64))
    k = np.einsum("tr,rhd->thd", c_kv, np.asarray(w["kv_b"][layer], np.float64))
    nope = np.einsum("shd,thd->hst", q[..., :NOPE], k[..., :NOPE])
    return np.max(nope + np.einsum("shd,td->hst", q[..., NOPE:], k_rope), axis=(1, 2))


def test_the_logit_becomes_tau():
    """Measure the weights after the step, clip by what was measured, measure again."""
    specs = k2_table()
    rng = np.random.default_rng(0)
    latents = [rng.normal(size=(6, n)) for n in (Q, R, ROPE)]
    params, updates = arrays(specs, 0), arrays(specs, 1, 0.01)
    after = {k: params[k] + updates[k] for k in params}
    measured = np.stack([head_logits(after, i, *latents) for i in range(L)])
    tau = float(np.median(measured))
    t = qk_clip(specs, tau)
    stats = jnp.asarray(np.concatenate([np.zeros((1, H)), measured]), jnp.float32)
    out, state = t.update(updates, t.init(params), params, max_logits=stats)
    clipped = {k: params[k] + out[k] for k in params}
    again = np.stack([head_logits(clipped, i, *latents) for i in range(L)])
    np.testing.assert_allclose(again[measured > tau], tau, atol=1e-3)
    np.testing.assert_array_equal(again[measured <= tau], measured[measured <= tau])
    assert int(state.clipped) == (measured > tau).sum() > 0
    np.testing.assert_allclose(state.smallest, tau / measured.max(), rtol=1e-6)


def test_untouched_bit_for_bit(clip):
    """Tensors outside the clip, values, heads at or under tau, and whole layers under tau keep every bit."""
    specs, logits, before, after, updates, out, _ = clip
    for path in specs:
        if path not in ("q_b", "kv_b", "dense.q_b"):
            np.testing.assert_array_equal(out[path], updates[path])
    np.testing.assert_array_equal(out["dense.q_b"], updates["dense.q_b"])
    for layer in range(L):
        for head in range(H):
            if logits[layer + 1, head] <= TAU:
                np.testing.assert_array_equal(out["q_b"][layer, :, head], updates["q_b"][layer, :, head])
                np.testing.assert_array_equal(out["kv_b"][layer, :, head], updates["kv_b"][layer, :, head])
    np.testing.assert_array_equal(out["kv_b"][..., NOPE:], updates["kv_b"][..., NOPE:])


def test_factors(clip):
    """sqrt(gamma) on position-free queries and keys, gamma on rotated queries."""
    _, logits, before, after, _, _, state = clip
    for layer, head in ((0, 0), (0, 2), (2, 3)):
        gamma = TAU / logits[layer + 1, head]
        for path, part, factor in (
            ("q_b", np.s_[:NOPE], gamma**0.5),
            ("q_b", np.s_[NOPE:], gamma),
            ("kv_b", np.s_[:NOPE], gamma**0.5),
        ):
            np.testing.assert_allclose(
                after[path][layer, :, head, part], factor * before[path][layer, :, head, part], rtol=1e-5, atol=1e-7
            )  # float32, through u = (p + u) * factor - p
    assert int(state.clipped) == 2 + H and float(state.smallest) == pytest.approx(TAU / 50)


def test_momentum_is_not_rescaled_and_statistics_are_kept():
    """The clip changes weights only; its counts are in the state of the whole optimizer."""
    specs = {path: s for path, s in k2_table().items() if path in ("q_b", "kv_b")}
    grads, params = arrays(specs, 1), arrays(specs, 0)
    logits = jnp.full((L + 1, H), 10.0)
    with_clip, without = (build_optimizer(specs, OptimConfig(qk_clip_tau=tau), 10) for tau in (TAU, None))
    _, a = with_clip.update(grads, with_clip.init(params), params, max_logits=logits)
    _, b = without.update(grads, without.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, a.muon, b.muon)
    assert int(a.qk_clip.clipped) == L * H and int(b.qk_clip.clipped) == 0


def test_gammas_ignore_what_is_not_finite():
    """An overflow must not erase a head, and negative maxima are no reason to act."""
    logits = jnp.asarray([[jnp.inf, jnp.nan, -jnp.inf, -5.0, 0.0, 4.0]])
    np.testing.assert_array_equal(gammas(logits, TAU), [[1, 1, 1, 1, 1, 0.5]])


def test_wrong_use():
    specs = k2_table()
    with pytest.raises(ConfigError, match="above 0"):
        qk_clip(specs, 0.0)
    with pytest.raises(ConfigError, match="no parameter declares clip_powers"):
        qk_clip({"router": specs["router"]}, TAU)
    lost = spec((2, 8, H, 4), "layers q_lora heads qk_dim", matrix=matrix("q_lora", "qk_dim"), clip_powers=((4, 1.0),))
    with pytest.raises(ConfigError, match="names 0 of them"):
        qk_clip({"q": lost}, TAU)
