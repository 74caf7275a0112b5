"""The step against what it must equal: accumulation, the mesh, rematerialisation, and the grid change nothing but cost."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.schema import MeshConfig
from data.pipeline import open_data
from data.tokenizer import load_tokenizer
from model.transformer import param_specs
from optim.schedules import learning_rate
from quant.served import grid_amount
from tests.train.conftest import small
from train.mesh import batch_sharding, make_mesh, param_sharding, param_shardings
from train.session import open_session
from train.state import initial_value
from train.step import StepConfig, gradients

RELATIVE = 2e-5
"""float32 sums in another order: 500 tokens, three layers."""


def measure(cfg, devices=None):
    """(loss, gradients, aux) of the first batch with weights that do not depend on the mesh."""
    specs = param_specs(cfg.model)
    mesh = make_mesh(cfg.mesh, devices)
    shardings = param_shardings(specs, mesh)
    keys = jax.random.split(jax.random.key(0), len(specs))
    params = {
        path: jax.device_put(initial_value(spec, keys[i], "float32"), shardings[path])
        for i, (path, spec) in enumerate(specs.items())
    }
    batch = jax.device_put(open_data(cfg, load_tokenizer("bytes")).batch(0), batch_sharding(mesh))
    step = StepConfig(cfg, "float32", "cpu", mesh)
    return jax.device_get(jax.jit(lambda p, b: gradients(p, b, jnp.float32(1), step))(params, batch))


@pytest.fixture(scope="module")
def single():
    return measure(small(), jax.devices()[:1])


def with_(cfg, section, **fields):
    return dataclasses.replace(cfg, **{section: dataclasses.replace(getattr(cfg, section), **fields)})


@pytest.mark.parametrize(
    "change",
    [
        lambda c: with_(c, "train", accumulate=4),
        lambda c: with_(c, "train", remat="layer"),
        lambda c: with_(c, "mesh", fsdp=2, expert=4),
    ],
    ids=["accumulate 4", "remat", "fsdp x expert"],
)
def test_cost_changes_numbers_do_not(single, change):
    cfg = change(small())
    devices = jax.devices() if cfg.mesh != MeshConfig() else jax.devices()[:1]
    loss, grads, aux = measure(cfg, devices)
    np.testing.assert_allclose(loss, single[0], rtol=RELATIVE)
    for path, grad in grads.items():
        scale = np.abs(single[1][path]).max()
        np.testing.assert_allclose(grad, single[1][path], atol=RELATIVE * scale + 1e-9, err_msg=path)
    np.testing.assert_array_equal(aux.moe.expert_counts, single[2].moe.expert_counts)
    np.testing.assert_allclose(aux.attention.max_logit, single[2].attention.max_logit, rtol=RELATIVE)


def test_sums_are_added_to_in_place():
    """Four microbatches need no second copy of the stacked gradients. With bfloat16 masters they give the gradients of float32
    sums up to what rounding each addition costs (up or down at random: at most 2**-7 of the sum so far, four times)."""
    from tests.scale.networks import FAST_COMPILE

    cfg = with_(small(remat="layer", balance_loss=1e-2, layers="scan"), "model", num_hidden_layers=9)
    specs = param_specs(cfg.model)
    keys = jax.random.split(jax.random.key(0), len(specs))
    params = {path: initial_value(spec, keys[i], "bfloat16") for i, (path, spec) in enumerate(specs.items())}
    batch = jax.device_put(open_data(cfg, load_tokenizer("bytes")).batch(0))

    def compiled(**optim):
        step = StepConfig(with_(with_(cfg, "train", accumulate=4), "optim", **optim), "float32", "cpu")
        masters = {path: p if p.dtype == jnp.float32 else p.astype(optim["master_dtype"]) for path, p in params.items()}
        program = jax.jit(lambda p, b, k: gradients(p, b, jnp.float32(1), step, k))
        program = program.lower(masters, batch, jax.random.key(1)).compile(compiler_options=FAST_COMPILE)
        return program.memory_analysis(), program(masters, batch, jax.random.key(1))

    memory, (loss, grads, aux) = compiled(master_dtype="bfloat16")
    exact_memory, (exact_loss, exact, exact_aux) = compiled(master_dtype="float32")
    np.testing.assert_allclose(loss, exact_loss, rtol=RELATIVE)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=RELATIVE), aux, exact_aux)
    for path, grad in grads.items():
        assert grad.dtype == params[path].dtype
        np.testing.assert_allclose(
            grad.astype(jnp.float32), exact[path], atol=2**-5 * np.abs(exact[path]).max() + 1e-9, err_msg=path
        )
    stacked = sum(spec.size for spec in specs.values() if "layers" in spec.axes)
    # Measured: 4.6 bytes an element (6.2 with jax 0.10) and 4.5, most of them activations. With the array that autodiff of a
    # scan returns it would be 8.0 (9.7) and 6.2. Up to jax 0.10 the CPU backend widens bfloat16 arrays that are written in parts.
    assert exact_memory.temp_size_in_bytes < 7 * stacked
    assert jax.__version_info__ < (0, 11) or memory.temp_size_in_bytes < 5.5 * stacked


def test_every_token_is_counted_in_every_layer(single):
    """And the largest logits are of every layer's heads; what microbatches make of both, `accumulate 4` above asks."""
    cfg = small()
    _, _, aux = single
    assert aux.attention.max_logit.shape == (cfg.model.num_hidden_layers, cfg.model.num_attention_heads)
    tokens = open_data(cfg, open_session(cfg).tokenizer).batch(0)["segments"] > 0
    np.testing.assert_array_equal(aux.moe.expert_counts.sum(-1), tokens.sum() * cfg.model.num_experts_per_tok)


def test_a_step_with_a_non_finite_gradient_changes_nothing():
    from train.machine import build
    from train.state import TrainState, initial_state

    session = open_session(small())
    machine = build(session)
    state = initial_state(session.cfg, session.specs, machine.optimizer, session.mesh)
    before = jax.device_get(state.params)
    batch = open_data(session.cfg, session.tokenizer).batch(0)
    batch["weights"] = np.where(batch["weights"] > 0, np.float32(np.inf), 0)
    for step in range(2):
        state, metrics = machine.train_step(step, state, jax.device_put(batch, batch_sharding(session.mesh)))
    assert isinstance(state, TrainState) and int(state.step) == int(metrics["skipped_steps"]) == 2
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(state.params))
    rate = learning_rate(session.cfg.optim, session.cfg.train.steps)
    assert float(metrics["lr"]) == float(rate(0)) != float(rate(1)), "the schedule waits for a step that updates"


@pytest.mark.parametrize("start, ramp, expected", [(0, 0, [1, 1, 1]), (2, 0, [0, 0, 1, 1]), (1, 3, [0, 0.25, 0.5, 0.75, 1, 1])])
def test_the_grid_switches_on_when_told(start, ramp, expected):
    quant = dataclasses.replace(small().quant, start_step=start, ramp_steps=ramp)
    np.testing.assert_array_equal([grid_amount(quant, jnp.int32(i)) for i in range(len(expected))], expected)
    assert grid_amount(dataclasses.replace(quant, grid="none"), jnp.int32(99)) == 0


def test_experts_take_both_axes_and_nothing_is_split_twice():
    specs = param_specs(small().model)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=4))
    assert param_sharding(specs["moe.mlp.experts_gate_up"], mesh).spec[1] == ("expert", "fsdp")
    for spec in specs.values():
        entries = [(e,) if isinstance(e, str) else e for e in param_sharding(spec, mesh).spec if e]
        used = [axis for entry in entries for axis in entry]
        assert len(used) == len(set(used))
