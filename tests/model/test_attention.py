"""Every attention implementation against the naive form: outputs, gradients, maximum logits, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from model import attention
from model.transformer import bind, param_specs
from tests.model.networks import call_for, small

SCALE = 0.3
HERE = ("reference", "chunked")
"""Entries that run on any device. Those of chips that are not there have tests of their own, in Pallas' slow interpreters:
here and in tests/model/test_attention_gpu.py."""


def inputs(B, S, H=3, d=24, v=20, dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 4)
    q, k = (jax.random.normal(key, (B, S, H, d), dtype) for key in keys[:2])
    return q, k, jax.random.normal(keys[2], (B, S, H, v), dtype), jax.random.normal(keys[3], (B, S, H, v), dtype)


def packed(B, S, kind):
    """One document; several, different in each row, with padding at the end; or some rows all padding."""
    segments = np.ones((B, S), np.int32)
    if kind != "whole":
        rng = np.random.default_rng(5)
        for row in segments:
            cuts = np.sort(rng.choice(np.arange(1, S), 5, replace=False))
            row[:] = 1 + np.searchsorted(cuts, np.arange(S), side="right")
            row[rng.integers(S - 20, S) :] = 0
    if kind == "empty row":
        segments[0] = 0
    return jnp.asarray(segments)


def loss(q, k, v, g, segments, name):
    out, top = attention.IMPLEMENTATIONS[name](q, k, v, segments, jnp.arange(q.shape[1]), SCALE, 32)
    out = jnp.where((segments > 0)[..., None, None], out, 0)
    return jnp.sum(out.astype(jnp.float32) * g.astype(jnp.float32)), (out, top)


@pytest.mark.parametrize("name", HERE[1:])
@pytest.mark.parametrize(
    "S, kind, dtype, tolerance",
    [
        # Sums of at most 160 float32 terms in another order.
        (128, "whole", jnp.float32, 2e-6),
        (160, "packed", jnp.float32, 2e-6),
        (141, "packed", jnp.float32, 2e-6),
        (96, "empty row", jnp.float32, 2e-6),
        (20, "packed", jnp.float32, 2e-6),
        # Weights are rounded to bfloat16 before or after normalising: one rounding, 2**-8.
        (160, "packed", jnp.bfloat16, 1e-2),
    ],
)
def test_against_the_naive_form(name, S, kind, dtype, tolerance):
    segments = packed(2, S, kind if S > 20 else "whole")
    args = inputs(2, S, dtype=dtype)
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnames="name")
    (_, (out, top)), grads = run(*args, segments, name=name)
    (_, (want, want_top)), want_grads = run(*args, segments, name="reference")
    for mine, other in zip((out, top, *grads), (want, want_top, *want_grads), strict=True):
        mine, other = np.asarray(mine, np.float32), np.asarray(other, np.float32)
        assert np.abs(mine - other).max() <= tolerance * np.abs(other).max()


@pytest.mark.parametrize("name", HERE)
def test_documents_do_not_see_each_other(name):
    """A packed row gives every document the outputs it has alone."""
    q, k, v, _ = inputs(1, 96)
    segments = jnp.asarray([[1] * 40 + [2] * 50 + [0] * 6])
    out, top = attention.IMPLEMENTATIONS[name](q, k, v, segments, jnp.arange(96), SCALE, 16)
    tops = []
    for piece in (slice(0, 40), slice(40, 90)):
        length = piece.stop - piece.start
        alone, alone_top = attention.reference(
            q[:, piece], k[:, piece], v[:, piece], segments[:, piece], jnp.arange(length), SCALE
        )
        np.testing.assert_allclose(out[:, piece], alone, atol=2e-6)
        tops.append(alone_top)
    np.testing.assert_allclose(top, np.maximum(*tops), rtol=1e-6)


@pytest.mark.parametrize("name", HERE)
def test_maximum_logit_is_exact(name):
    """Found wherever it lies, also when another document's would be larger."""
    q, k, v, _ = inputs(2, 96)
    q, k = q.at[1, 77, 2].set(9.0), k.at[1, 50, 2].set(9.0).at[1, 3, 2].set(20.0)
    segments = jnp.asarray([[1] * 96, [1] * 30 + [2] * 66])
    logits = np.einsum("BSHd,BTHd->BHST", np.asarray(q, np.float64), np.asarray(k, np.float64)) * SCALE
    logits = np.where(np.asarray(attention.visible_BST(segments, jnp.arange(96)))[:, None], logits, -np.inf)
    top = attention.IMPLEMENTATIONS[name](q, k, v, segments, jnp.arange(96), SCALE, 32)[1]
    np.testing.assert_allclose(top, logits.max((0, 2, 3)), rtol=1e-6)
    assert int(np.argmax(top)) == 2


@pytest.mark.parametrize("name", HERE)
def test_maximum_of_logits_that_are_all_negative(name):
    """Queries that only fill the last tile have logits of zero, which nobody's are."""
    q = jnp.ones((1, 66, 2, 24))
    top = attention.IMPLEMENTATIONS[name](q, -q, q, jnp.ones((1, 66), jnp.int32), jnp.arange(66), SCALE, 32)[1]
    np.testing.assert_allclose(top, -24 * SCALE, rtol=1e-6)


@pytest.mark.parametrize("name", HERE)
def test_some_of_a_rows_queries(name):
    """Two chunks far apart, as a device of the context axis holds them, get what they get among all."""
    q, k, v, _ = inputs(2, 96)
    segments = packed(2, 96, "packed")
    want, _ = attention.reference(q, k, v, segments, jnp.arange(96), SCALE)
    at = np.r_[12:24, 72:84]
    out, top = attention.IMPLEMENTATIONS[name](q[:, at], k, v, segments, jnp.asarray(at), SCALE, 16)
    seen = np.asarray(segments[:, at] > 0)
    np.testing.assert_allclose(out[seen], want[:, at][seen], atol=2e-6)
    logits = jnp.where(
        attention.visible_BST(segments, jnp.asarray(at))[:, None], jnp.einsum("BSHd,BTHd->BHST", q[:, at], k) * SCALE, -jnp.inf
    )
    np.testing.assert_allclose(top, logits.max((0, 2, 3)), rtol=1e-6)


@pytest.mark.parametrize(
    "T, at",
    [(200, np.arange(200)), (200, np.r_[24:88, 136:200]), (384, np.r_[64:192, 192:256])],
    ids=["all", "two chunks of a device", "keys behind a device's queries"],
)
def test_tpu_kernels(T, at):
    """Some tiles of queries and keys, documents and padding across them: outputs, maxima and the three gradients. No block
    lies outside of its array, which the interpreter checks and a chip may not."""
    q, k, v, g = inputs(2, T, H=1)
    segments, q, g, at = packed(2, T, "packed"), q[:, at], g[:, at], jnp.asarray(at)

    def run(name):
        def total(q, k, v):
            out, top = attention.IMPLEMENTATIONS[name](q, k, v, segments, at, SCALE, 128)
            out = jnp.where((segments[:, at] > 0)[..., None, None], out, 0)
            return jnp.sum(out * g), (out, top)

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        mine = run("tpu")
    for one, other in zip(
        jax.tree.leaves(mine[0][1]) + list(mine[1]),
        jax.tree.leaves((want := run("reference"))[0][1]) + list(want[1]),
        strict=True,
    ):
        assert np.abs(np.asarray(one) - np.asarray(other)).max() <= 2e-6 * np.abs(np.asarray(other)).max()


@pytest.mark.parametrize("platform", attention.CHUNK)
def test_long_sequences_are_tiled(platform):
    own = {"hopper", "tpu"}
    assert attention.implementation(platform, 32768) == (platform if platform in own else "chunked")


def test_32k_context_fits():
    """Loss and gradients of a small model over 32,768 positions: the logits of one head alone would be 4.3 GB."""
    cfg, S = small(num_hidden_layers=2), 32768
    params = {path: jax.ShapeDtypeStruct(spec.shape, jnp.float32) for path, spec in param_specs(cfg).items()}
    tokens = jax.ShapeDtypeStruct((1, S), jnp.int32)
    call = jax.eval_shape(lambda: call_for(np.zeros((1, 8), np.int32), remat="layer"))
    call = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, S), x.dtype) if x.ndim else x, call)

    def total(params, tokens, call):
        return jnp.sum(bind(cfg, params)(tokens, call)[0])

    used = jax.jit(jax.grad(total)).lower(params, tokens, call).compile().memory_analysis()
    # 32 to 96 floats per position and activation: 4 to 12 MB each, a few dozen of them at the widest point.
    assert used.temp_size_in_bytes < 256e6
