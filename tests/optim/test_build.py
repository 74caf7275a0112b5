"""The whole optimizer: routing, errors, clipping, the router bias, accumulation, precision, resume, metrics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optim_table import E, H, L, arrays, k2_table, mesh_of, shardings, statistics

from configs.schema import ConfigError, OptimConfig
from optim import routing
from optim.apply import apply_updates, stochastic_round
from optim.build import build_optimizer, check_state, state_shardings
from optim.metrics import gradient_metrics, update_metrics
from optim.routing import fingerprint, routing_table
from optim.transforms import global_norm
from tests.optim.rounding import every_bfloat16_stays, rounding_of_all_magnitudes

CFG = OptimConfig(warmup_steps=1, qk_clip_tau=2.0, newton_schulz_steps=3)


def small():
    """A part of the table that has every rule and compiles fast."""
    return {path: s for path, s in k2_table().items() if path in ("q_b", "down", "router_bias", "norm")}


def run(specs, cfg, grads, params=None, state=None):
    opt = build_optimizer(specs, cfg, 10)
    params = params or arrays(specs, 0, 0.02)
    state = state if state is not None else opt.init(params)
    return jax.jit(lambda g, s, p: opt.update(g, s, p, **statistics()))(grads, state, params)


def test_routing_table():
    rows = {r.path: r for r in routing_table(k2_table(), CFG)}
    assert rows["q_b"].matrices == ((12, 24, 12),) and rows["q_b"].rule == "muon"
    assert rows["kv_b"].matrices == ((12, 16, 8), (12, 16, 8))
    assert rows["gate_up"].matrices == ((48, 32, 16),) and rows["router"].matrices == ((3, 32, 8),)
    assert rows["o"].matrices == ((3, 32, 32),) and rows["dense.o"].matrices == ((1, 32, 32),)
    assert {p for p, r in rows.items() if r.rule == "adamw"} == {"norm", "embed"}
    assert rows["router_bias"].rule == "router_bias" and rows["norm"].matrices == ()
    assert rows["down"].cells() == ("down", "3x8x16x32", "24 x 16x32", "muon", "keller x3", "1.131")
    assert all(r.rule != "muon" for r in routing_table(k2_table(), OptimConfig(matrices="adamw")))


def test_wrong_use_fails_with_a_sentence():
    specs = small()
    with pytest.raises(ConfigError, match="not one parameter declares a matrix"):
        build_optimizer({"norm": specs["norm"]}, CFG, 10)
    with pytest.raises(ConfigError, match="defines exactly 5 steps"):
        build_optimizer(specs, OptimConfig(newton_schulz="quintic", newton_schulz_steps=4), 10)
    opt = build_optimizer(specs, CFG, 10)
    params = arrays(specs, 0)
    with pytest.raises(ConfigError, match=r"without spec \['stray'\]"):
        opt.init(params | {"stray": jnp.zeros(3)})
    state = opt.init(params)
    with pytest.raises(ConfigError, match=r"missing \['norm'\]"):
        opt.update({p: g for p, g in params.items() if p != "norm"}, state, params, **statistics())
    with pytest.raises(ConfigError, match="pass expert_counts"):
        opt.update(params, state, params, max_logits=jnp.zeros((L + 1, H)))
    with pytest.raises(ConfigError, match="pass them to update"):
        opt.update(params, state, params, expert_counts=jnp.zeros((L, E)))
    with pytest.raises(ConfigError, match="at least one step"):
        build_optimizer(specs, CFG, 0)


def test_state_of_another_routing_is_refused(monkeypatch):
    """Another rule, shape or layout version is refused; another learning rate, mesh or coefficient set is not."""
    specs = small()
    state = build_optimizer(specs, CFG, 10).init(arrays(specs, 0))
    check_state(state, specs, OptimConfig(lr=1.0, newton_schulz="quintic"))
    with pytest.raises(ConfigError, match="another layout version"):
        check_state(state, specs, OptimConfig(matrices="adamw"))
    assert fingerprint(specs, CFG) != fingerprint(k2_table(), CFG)
    monkeypatch.setattr(routing, "LAYOUT_VERSION", routing.LAYOUT_VERSION + 1)
    with pytest.raises(ConfigError, match="another layout version"):
        check_state(state, specs, CFG)


@pytest.mark.parametrize("rule", ["sign", "centred"])
def test_router_bias(rule):
    """Overloaded experts go down, underloaded up, by the rate; gradients play no part, and may be missing."""
    specs = small()
    cfg = OptimConfig(qk_clip_tau=2.0, router_bias_rule=rule, router_bias_rate=0.25, newton_schulz_steps=1)
    grads = arrays(specs, 1)
    del grads["router_bias"]
    updates, _ = run(specs, cfg, grads)
    counts = np.asarray(statistics()["expert_counts"], np.float64)
    sign = np.sign(counts.mean(-1, keepdims=True) - counts)
    expected = 0.25 * (sign - sign.mean(-1, keepdims=True) if rule == "centred" else sign)
    np.testing.assert_allclose(updates["router_bias"], expected, atol=1e-7)


def test_clipping():
    """adamw: only that group is scaled, to the limit. all: Muon's direction does not change with a common factor."""
    specs = small()
    grads = arrays(specs, 1, 100.0)
    off, adamw, both = (
        run(specs, OptimConfig(qk_clip_tau=2.0, clip_norm=n, clip=c, newton_schulz_steps=3), grads)
        for n, c in ((0.0, "adamw"), (1.0, "adamw"), (1.0, "all"))
    )
    assert float(global_norm({"m": adamw[1].adamw[0].mu["norm"]})) == pytest.approx(0.1, rel=1e-5)  # (1 - b1) * limit
    assert float(global_norm({"m": off[1].adamw[0].mu["norm"]})) > 50
    np.testing.assert_array_equal(adamw[0]["down"], off[0]["down"])
    np.testing.assert_allclose(both[0]["down"], off[0]["down"], atol=1e-8)


def test_weight_decay_uses_the_plain_rate():
    """The shape factor does not touch it, and a spec may decline it."""
    specs = small()
    grads = jax.tree.map(jnp.zeros_like, arrays(specs, 1))
    params = arrays(specs, 0)
    cfg = OptimConfig(lr=0.5, warmup_steps=0, schedule="constant", weight_decay=0.1, adam_lr_ratio=2.0, qk_clip_tau=None)
    updates, _ = run(specs, cfg, grads, params)
    np.testing.assert_allclose(updates["down"], -0.05 * params["down"], rtol=1e-6)
    np.testing.assert_allclose(updates["norm"], -0.10 * params["norm"], rtol=1e-6)


def test_an_expert_without_tokens_stays():
    """In the layer where no token reached it, whatever momentum it has; the others move as they would have, and it decays."""
    specs = small()
    cfg = OptimConfig(lr=0.5, warmup_steps=0, schedule="constant", weight_decay=0.1, qk_clip_tau=2.0, newton_schulz_steps=1)
    params, opt = arrays(specs, 0), build_optimizer(specs, cfg, 10)
    step = jax.jit(lambda s, counts: opt.update(arrays(specs, 1), s, params, **statistics() | {"expert_counts": counts}))
    counts = jnp.full((L, E), 7)
    _, state = step(opt.init(params), counts)
    busy, after_busy = step(state, counts)
    idle, after_idle = step(state, counts.at[1, 3].set(0))
    np.testing.assert_allclose(idle["down"][1, 3], -0.05 * params["down"][1, 3], rtol=1e-6)
    assert np.abs(busy["down"][1, 3] - idle["down"][1, 3]).max() > 0.01
    others = np.ones((L, E), bool)
    others[1, 3] = False
    np.testing.assert_array_equal(np.asarray(idle["down"])[others], np.asarray(busy["down"])[others])
    np.testing.assert_array_equal(idle["q_b"], busy["q_b"])
    jax.tree.map(np.testing.assert_array_equal, after_idle.muon, after_busy.muon)


def test_bfloat16_momentum():
    """Stored in half the bytes, used in float32: the step differs from the float32 one by rounding only."""
    specs = small()
    cfg = OptimConfig(qk_clip_tau=2.0, momentum_dtype="bfloat16", newton_schulz_steps=3)
    exact = OptimConfig(qk_clip_tau=2.0, newton_schulz_steps=3)
    first, state = run(specs, cfg, arrays(specs, 1))
    assert {m.dtype for m in state.muon[0].momentum.values()} == {jnp.dtype("bfloat16")}
    reference, reference_state = run(specs, exact, arrays(specs, 1))
    assert np.linalg.norm(first["down"] - reference["down"]) < 0.01 * np.linalg.norm(reference["down"])
    second, _ = run(specs, cfg, arrays(specs, 2), state=state)
    reference, _ = run(specs, exact, arrays(specs, 2), state=reference_state)
    assert np.linalg.norm(second["down"] - reference["down"]) < 0.01 * np.linalg.norm(reference["down"])


def test_stochastic_rounding():
    """Unbiased to the standard error, never further than the two neighbours, exact on bfloat16 values."""
    x = jnp.full((40000,), 1.0 + 0.3 * 2**-7, jnp.float32)
    out = stochastic_round(x, jax.random.key(0)).astype(jnp.float32)
    assert set(np.unique(out)) == {1.0, 1.0 + 2**-7}
    share = float(jnp.mean(out > 1))
    assert abs(share - 0.3) < 5 * np.sqrt(0.3 * 0.7 / x.size)
    exact = jax.random.normal(jax.random.key(1), (1000,)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(stochastic_round(exact.astype(jnp.float32), jax.random.key(2)), exact)
    odd = jnp.asarray([jnp.inf, -jnp.inf, jnp.nan, 0.0, -3.0])
    np.testing.assert_array_equal(stochastic_round(odd, jax.random.key(3)).astype(jnp.float32), odd)
    only_last_bits = jax.lax.bitcast_convert_type(jnp.asarray([0x7F800001, 0xFF800001, 0x7FFFFFFF], jnp.uint32), jnp.float32)
    assert jnp.isnan(stochastic_round(only_last_bits, jax.random.key(4))).all()


@pytest.mark.parametrize("run", [stochastic_round, jax.jit(stochastic_round)], ids=["eager", "compiled"])
def test_stochastic_rounding_of_all_magnitudes(run):
    rounding_of_all_magnitudes(run)
    every_bfloat16_stays(run)


def test_apply_updates():
    """float32: the plain sum. bfloat16: steps far below half a unit of rounding still add up."""
    params = {"a": jnp.ones((2000,), jnp.bfloat16), "b": jnp.ones((3,), jnp.float32)}
    updates = {"a": jnp.full((2000,), 1e-4), "b": jnp.full((3,), 1e-4)}
    with pytest.raises(ValueError, match="random key"):
        apply_updates(params, updates, None)
    for i in range(50):
        params = apply_updates(params, updates, jax.random.key(i))
    assert params["a"].dtype == jnp.bfloat16 and params["b"].dtype == jnp.float32
    assert abs(float(jnp.mean(params["a"].astype(jnp.float32))) - 1.005) < 5e-4  # nearest rounding would stay at 1
    np.testing.assert_allclose(params["b"], 1.005, rtol=1e-5)


def test_bfloat16_masters():
    """The update is float32 whatever the weights are kept in."""
    specs = small()
    params = {p: a.astype(jnp.bfloat16) for p, a in arrays(specs, 0, 0.02).items()}
    updates, _ = run(specs, CFG, arrays(specs, 1), params)
    assert {u.dtype for u in updates.values()} == {jnp.dtype("float32")}


def test_resume_on_another_mesh():
    """State written on one mesh continues on another, with another plan: the next step agrees to rounding, and on
    the same mesh bit for bit."""
    specs = {path: s for path, s in k2_table().items() if path in ("q_b", "kv_b", "gate_up", "norm")}
    stats = jax.device_get(statistics())
    params, first, second = (jax.device_get(arrays(specs, i, s)) for i, s in ((0, 0.02), (1, 1.0), (2, 1.0)))

    def update(mesh, grads, state):
        places = shardings(specs, mesh)
        opt = build_optimizer(specs, CFG, 10, mesh=mesh, shardings=places)
        with jax.set_mesh(mesh):
            state = jax.jit(opt.init)(params) if state is None else state
            state = jax.device_put(jax.device_get(state), state_shardings(state, mesh, places))
            args = jax.device_put(grads, places), state, jax.device_put(params, places)
            out = jax.jit(lambda g, s, p: opt.update(g, s, p, **stats))(*args)
        return jax.device_get(out)

    here, there = mesh_of(fsdp=8), mesh_of(data=2, expert=2, tensor=2)
    _, saved = update(here, first, None)
    check_state(saved, specs, CFG)
    same, again, moved = (update(mesh, second, saved)[0] for mesh in (here, here, there))
    for path in specs:
        np.testing.assert_array_equal(same[path], again[path])
        np.testing.assert_allclose(same[path], moved[path], rtol=0, atol=1e-8)  # updates are about 4e-5


def test_a_step_that_is_not_finite_updates_nothing():
    """NaN and infinite gradients and loads with finite=False: zero updates, and the state it had, bit by bit."""
    specs = small()
    opt, params = build_optimizer(specs, CFG, 10), arrays(specs, 0, 0.02)
    _, state = run(specs, CFG, arrays(specs, 1), params)
    bad = {path: g.at[0].set(jnp.nan).at[1].set(jnp.inf) for path, g in arrays(specs, 2).items()}
    updates, after = jax.jit(lambda g, s, p, ok: opt.update(g, s, p, finite=ok, **statistics()))(bad, state, params, False)
    assert not any(np.any(u) for u in updates.values())
    assert all(np.signbit(-0.0 + u).all() for u in updates.values()), "-0.0 + 0.0 is 0.0, another weight"
    jax.tree.map(np.testing.assert_array_equal, after, state)


def test_metrics():
    specs = small()
    grads = arrays(specs, 1)
    updates, state = run(specs, CFG, grads)
    got = jax.jit(lambda g, u, s: gradient_metrics(specs, CFG, g) | update_metrics(specs, CFG, u, s))(grads, updates, state)
    assert set(got) == {
        "grad_norm",
        *(f"{k}/{g}" for k in ("grad_norm", "update_rms") for g in ("experts", "matrices", "adamw")),
        "qk_clip/heads",
        "qk_clip/gamma",
    }
    assert float(got["grad_norm/adamw"]) == pytest.approx(np.linalg.norm(grads["norm"]), rel=1e-5)
    assert float(got["update_rms/experts"]) == pytest.approx(float(jnp.sqrt(jnp.mean(updates["down"] ** 2))), rel=1e-5)
    total = np.sqrt(sum(np.sum(np.square(g)) for path, g in grads.items() if path != "router_bias"))
    assert float(got["grad_norm"]) == pytest.approx(total, rel=1e-5)
    assert int(got["qk_clip/heads"]) == int(np.sum(statistics()["max_logits"][1:] > 2.0))
