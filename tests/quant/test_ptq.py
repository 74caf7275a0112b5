"""Post-training baselines on a small expert block with skewed inputs, which the calibrated ones can use."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quant.awq import BlockPaths, awq_experts
from quant.calibration import ExpertInputs, GridSpec, calibrate, expert_matrices, restore_matrices
from quant.export import export_model
from quant.importer import Imported
from quant.ptq import gptq_experts, nearest
from quant.source import InMemory
from quant.verify import verify
from tests.quant.small_model import INT4, MODEL, random_weights, specs_of

SPECS = {path.replace("shared_", "shared."): spec for path, spec in specs_of(MODEL).items()}
PARAMS = {path: jnp.asarray(w) for path, w in random_weights(SPECS, scale=0.1).items()}
GATE_UP, DOWN = "moe.mlp.experts_gate_up", "moe.mlp.experts_down"


def batch(layer: int, seed: int) -> ExpertInputs:
    """512 tokens of 64 channels, of which a few are large and correlated, as behind a norm."""
    rng, world = np.random.default_rng(seed), np.random.default_rng(9)
    mix = world.normal(size=(64, 64)) * 0.2 + np.eye(64)
    x = (rng.normal(size=(512, 64)) @ mix * np.exp(world.normal(0, 1, 64))).astype(np.float32)
    experts = np.argsort(rng.normal(size=(512, 4)), axis=1)[:, :2]
    return ExpertInputs(layer, jnp.asarray(x), jnp.asarray(experts), jnp.full((512, 2), 0.5))


@pytest.fixture(scope="module")
def calibration():
    return calibrate([batch(layer, seed) for layer in (0, 1) for seed in (0, 1)], PARAMS[GATE_UP], GATE_UP, DOWN)


@pytest.fixture(scope="module")
def awq(calibration):
    paths = BlockPaths(GATE_UP, DOWN, "moe.post_norm", "moe.mlp.router", "moe.mlp.shared.gate_up")
    return awq_experts(PARAMS, SPECS, 32, calibration, paths=paths, codec="kimi7")


@partial(jax.jit, static_argnums=0)
def block_output(layer, gate_up, down, x, experts, gates):
    """Sum over chosen experts, in float32."""

    def one(e):
        gate = jnp.sum(jnp.where(experts == e, gates, 0), axis=-1)
        up = jnp.einsum("nd,dgf->gnf", x, gate_up[layer, e])
        return (jax.nn.silu(up[0]) * up[1] * gate[:, None]) @ down[layer, e]

    return sum(one(e) for e in range(4))


def error(arm):
    """Relative output error on tokens the calibration did not see; the norm before the block scales the channels."""
    b, fake = batch(1, 7), arm.fake(PARAMS, SPECS)
    norm = fake["moe.post_norm"][1] / PARAMS["moe.post_norm"][1]
    want = block_output(1, PARAMS[GATE_UP], PARAMS[DOWN], b.x, b.experts, b.gates)
    got = block_output(1, fake[GATE_UP], fake[DOWN], b.x * norm, b.experts, b.gates)
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


def test_expert_matrices_and_back():
    at = GridSpec.of(SPECS[GATE_UP])
    w = PARAMS[GATE_UP][0]
    np.testing.assert_array_equal(expert_matrices(w, at)[2, 5], w[2, :, 0, 5])
    np.testing.assert_array_equal(restore_matrices(expert_matrices(w, at), at), w)


def test_calibration_counts_tokens_and_moments(calibration):
    b = [batch(1, 0), batch(1, 1)]
    mine = np.concatenate([np.asarray(x.x)[(np.asarray(x.experts) == 3).any(-1)] for x in b])
    assert calibration.counts[1, 3] == len(mine)
    np.testing.assert_allclose(calibration.hessians[GATE_UP][1][3], mine.T @ mine, rtol=1e-4, atol=1e-2)


def test_calibrated_methods_beat_plain_rounding(calibration, awq):
    plain = error(nearest(PARAMS, SPECS, 32, "mse"))
    assert error(gptq_experts(PARAMS, SPECS, 32, calibration)) < 0.9 * plain
    assert error(awq) < 0.95 * error(nearest(PARAMS, SPECS, 32, "kimi7"))


def test_awq_folding_changes_nothing_by_itself(awq):
    """The norm's factor and the router's cancel, and undone weights differ from the masters by rounding only."""
    fake = awq.fake(PARAMS, SPECS)
    restored = fake["moe.post_norm"][:, :, None] / PARAMS["moe.post_norm"][:, :, None] * fake["moe.mlp.router"]
    np.testing.assert_allclose(restored, PARAMS["moe.mlp.router"], rtol=1e-5)
    for path, effective in awq.effective(SPECS).items():
        # A group's largest error is half a step of its largest weight over 7.5, times the spread of the scales.
        assert float(jnp.linalg.norm(effective - PARAMS[path]) / jnp.linalg.norm(PARAMS[path])) < 0.15


def test_rare_experts_fall_back_and_are_counted():
    """16 tokens cannot fill a Hessian of 64 inputs: rounding to nearest, said aloud."""
    few = [ExpertInputs(b.layer, b.x[:16], b.experts[:16], b.gates[:16]) for b in (batch(0, 0), batch(1, 0))]
    arm = gptq_experts(PARAMS, SPECS, 32, calibrate(few, PARAMS[GATE_UP], GATE_UP, DOWN))
    assert f"{GATE_UP}: 8 of 8 experts saw fewer" in " ".join(arm.notes)
    np.testing.assert_array_equal(arm.codes[GATE_UP], nearest(PARAMS, SPECS, 32, "mse").codes[GATE_UP])


def test_a_layer_without_tokens_is_an_error():
    with pytest.raises(ValueError, match=r"layers \[1\]"):
        calibrate([batch(0, 0)], PARAMS[GATE_UP], GATE_UP, DOWN)


@pytest.mark.parametrize("codec", ["ct75", "mse", "mse_signed", "hqq"])
def test_baselines_reach_the_same_file_format(tmp_path, codec):
    arm = nearest(PARAMS, SPECS, 32, codec)
    export_model(InMemory(arm.fake(PARAMS, SPECS)), SPECS, MODEL, INT4, tmp_path / codec, quantizer=arm.quantizer())
    report = verify(tmp_path / codec)
    assert report.ok and "change when quantised again" in str(report), str(report)
    source = Imported(tmp_path / codec, SPECS)
    for path in arm.codes:
        np.testing.assert_array_equal(source.region(path), arm.fake(PARAMS, SPECS)[path])
