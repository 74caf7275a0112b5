"""A training step as on a Hopper GPU, whose grid kernel, interpreted here, reads the experts' masters in their stacks."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quant import grid_gpu
from tests.model.networks import random_params
from tests.train.conftest import small
from train.step import StepConfig, gradients


@pytest.mark.filterwarnings("ignore:attention|gradients of experts:UserWarning")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_go_to_the_layer_that_was_read(accumulate, monkeypatch):
    """The same loss and gradients as from XLA's grid on each layer's part, with autodiff of the loop over layers and where layers
    add to sums in place. float32, which the other Hopper kernels leave to XLA."""
    cfg = small()
    model = dataclasses.replace(cfg.model, hidden_size=64, moe_intermediate_size=64, num_hidden_layers=3)
    sizes = dataclasses.replace(cfg.train, accumulate=accumulate, batch_size=4, seq_len=32, remat="names")
    cfg = dataclasses.replace(cfg, model=model, train=sizes)
    params, rng = random_params(model, std=0.2, bias=0.1), np.random.default_rng(0)
    batch = {name: rng.integers(0, 96, (4, 32)).astype(np.int32) for name in ("tokens", "targets")}
    batch |= {"positions": np.tile(np.arange(32, dtype=np.int32), (4, 1)), "segments": np.ones((4, 32), np.int32)}
    batch |= {"weights": np.ones((4, 32), np.float32)}
    read, run = set(), grid_gpu.on_grid

    def interpreted(w, *settings):
        read.add(w.shape)
        return run(w, *settings, interpret=True)

    monkeypatch.setattr(grid_gpu, "on_grid", interpreted)
    by_xla, by_kernel = (
        jax.jit(partial(gradients, cfg=StepConfig(cfg, "float32", platform, settled=True)))(params, batch, jnp.float32(1))
        for platform in ("gpu", "hopper")
    )
    assert read == {params[f"moe.mlp.experts_{name}"].shape for name in ("gate_up", "down")}
    np.testing.assert_allclose(by_kernel[0], by_xla[0], rtol=1e-6)
    for path, g in by_xla[1].items():
        # The sums of products are cut otherwise where programs differ: the last bits of float32.
        np.testing.assert_allclose(by_kernel[1][path], g, rtol=1e-5, atol=2e-6 * float(jnp.abs(g).max()), err_msg=path)
