"""The router against plain numpy: choice, gates, group limit, loads, the balance loss of DeepSeek-V3 (eq. 17-20)."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import router
from model.decode.served_params import SERVED
from model.router import exact_product
from model.transformer import bind
from quant.served import Serving
from tests.model.networks import call_for, random_params, small

N = 40


def routed(bias=0.3, **changes):
    cfg = small(n_routed_experts=12, num_experts_per_tok=3, routed_scaling_factor=1.5, **changes)
    params = random_params(cfg, bias=bias)
    layer = jax.tree.map(lambda x: x[0], bind(cfg, params).moe)
    x = jax.random.normal(jax.random.key(1), (N, cfg.hidden_size))
    experts, gates, scores = layer.feed_forward.router(x, call_for(np.zeros((1, N))))
    weight = np.asarray(params["moe.mlp.router"][0], np.float64)
    want = 1 / (1 + np.exp(-np.asarray(x, np.float64) @ weight))
    return cfg, np.asarray(experts), np.asarray(gates), np.asarray(scores), want, np.asarray(params["moe.mlp.router_bias"][0])


@pytest.mark.parametrize("renormalised", [True, False])
def test_biased_choice_unbiased_weights(renormalised):
    cfg, experts, gates, scores, want, bias = routed(norm_topk_prob=renormalised)
    np.testing.assert_allclose(scores, want, rtol=1e-5)
    by_choice = np.argsort(-(want + bias), axis=-1)[:, :3]
    np.testing.assert_array_equal(np.sort(experts), np.sort(by_choice))
    assert np.any(np.sort(by_choice) != np.sort(np.argsort(-want, axis=-1)[:, :3])), "the bias decided nothing here"
    chosen = np.take_along_axis(want, experts, axis=-1)
    expected = chosen / chosen.sum(-1, keepdims=True) if renormalised else chosen
    np.testing.assert_allclose(gates, 1.5 * expected, rtol=1e-5)


def test_group_limit():
    """Experts come from the two groups of three whose best two biased scores add up to most."""
    cfg, experts, _, _, want, bias = routed(n_group=4, topk_group=2)
    choice = (want + bias).reshape(N, 4, 3)
    of_group = np.sort(choice, axis=-1)[..., -2:].sum(-1)
    kept = np.argsort(-of_group, axis=-1)[:, :2]
    masked = np.full_like(choice, -np.inf)
    for token in range(N):
        masked[token, kept[token]] = choice[token, kept[token]]
    np.testing.assert_array_equal(np.sort(experts), np.sort(np.argsort(-masked.reshape(N, 12), axis=-1)[:, :3]))
    assert np.any(np.sort(experts) != np.sort(np.argsort(-(want + bias), axis=-1)[:, :3])), "the limit changed nothing"


def test_bias_has_no_gradient():
    cfg = small()
    params = random_params(cfg, bias=0.2)
    tokens = np.arange(12).reshape(2, 6)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(bind(cfg, p)(tokens, call_for(tokens))[0] ** 2)))(params)
    assert not np.asarray(grads["moe.mlp.router_bias"]).any()
    assert np.asarray(grads["moe.mlp.router"]).any()


def test_counts_leave_padding_out():
    experts = np.array([[0, 1], [0, 2], [1, 2], [3, 0]])
    counts = router.expert_counts(jnp.asarray(experts), jnp.asarray([True, True, False, True]), 5)
    np.testing.assert_array_equal(counts, [3, 1, 1, 1, 0])


def test_sequence_balance_loss():
    """Per row: f_i = E / (K T) * #choices of i, P_i = mean of s_i / sum s, loss = sum f_i P_i; padding left out."""
    rng = np.random.default_rng(0)
    B, S, E, K = 2, 10, 6, 2
    scores = rng.uniform(0.1, 0.9, (B, S, E))
    experts = np.argsort(-scores, axis=-1)[..., :K]
    lengths, want, slope = [10, 7], 0.0, np.zeros((B, S, E))
    for b, T in enumerate(lengths):
        f = np.array([(experts[b, :T] == i).sum() for i in range(E)]) * E / (K * T)
        share = scores[b, :T] / scores[b, :T].sum(-1, keepdims=True)
        want += f @ share.mean(0)
        # d(sum_i f_i s_i / sum s) / ds_j = (f_j - sum_i f_i s_i / sum s) / sum s, and f has no gradient
        slope[b, :T] = (f - (share @ f)[:, None]) / scores[b, :T].sum(-1, keepdims=True) / T
    valid = jnp.arange(S) < jnp.asarray(lengths)[:, None]
    value, grad = jax.value_and_grad(lambda s: router.sequence_balance_loss(jnp.asarray(experts), s, valid))(
        jnp.asarray(scores, jnp.float32)
    )
    assert float(value) == pytest.approx(want, rel=1e-6)
    np.testing.assert_allclose(grad, slope, atol=1e-6)


def test_balance_loss_is_one_at_perfect_balance():
    experts = jnp.asarray([[[0, 1], [2, 3], [0, 1], [2, 3]]])
    assert float(router.sequence_balance_loss(experts, jnp.full((1, 4, 4), 0.5), jnp.ones((1, 4), bool))) == pytest.approx(1)


def test_one_pass_through_the_matrix_units_is_float32():
    """Logits of bfloat16 values, and both gradients, as near to float64 as float32 arithmetic comes."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (512, 256)).astype(jnp.bfloat16)
    weight = jax.random.normal(keys[1], (256, 16)).astype(jnp.bfloat16).astype(jnp.float32)
    g = jax.random.normal(keys[2], (512, 16))
    logits, pull = jax.vjp(router.exact_product, x, weight)
    dx, dw = pull(g)
    assert logits.dtype == dw.dtype == jnp.float32 and dx.dtype == jnp.bfloat16
    x64, w64, g64 = (np.asarray(a, np.float64) for a in (x, weight, g))
    for mine, want, tolerance in ((logits, x64 @ w64, 2e-6), (dw, x64.T @ g64, 2e-6), (dx, g64 @ w64.T, 2**-8)):
        assert np.abs(np.asarray(mine, np.float64) - want).max() <= tolerance * np.abs(want).max()
    np.testing.assert_array_equal(sum(part.astype(jnp.float32) for part in reversed(router.in_three(g))), g)


@pytest.mark.parametrize("served", [Serving(), SERVED], ids=["trained", "served"])
def test_accelerators_take_it(served, monkeypatch):
    """Where tokens and weights hold bfloat16, in training and when a checkpoint's weights are used as they are stored: the same
    experts as in float32. Nowhere else."""
    taken = []
    monkeypatch.setattr(router, "exact_product", lambda *a: taken.append(1) or exact_product(*a))
    cfg = small(n_routed_experts=12, num_experts_per_tok=3)
    params = random_params(cfg)
    if served is SERVED:
        params = {path: p.astype(jnp.bfloat16) for path, p in params.items()}
    layer = jax.tree.map(lambda x: x[0], bind(cfg, params).moe).feed_forward.router
    x = jax.random.normal(jax.random.key(1), (N, cfg.hidden_size)).astype(jnp.bfloat16)
    call = replace(call_for(np.zeros((1, N))), serving=served, dtype="bfloat16")
    experts = {platform: layer(x, replace(call, platform=platform))[0] for platform in ("cpu", "gpu")}
    np.testing.assert_array_equal(experts["cpu"], experts["gpu"])
    assert len(taken) == 1
    layer(x.astype(jnp.float32), replace(call, platform="gpu"))
    assert len(taken) == 1


@pytest.mark.parametrize("logit", [-30, -46, -60, -90])
def test_gradients_of_a_token_that_no_expert_wants(logit):
    """Against float64 with the released models' 1e-20; autodiff of a / b gives infinity from -46 on, and 0 / 0 from -88."""
    cfg = small(n_routed_experts=8, num_experts_per_tok=2)
    layer = bind(cfg, random_params(cfg)).moe.feed_forward.router
    weight = np.zeros((32, 8), np.float32)
    weight[0] = logit - 0.1 * np.arange(8)
    layer.weight, layer.bias = layer.weight.replace(jnp.asarray(weight)), layer.bias.replace(jnp.zeros(8))
    call, x = call_for(np.zeros((1, 2), int)), jnp.eye(2, 32)

    def gates(x):
        return jnp.sum(layer(x, call)[1] @ jnp.array([2.0, 1.0]))

    def balance(x, valid):
        experts, _, scores = layer(x, call)
        return router.sequence_balance_loss(experts[None], scores[None], jnp.asarray([valid]))

    def exact(at):
        scores = np.sort(1 / (1 + np.exp(-at * weight[0].astype(np.float64))))[::-1][:2]
        return cfg.routed_scaling_factor * (scores / (scores.sum() + 1e-20)) @ [2, 1]

    slope = (exact(1 + 1e-6) - exact(1 - 1e-6)) / 2e-6
    np.testing.assert_allclose(jax.grad(gates)(x)[0, 0], slope, rtol=1e-3, atol=1e-6)
    for valid in ([True, True], [False, True]):
        value, slope = jax.value_and_grad(balance)(x, valid)
        assert np.isfinite(value) and np.isfinite(slope).all()
