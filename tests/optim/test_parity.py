"""Our rule against the published ones, over 20 steps in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optim_table import arrays, matrix, spec

from configs.schema import OptimConfig
from optim.adamw import scale_by_adam
from optim.build import build_optimizer

SPECS = {
    "tall": spec((48, 16), "in out", matrix=matrix("in", "out")),
    "square": spec((24, 24), "in out", matrix=matrix("in", "out")),
    "stack": spec((3, 16, 40), "layers in out", matrix=matrix("in", "out")),
}
LR, DECAY, STEPS = 0.02, 0.1, 20


def weights_after(update, init, params):
    """Weights after STEPS steps on fixed, slowly drifting gradients."""
    state, step = init(params), jax.jit(update)
    for i in range(STEPS):
        grads = jax.tree.map(lambda a, b: a + 0.3 * b, arrays(SPECS, 100), arrays(SPECS, i))
        updates, state = step(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return params


def ours(**changes):
    cfg = OptimConfig(
        lr=LR, weight_decay=DECAY, warmup_steps=0, schedule="constant", qk_clip_tau=None, matrix_scale="keller", **changes
    )
    opt = build_optimizer(SPECS, cfg, STEPS)
    return weights_after(lambda g, s, p: opt.update(g, s, p), opt.init, arrays(SPECS, 7))


def jordan(params):
    """K. Jordan's rule for a kernel stored as [in, out], in plain float64 numpy; the stack is a loop of singles."""

    def sign(g):
        x = g / (np.linalg.norm(g) + 1e-7)
        if g.shape[0] > g.shape[1]:
            x = x.T
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return (x.T if g.shape[0] > g.shape[1] else x) * max(1, g.shape[1] / g.shape[0]) ** 0.5

    w = {k: np.asarray(v, np.float64).reshape(-1, *v.shape[-2:]) for k, v in params.items()}
    buffers = {k: np.zeros_like(v) for k, v in w.items()}
    for i in range(STEPS):
        grads = jax.tree.map(lambda a, b: a + 0.3 * b, arrays(SPECS, 100), arrays(SPECS, i))
        for k in w:
            g = np.asarray(grads[k], np.float64).reshape(w[k].shape)
            buffers[k] += 0.05 * (g - buffers[k])
            ahead = g + 0.95 * (buffers[k] - g)
            w[k] = w[k] * (1 - LR * DECAY) - LR * np.stack([sign(x) for x in ahead])
    return {k: w[k].reshape(params[k].shape) for k in w}


def test_keller_jordan():
    mine, theirs = ours(), jordan(arrays(SPECS, 7))
    for path in SPECS:
        np.testing.assert_allclose(mine[path], theirs[path], atol=1e-5)  # float32 against float64


def optax_muon(nesterov):
    """optax.contrib.muon with the same matrices; its Nesterov sum carries a bias correction that torch has not."""
    last = {path: len(s.shape) - 1 for path, s in SPECS.items()}
    numbers = {path: optax.contrib.MuonDimensionNumbers(i - 1, i) for path, i in last.items()}
    opt = optax.contrib.muon(LR, weight_decay=DECAY, beta=0.95, nesterov=nesterov, eps=0.0, muon_weight_dimension_numbers=numbers)
    return weights_after(opt.update, opt.init, arrays(SPECS, 7))


def test_optax_without_nesterov():
    """The same rule: agreement to rounding."""
    mine, theirs = ours(nesterov=False), optax_muon(False)
    for path in SPECS:
        np.testing.assert_allclose(mine[path], theirs[path], atol=1e-5)


def test_optax_with_nesterov_differs_by_its_bias_correction():
    """optax divides the two terms of the sum by corrections of different exponents, so its first directions differ;
    with that same correction applied to ours the results agree again. Both halves are checked."""
    theirs, mine = optax_muon(True), ours(nesterov=True)
    assert max(float(jnp.max(jnp.abs(mine[p] - theirs[p]))) for p in SPECS) > 1e-4

    momentum = {p: jnp.zeros(s.shape) for p, s in SPECS.items()}
    weights = arrays(SPECS, 7)
    cfg = OptimConfig(
        lr=LR, weight_decay=DECAY, warmup_steps=0, schedule="constant", qk_clip_tau=None, matrix_scale="keller", momentum=0.0
    )
    opt = build_optimizer(SPECS, cfg, STEPS)
    state, update = opt.init(weights), jax.jit(lambda g, s, p: opt.update(g, s, p))
    for i in range(STEPS):
        grads = jax.tree.map(lambda a, b: a + 0.3 * b, arrays(SPECS, 100), arrays(SPECS, i))
        momentum = {p: 0.95 * momentum[p] + 0.05 * grads[p] for p in SPECS}
        ahead = {p: 0.95 * momentum[p] / (1 - 0.95 ** (i + 2)) + 0.05 * grads[p] / (1 - 0.95 ** (i + 1)) for p in SPECS}
        updates, state = update(ahead, state, weights)
        weights = jax.tree.map(jnp.add, weights, updates)
    for path in SPECS:
        np.testing.assert_allclose(weights[path], theirs[path], atol=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_formula(decay):
    """Against the textbook in float64."""
    cfg = OptimConfig(
        matrices="adamw", lr=LR, weight_decay=decay, warmup_steps=0, schedule="constant", qk_clip_tau=None, clip_norm=0.0
    )
    opt = build_optimizer(SPECS, cfg, STEPS)
    mine = weights_after(lambda g, s, p: opt.update(g, s, p), opt.init, arrays(SPECS, 7))
    w = {k: np.asarray(v, np.float64) for k, v in arrays(SPECS, 7).items()}
    m, v = ({k: np.zeros_like(x) for k, x in w.items()} for _ in range(2))
    for i in range(STEPS):
        grads = jax.tree.map(lambda a, b: a + 0.3 * b, arrays(SPECS, 100), arrays(SPECS, i))
        for k in w:
            g = np.asarray(grads[k], np.float64)
            m[k], v[k] = 0.9 * m[k] + 0.1 * g, 0.95 * v[k] + 0.05 * g * g
            step = m[k] / (1 - 0.9 ** (i + 1)) / (np.sqrt(v[k] / (1 - 0.95 ** (i + 1))) + 1e-8)
            w[k] = w[k] - LR * (step + decay * w[k])
    for path in SPECS:
        np.testing.assert_allclose(mine[path], w[path], atol=2e-6)  # float32 against float64 over 20 steps


def test_adam_has_no_nesterov():
    """The first step of Adam is the sign of the gradient; NAdam's is not."""
    t = scale_by_adam(0.9, 0.95, 0.0)
    g = {"w": jnp.asarray([3.0, -0.5])}
    out, _ = t.update(g, t.init(g), None, step=jnp.zeros((), jnp.int32))
    np.testing.assert_allclose(out["w"], [1.0, -1.0], rtol=1e-6)
