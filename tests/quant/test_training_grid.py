"""The grid during training: coverage, whole groups per device, metrics, and forward == export under every transform."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs.presets import preset
from configs.schema import ConfigError, QuantConfig
from model.transformer import param_specs
from quant import grid
from quant.coverage import coverage, group_axis, require_whole_groups
from quant.error import _sums, grid_error
from quant.metrics import CodeHistory, code_flow, codes_of
from quant.served import Serving, as_served, grid_amount, settled_step
from tests.quant.small_model import INT4, MODEL, PLAIN, random_weights, specs_of

SPECS = specs_of(MODEL)
PARAMS = {path: jnp.asarray(w) for path, w in random_weights(SPECS).items()}
GATE_UP, DOWN = "moe.mlp.experts_gate_up", "moe.mlp.experts_down"
SERVING = Serving.of(MODEL, INT4)


def test_coverage_counts_routed_experts_only():
    report = coverage(SPECS, INT4)
    assert [row.path for row in report.on_grid] == [GATE_UP, DOWN]
    assert sum(row.groups for row in report.on_grid) * 32 == sum(PARAMS[p].size for p in (GATE_UP, DOWN))
    assert coverage(SPECS, PLAIN).on_grid == ()
    assert "of all weights are on the grid" in str(report)


def test_a_grid_that_reaches_nothing_is_an_error():
    with pytest.raises(ConfigError, match="no parameter"):
        coverage({path: spec for path, spec in SPECS.items() if not spec.on_grid}, INT4)
    with pytest.raises(ConfigError, match="does not divide"):
        coverage(SPECS, QuantConfig(group_size=48))


def sharding(*axes):
    mesh = jax.make_mesh((2, 4), ("fsdp", "expert"))
    return NamedSharding(mesh, PartitionSpec(*axes))


def test_groups_may_not_cross_devices():
    whole = {GATE_UP: sharding(None, "expert", "fsdp"), DOWN: sharding(None, "expert")}
    require_whole_groups(SPECS, whole, INT4)
    with pytest.raises(ConfigError, match=f"inputs of {DOWN} into 2 parts of 16"):
        require_whole_groups(SPECS, {**whole, DOWN: sharding(None, "expert", "fsdp")}, INT4)


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("path", [GATE_UP, DOWN])
def test_a_weight_that_is_no_number_is_seen(path, share):
    """In its whole group, on the grid and on the way there: were it served as zero, no loss would tell."""
    w = PARAMS[path]
    spoilt = w.at[(0,) * w.ndim].set(jnp.nan)
    seen = np.asarray(jax.jit(as_served, static_argnums=(1, 2))(spoilt, SPECS[path], SERVING, jnp.float32(share)))
    group = [0] * w.ndim
    group[group_axis(SPECS[path])] = slice(32)
    assert np.isnan(seen[tuple(group)]).all() and np.isnan(seen).sum() == 32


def exported_values(path):
    """What the exporter writes and a reader computes, in stored layout."""
    axis = group_axis(SPECS[path])
    return np.asarray(jax.jit(grid.on_grid, static_argnums=(1, 2))(PARAMS[path], axis, 32))


def forward(path, w):
    return as_served(w, SPECS[path], SERVING, jnp.float32(1))


@pytest.mark.parametrize("path", [GATE_UP, DOWN])
@pytest.mark.parametrize(
    "how", ["jit", "scan", "remat and gradient", "bf16 compute", "vmap over experts", "expert and fsdp shards"]
)
def test_forward_weights_are_the_exported_ones(path, how):
    """0 mismatches however the forward is compiled."""
    w = PARAMS[path]
    if how == "jit":
        got = jax.jit(lambda w: forward(path, w))(w)
    elif how == "scan":
        got = jax.jit(lambda w: jax.lax.scan(lambda c, layer: (c, forward(path, layer)), 0, w)[1])(w)
    elif how == "remat and gradient":
        # The loss is linear in the weights, so its gradient with respect to the probe is the forward value itself.
        use = jax.checkpoint(lambda w, probe: jnp.sum(forward(path, w) * probe))
        got = jax.jit(jax.grad(use, argnums=1))(w, jnp.ones_like(w))
    elif how == "bf16 compute":
        got = jax.jit(lambda w: forward(path, w).astype(jnp.bfloat16))(w).astype(jnp.float32)
    elif how == "vmap over experts":
        got = jax.jit(jax.vmap(jax.vmap(lambda w: forward(path, w))))(w)
    else:
        axes = (None, "expert", "fsdp") if path == GATE_UP else (None, "expert", None, "fsdp")
        got = jax.jit(lambda w: forward(path, w))(jax.device_put(w, sharding(*axes)))
    assert int((np.asarray(got) != exported_values(path)).sum()) == 0


def test_accumulated_gradients_reach_the_masters_unchanged():
    g = jnp.asarray(np.random.default_rng(1).normal(size=PARAMS[DOWN].shape), jnp.float32)

    @jax.jit
    def accumulated(w):
        micro = jax.grad(lambda w, part: jnp.sum(forward(DOWN, w) * part))
        return jax.lax.scan(lambda total, part: (total + micro(w, part), None), jnp.zeros_like(w), jnp.stack([g, g]))[0]

    np.testing.assert_array_equal(accumulated(PARAMS[DOWN]), g + g)


def test_the_ramp_is_plain_before_and_exact_after():
    quant = QuantConfig(start_step=2, ramp_steps=3)
    amounts = [float(grid_amount(quant, jnp.int32(step))) for step in range(7)]
    assert amounts == [0, 0, 0.25, 0.5, 0.75, 1, 1]
    for ramp in (40, 46, 54, 60):  # whose reciprocal, which a compiler multiplies with, is too small
        settled = QuantConfig(start_step=2, ramp_steps=ramp)
        assert float(jax.jit(partial(grid_amount, settled))(jnp.int32(settled_step(settled)))) == 1
    np.testing.assert_array_equal(as_served(PARAMS[DOWN], SPECS[DOWN], SERVING, jnp.float32(0)), grid.bf16_round(PARAMS[DOWN]))


def test_grid_error_by_hand():
    metrics = grid_error(PARAMS, SPECS, 32)
    w, q = (np.concatenate([np.ravel(f(p)) for p in (GATE_UP, DOWN)]) for f in (PARAMS.get, exported_values))
    # A sum over 40,000 float32 squares, in another order.
    assert float(metrics["grid_error"]) == pytest.approx(np.linalg.norm(w - q) / np.linalg.norm(w), rel=1e-5)
    assert 1 / 32 <= float(metrics["codes_at_edge"]) < 0.1


def test_a_trillion_weights_are_counted():
    """Counts beyond an int32, which one array of Moonlight's already has, are numbers that a float32 holds."""
    specs = param_specs(preset("kimi_k2").model)
    params = {path: jax.ShapeDtypeStruct(spec.shape, jnp.bfloat16) for path, spec in specs.items() if spec.on_grid}
    codes = {path: jax.ShapeDtypeStruct(x.shape, jnp.int8) for path, x in params.items()}
    measured = jax.eval_shape(lambda p: grid_error(p, specs, 32), params)
    _, moved = jax.eval_shape(lambda c, p: code_flow(CodeHistory(c, c), p, specs, 32), codes, params)
    assert {x.dtype for x in (measured | moved).values()} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.eval_shape(lambda w: _sums(w, -1, 32, 7), params[DOWN])} == {jnp.dtype("float32")}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_codes_do_not_depend_on_how_a_chip_divides(dtype):
    """Divisions up to four units in the last place off, on random weights and on exact middles of codes."""
    rng = np.random.default_rng(0)
    scale = np.asarray(grid.bf16_round(jnp.asarray(rng.uniform(1e-4, 1e-2, 200_000), jnp.float32)))
    middles = (rng.integers(-7, 7, 200_000) + 0.5) * scale
    for x in (rng.standard_normal(200_000) * 3 * scale, middles, np.nextafter(np.float32(middles), np.float32(9))):
        x = np.asarray(jnp.asarray(x, dtype).astype(jnp.float32))
        exact = np.rint(x.astype(np.float64) / scale)
        for off in range(-4, 5):
            quotient = (x / scale).view(np.int32) + np.int32(off) * (x != 0).astype(np.int32)
            np.testing.assert_array_equal(grid.nearest(x, scale, np.round(quotient.view(np.float32))), exact)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_jitted_codes_are_the_exact_ones(dtype):
    """Of half a million weights; without `grid.nearest` a dozen differ on a CPU with bf16 masters."""
    w = (0.02 * jax.random.normal(jax.random.key(0), (16, 256, 128))).astype(dtype)
    codes, scales = jax.jit(lambda w: grid.quantize(w, -2, 32))(w)
    x = np.asarray(w, np.float64).reshape(16, 8, 32, 128) / np.asarray(scales, np.float64)[:, :, None]
    np.testing.assert_array_equal(codes, np.clip(np.rint(x), -7, 7).reshape(w.shape))


def test_flips_and_oscillation():
    codes = codes_of(PARAMS, SPECS, 32)
    history = CodeHistory(codes, jax.tree.map(jnp.zeros_like, codes))
    history, metrics = code_flow(history, PARAMS, SPECS, 32)
    assert float(metrics["quant/flipped"]) == 0 == float(metrics["quant/oscillating"])
    moved = {**PARAMS, DOWN: PARAMS[DOWN].at[0, 0, 1, 0].add(0.03)}
    history, there = code_flow(history, moved, SPECS, 32)
    assert float(there["quant/flipped"]) > 0 == float(there["quant/oscillating"])
    _, back = code_flow(history, PARAMS, SPECS, 32)
    assert float(back["quant/oscillating"]) == float(there["quant/flipped"])


def test_widths_that_no_group_divides_are_one_sentence():
    """A run without a grid may have them; whatever then asks for its weights on the grid says why that cannot be."""
    with pytest.raises(ConfigError, match="136 inputs cannot be cut into groups of 32"):
        grid.quantize(jnp.ones((2, 136, 4)), -2, 32)
