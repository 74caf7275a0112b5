"""The grid's kernel for GPUs, interpreted, against its definition. On a GPU: tests/gpu/test_kernels.py."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.presets import preset
from model.transformer import param_specs
from quant import grid, grid_gpu
from quant.served import Master, Serving, as_served


@pytest.mark.parametrize("levels", sorted(grid.LEVELS.values()))
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape, axis, group", [((3, 64, 2, 64), -3, 32), ((2, 96, 128), -2, 32), ((64, 64), -2, 16)])
def test_the_same_numbers(shape, axis, group, dtype, levels):
    """Also of groups of zeros, of very small and very large weights, and of those that lie in the middle of two codes."""
    w = jax.random.normal(jax.random.key(0), shape, jnp.float32)
    size = jnp.exp2(jnp.linspace(-110, 90, w.size // w.shape[-1])).reshape(*shape[:-1], 1)
    for masters in (w, w * size, w.at[..., 0].set(0), grid.on_grid(w, axis, group, levels) * 0.5):
        want = jax.jit(grid.on_grid, static_argnums=(1, 2, 3))(masters.astype(dtype), axis, group, levels)
        mine = grid_gpu.on_grid(masters.astype(dtype), axis, group, levels, interpret=True)
        assert mine.dtype == jnp.bfloat16
        np.testing.assert_array_equal(mine.astype(jnp.float32), want)


def test_a_layer_where_it_lies(monkeypatch):
    """Of stacked masters the kernel reads the layer that is meant, and nothing reads the part that the loop over layers cuts out:
    XLA need not make it. The gradient goes to that part, straight through."""
    monkeypatch.setattr(grid_gpu, "on_grid", partial(grid_gpu.on_grid, interpret=True))
    stack = jax.random.normal(jax.random.key(0), (3, 4, 64, 64), jnp.float32)
    spec = param_specs(preset("tiny").model)["moe.mlp.experts_down"]
    serving = Serving(grid="int4")

    def served(part, stack, layer):
        return as_served(Master(part, stack, layer), spec, serving, 1.0, "hopper")

    for layer in range(3):
        want = jax.jit(grid.on_grid, static_argnums=(1, 2))(stack[layer], -2, 32)
        mine, pull = jax.vjp(lambda part: served(part, stack, jnp.int32(layer)), jnp.full_like(stack[0], jnp.nan))  # noqa: B023
        np.testing.assert_array_equal(mine, want)
        np.testing.assert_array_equal(pull(stack[0])[0], stack[0])


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1])
def test_what_is_no_number_spoils_its_group(bits):
    """Of one weight or of all, and no other group: the loss is none either then, and the step is skipped."""
    nan = jax.lax.bitcast_convert_type(jnp.int32(bits), jnp.float32)
    w = jax.random.normal(jax.random.key(0), (96, 64)).at[5, 3].set(nan).at[32:64, 7].set(nan)
    mine = np.asarray(grid_gpu.on_grid(w, -2, 32, interpret=True), np.float32)
    np.testing.assert_array_equal(mine, jax.jit(grid.on_grid, static_argnums=(1, 2))(w, -2, 32))
    assert np.isnan(mine).sum() == 64


def test_the_largest_is_found_among_bits():
    """The interpreter's maximum of floats is no number if one of them is none; Triton's passes such a one over."""
    (call,) = jax.make_jaxpr(lambda w: grid_gpu.on_grid(w, -2, 32))(jnp.ones((32, 64))).jaxpr.eqns[1:2]
    compared = [eqn.invars[0].aval.dtype for eqn in call.params["jaxpr"].eqns if eqn.primitive.name == "reduce_max"]
    assert compared == [jnp.int32]


def test_what_it_takes():
    """Groups that are powers of two and no larger than usual, in front of whole tiles of columns."""
    assert grid_gpu.takes((8, 2048, 2, 512), -3, 32) and grid_gpu.takes((1408, 2048), -2, 32)
    assert not grid_gpu.takes((8, 96, 64), -2, 24)
    assert not grid_gpu.takes((32, 33, 64), -2, 32)
    assert not grid_gpu.takes((8, 64, 96), -2, 32)
    assert not grid_gpu.takes((64, 64), -1, 32)
    assert not grid_gpu.takes((128, 64), -2, 64)
