"""Every implementation of the divergence against float64, its gradients, and the memory of K2's vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.sharding import AXES
from model import cross_entropy, distillation
from model.shards import Shards
from model.transformer import bind
from tests.model.networks import call_for, random_params, small


def inputs(N, D, V):
    keys = jax.random.split(jax.random.key(N), 5)
    return (
        jax.random.normal(keys[0], (N, D)),
        jax.random.normal(keys[1], (D, V)),
        jax.random.normal(keys[2], (N, D)),
        jax.random.normal(keys[3], (D, V)),
        jax.random.uniform(keys[4], (N,)),
    )


def total(hidden, head, taught, teacher, weights, name):
    lse, lse_t, cross = distillation.IMPLEMENTATIONS[name](hidden, head, taught, teacher, 24)
    kl = cross - lse_t + lse
    return jnp.sum(weights * kl), kl


@pytest.mark.parametrize("name", distillation.IMPLEMENTATIONS)
@pytest.mark.parametrize("N, V", [(24, 32), (57, 75), (7, 20)])
def test_values_and_gradients(name, N, V, monkeypatch):
    """Whole tiles, ragged ends of tokens and vocabulary, less than a tile."""
    monkeypatch.setattr(cross_entropy, "TILE", 32)
    hidden, head, taught, teacher, weights = inputs(N, 16, V)
    run = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
    (_, kl), (dhidden, dhead) = run(hidden, head, taught, teacher, weights, name)

    def log_softmax(x, w):
        logits = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    z, y = log_softmax(hidden, head), log_softmax(taught, teacher)
    dlogits = (np.exp(z) - np.exp(y)) * np.asarray(weights, np.float64)[:, None]
    want = (np.exp(y) * (y - z)).sum(-1), dlogits @ np.asarray(head, np.float64).T, np.asarray(hidden, np.float64).T @ dlogits
    for mine, other in zip((kl, dhidden, dhead), want):
        np.testing.assert_allclose(mine, other, atol=3e-6 * np.abs(other).max())  # float32 sums of under 100 terms


@pytest.mark.parametrize("name", distillation.IMPLEMENTATIONS)
def test_a_student_that_is_the_teacher_learns_nothing(name, monkeypatch):
    """Nothing is left but the rounding of two equal softmaxes, 6e-8 of a probability, times up to 75 weights of size 1."""
    monkeypatch.setattr(cross_entropy, "TILE", 32)
    hidden, head, _, _, weights = inputs(57, 16, 75)
    (_, kl), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(hidden, head, hidden, head, weights, name)
    assert np.abs(np.asarray(kl)).max() < 2e-6
    assert max(np.abs(np.asarray(g)).max() for g in gradients) < 5e-6


@pytest.mark.parametrize("name", distillation.IMPLEMENTATIONS)
def test_a_common_offset_of_the_teacher_counts_little(name):
    """Added to all logits of the teacher it changes no probability, and a rounding of its size only where it is subtracted."""
    hidden, head, taught, teacher, weights = inputs(57, 16, 75)
    taught, teacher = taught.at[:, 0].set(1.0), 0.1 * teacher
    _, kl = total(hidden, 0.1 * head, taught, teacher, weights, name)
    _, shifted = total(hidden, 0.1 * head, taught, teacher.at[0].add(1000.0), weights, name)
    np.testing.assert_allclose(shifted, kl, atol=1e-3)  # half a unit in the last place of 1000 is 3e-5; 3e-2 if p do not add up


def test_a_common_offset_counts_little_in_parts_of_a_vocabulary():
    """Four devices know a quarter each: their probabilities add up to 1 however large the logits are."""
    cfg, sizes = small(vocab_size=512), tuple((axis, 4 if axis == "tensor" else 1) for axis in AXES)
    head, call = bind(cfg, random_params(cfg)).head, call_for(np.zeros((1, 57)), shards=Shards(sizes))
    hidden, mine, taught, teacher, _ = inputs(57, 32, 512)
    taught, teacher = taught.at[:, 0].set(1.0), 0.1 * teacher

    def in_parts(teacher):
        quarters = (jnp.stack(jnp.split(w, 4, axis=1)) for w in (0.1 * mine, teacher))

        def on_one(mine, theirs):
            return distillation.divergences(hidden[None], head.replace(mine), taught[None], head.replace(theirs), call)

        return jax.vmap(on_one, axis_name="tensor")(*quarters)[0]

    want = in_parts(teacher)
    lse, lse_t, cross = distillation.reference(hidden, 0.1 * mine, taught, teacher)
    np.testing.assert_allclose(want, cross - lse_t + lse, atol=3e-6)
    np.testing.assert_allclose(in_parts(teacher.at[0].add(1000.0)), want, atol=1e-3)  # as above


def test_memory_at_the_vocabulary_of_k2():
    """Divergence and gradients of 8,192 tokens and 163,840 entries: one array of logits would be 5.4 GB."""
    N, D, V = 8192, 64, 163840

    def loss(hidden, head, taught, teacher):
        lse, lse_t, cross = distillation.chunked(hidden, head, taught, teacher)
        return jnp.sum(cross - lse_t + lse)

    hidden, head = jax.ShapeDtypeStruct((N, D), jnp.float32), jax.ShapeDtypeStruct((D, V), jnp.float32)
    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(hidden, head, hidden, head).compile()
    assert f"[{N},{V}]" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < 100e6
