"""Learning from a teacher: the loss is its definition, and neither the mesh nor microbatches change it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.call import Call
from model.decode.served_params import SERVED
from model.transformer import bind, param_specs
from quant.served import Serving
from tests.scale.networks import FAST_COMPILE, RUN, batch, mesh_of, on_mesh, weights, with_
from tests.scale.test_invariance import SUMS
from train.mesh import batch_sharding, param_shardings
from train.step import StepConfig, gradients

SHARE = 0.7
PLAIN = with_(with_(RUN, "model", num_hidden_layers=2), "train", z_loss=0.0, balance_loss=0.0)
CFG = with_(PLAIN, "quant", distill_weight=SHARE)
TEACHER = {path: 1.2 * w for path, w in weights(CFG, bias=0.0).items()}


def measured(cfg, teacher=TEACHER, amount=1.0):
    """(mean nll, gradients, aux) of the batch on the config's mesh."""
    mesh = mesh_of(cfg)
    places = param_shardings(param_specs(cfg.model), mesh)
    step = StepConfig(cfg, "float32", "cpu", mesh)
    arguments = (
        jax.device_put(weights(cfg), places),
        jax.device_put(batch(cfg), batch_sharding(mesh)),
        jax.device_put(teacher, places),
    )
    run = jax.jit(lambda p, b, t: gradients(p, b, jnp.float32(amount), step, teacher=t))
    return jax.device_get(run.lower(*arguments).compile(compiler_options=FAST_COMPILE)(*arguments))


@pytest.fixture(scope="module")
def one():
    return measured(on_mesh(CFG))


def assert_same_gradients(mine, other, tolerance):
    for path, grad in other.items():
        np.testing.assert_allclose(mine[path], grad, rtol=0, atol=tolerance * np.abs(grad).max() + 1e-12, err_msg=path)


def test_the_loss_is_the_formula(one):
    """(1 - share) * cross-entropy + share * KL, from whole arrays of logits, by autodiff."""
    rows = batch(CFG)
    scale = rows["weights"] / rows["weights"].sum()

    def log_probabilities(params, serving):
        call = Call(jnp.asarray(rows["positions"]), jnp.asarray(rows["segments"]), jnp.float32(1), serving)
        network = bind(CFG.model, params)
        return jax.nn.log_softmax(network.logits(network(jnp.asarray(rows["tokens"]), call)[0], call))

    def loss(params):
        mine, theirs = log_probabilities(params, Serving.of(CFG.model, CFG.quant)), log_probabilities(TEACHER, SERVED)
        nll = -jnp.take_along_axis(mine, rows["targets"][..., None], -1)[..., 0]
        kl = jnp.sum(jnp.exp(theirs) * (theirs - mine), -1)
        sums = jnp.sum(scale * nll), jnp.sum(scale * kl)
        return (1 - SHARE) * sums[0] + SHARE * sums[1], sums

    (_, (nll, kl)), grads = (
        jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(weights(CFG)).compile(compiler_options=FAST_COMPILE)(weights(CFG))
    )
    np.testing.assert_allclose(one[0], nll, rtol=SUMS)
    np.testing.assert_allclose(one[2].teacher_kl / rows["weights"].sum(), kl, rtol=SUMS)
    assert kl > 0.01
    assert_same_gradients(one[1], grads, SUMS)


def test_meshes_and_microbatches_change_nothing(one):
    """Every way of cutting rows, positions, vocabulary, experts and weights at once, in four microbatches, recomputed."""
    cfg = with_(on_mesh(CFG, fsdp=2, expert=2, tensor=2), "train", accumulate=4, remat="names")
    other = measured(cfg)
    np.testing.assert_allclose(other[0], one[0], rtol=SUMS)
    np.testing.assert_allclose(other[2].teacher_kl, one[2].teacher_kl, rtol=SUMS)
    assert_same_gradients(other[1], one[1], SUMS)


def test_a_student_that_is_its_teacher_is_left_alone(one):
    """Without the grid and without cross-entropy, up to the rounding of two equal softmaxes."""
    cfg = with_(on_mesh(PLAIN), "quant", distill_weight=1.0)
    _, grads, aux = measured(cfg, weights(cfg), amount=0.0)
    assert abs(aux.teacher_kl) / batch(cfg)["weights"].sum() < 1e-6
    for path, grad in grads.items():
        assert np.abs(grad).max() <= 1e-5 * np.abs(one[1][path]).max(), path
