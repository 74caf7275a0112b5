"""Splitting a stored array must equal storing its matrices apart."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optim_table import NOPE, ROPE, D, E, F, H, R, V, arrays, k2_table, matrix, spec

from configs.schema import OptimConfig
from optim.build import build_optimizer
from optim.matrices import MatrixLayout, is_expert
from optim.muon import matrix_scale
from optim.newton_schulz import coefficients, newton_schulz

CFG = OptimConfig(
    lr=1.0,
    warmup_steps=0,
    schedule="constant",
    qk_clip_tau=None,
    weight_decay=0.0,
    momentum=0.0,
    newton_schulz="polar_express",
    newton_schulz_steps=6,
)


def muon_only():
    return {path: s for path, s in k2_table().items() if s.update == "muon"}


@pytest.fixture(scope="module")
def fused():
    """One step of the whole table without momentum: each update is minus scale times the orthogonal factor."""
    specs = muon_only()
    grads = arrays(specs, 3)
    opt = build_optimizer(specs, CFG, 10)
    params = arrays(specs, 4)
    updates, _ = jax.jit(opt.update)(grads, opt.init(params), params)
    return specs, grads, updates


def separate(g, rows, cols):
    """The update of a matrix that is a parameter of its own."""
    out = newton_schulz(g[None], coefficients("polar_express", 6))[0]
    return -matrix_scale("match_rms", rows, cols) * out


CASES = {  # array: index of one matrix, its shape
    "q_b": [(np.s_[1, :, h], (24, NOPE + ROPE)) for h in (0, 3)],
    "kv_a": [(np.s_[2, :, :R], (D, R)), (np.s_[2, :, R:], (D, ROPE))],
    "kv_b": [(np.s_[0, :, 2, :NOPE], (R, NOPE)), (np.s_[0, :, 2, NOPE:], (R, V))],
    "gate_up": [(np.s_[1, 5, :, i], (D, F)) for i in (0, 1)],
    "down": [(np.s_[2, 7], (F, D))],
    "router": [(np.s_[0], (D, E))],
    "dense.q_b": [(np.s_[:, 1], (24, NOPE + ROPE))],
}


@pytest.mark.parametrize("path", CASES)
def test_split_equals_separate(fused, path):
    """Layers, experts, heads, gate and up, latent and rope key, K and V: each is a matrix of its own."""
    _, grads, updates = fused
    for index, shape in CASES[path]:
        assert grads[path][index].shape == shape
        np.testing.assert_allclose(updates[path][index], separate(grads[path][index], *shape), atol=2e-4)
        # polar_express amplifies float32 rounding by up to 1846 and batches differ in summation order


def test_o_is_one_matrix(fused):
    """Heads and value width of the output projection are the rows of one matrix."""
    _, grads, updates = fused
    out = separate(grads["o"][1].reshape(H * V, D), H * V, D)
    np.testing.assert_allclose(updates["o"][1].reshape(H * V, D), out, atol=2e-4)


def test_blocks_round_trip():
    """Cutting and assembling is the identity, bit for bit, for every kind of array."""
    for path, s in muon_only().items():
        for choice in (True, False):
            layout = MatrixLayout.of(s, choice)
            x = arrays({path: s}, 0)[path]
            blocks = layout.blocks(x)
            assert [(math.prod(b.shape[:-2]), *b.shape[-2:]) for b in blocks] == layout.matrices(s.shape)
            np.testing.assert_array_equal(layout.assemble(blocks, x.shape), x)


def test_split_by_choice():
    """optim.split_kv_a=False makes kv_a one matrix and leaves the mandatory split of kv_b alone."""
    specs = k2_table()
    assert len(MatrixLayout.of(specs["kv_a"], False).splits) == 1
    assert len(MatrixLayout.of(specs["kv_a"], True).splits) == 2
    assert len(MatrixLayout.of(specs["kv_b"], False).splits) == 2


def test_uneven_blocks():
    """Grouped-query attention: fused [Q, K, V] columns of unequal size, over a heads axis that is not a batch axis."""
    s = spec((32, 48), "embed qkv", matrix=matrix("embed", "qkv", (32, 8, 8)))
    grads = arrays({"qkv": s}, 0)
    opt = build_optimizer({"qkv": s}, CFG, 10)
    updates, _ = opt.update(grads, opt.init(grads), grads)
    for a, b in ((0, 32), (32, 40), (40, 48)):
        np.testing.assert_allclose(updates["qkv"][:, a:b], separate(grads["qkv"][:, a:b], 32, b - a), atol=2e-4)


def test_interleaved_columns():
    """Gate and up alternating along the columns: an axis behind the columns is a batch axis like any other."""
    s = spec((D, F, 2), "embed hidden gate_up", matrix=matrix("embed", "hidden"))
    grads = arrays({"w": s}, 0)
    opt = build_optimizer({"w": s}, CFG, 10)
    updates, _ = opt.update(grads, opt.init(grads), grads)
    for i in range(2):
        np.testing.assert_allclose(updates["w"][..., i], separate(grads["w"][..., i], D, F), atol=2e-4)


def test_scale_uses_the_logical_shape(fused):
    """A full-rank update under match_rms has RMS 0.2 whatever the stored shape is."""
    specs, _, updates = fused
    for path in specs:
        for block in MatrixLayout.of(specs[path]).blocks(updates[path]):
            rms = jnp.sqrt(jnp.mean(block**2, axis=(-2, -1)))
            # six steps of polar_express end within 0.5 % of 1, but a square Gaussian has one value far below 1e-3
            np.testing.assert_allclose(rms, 0.2, rtol=0.02)


def test_scales():
    assert matrix_scale("match_rms", 2048, 7168) == pytest.approx(0.2 * math.sqrt(7168))
    assert matrix_scale("keller", 64, 256) == 2 and matrix_scale("keller", 256, 64) == 1
    assert matrix_scale("unit_rms", 64, 256) == 2 and matrix_scale("unit_rms", 256, 64) == 0.5


def test_heads_with_unequal_gradients_get_equal_updates():
    """The reason for per-head matrices: fused, the heads' updates spread as their gradients do."""
    s = k2_table()["dense.q_b"]
    grads = {"q": arrays({"q": s}, 0)["q"] * jnp.asarray([0.01, 0.1, 1.0, 10.0])[None, :, None]}
    opt = build_optimizer({"q": s}, CFG, 10)
    updates, _ = opt.update(grads, opt.init(grads), grads)
    rms = jnp.sqrt(jnp.mean(updates["q"] ** 2, axis=(0, 2)))
    np.testing.assert_allclose(rms, 0.2, rtol=0.01)


def test_experts_are_told_from_the_router():
    specs = k2_table()
    assert [path for path, s in specs.items() if is_expert(s)] == ["gate_up", "down"]
