"""The held-out loss on meshes: as in training, every device works on its part, and nothing is left to a partitioner, which
knows nothing of kernels."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.presets import preset
from configs.schema import ConfigError, MeshConfig
from data.pipeline import open_data
from model.transformer import param_specs
from quant.served import Serving
from tests.scale.networks import MODEL, RUN, batch, mesh_of, on_mesh, weights, with_
from train.held_out import Evaluator, Setting, sums
from train.mesh import batch_sharding, make_mesh, param_shardings
from train.run_dir import RunDir
from train.session import open_session, open_to_look


def measured(microbatches: int, **axes: int) -> np.ndarray:
    cfg = on_mesh(RUN, **axes)
    mesh = mesh_of(cfg)
    params = jax.device_put(weights(cfg), param_shardings(param_specs(MODEL), mesh))
    rows = jax.device_put(batch(cfg), batch_sharding(mesh))
    setting = Setting(MODEL, Serving.of(MODEL, cfg.quant), "float32", "cpu", microbatches, mesh=mesh)
    return np.asarray(sums(params, rows, jnp.float32(1), setting))


@pytest.mark.parametrize(
    "microbatches, axes", [(1, {"fsdp": 2, "expert": 2, "context": 2}), (4, {"data": 2, "tensor": 2})], ids=str
)
def test_meshes_and_microbatches_change_nothing(microbatches, axes):
    np.testing.assert_allclose(measured(microbatches, **axes), measured(1), rtol=1e-6)  # sums of 300 float32 terms


@pytest.mark.parametrize("axes", [{"fsdp": 4}, {"fsdp": 2, "expert": 2}], ids=str)
def test_kernels_are_lowered_for_several_tpus(axes):
    cfg = preset("tiny")
    mesh, specs = make_mesh(MeshConfig(data=1, **axes), jax.devices()[:4]), param_specs(cfg.model)
    params = {
        path: jax.ShapeDtypeStruct(specs[path].shape, jnp.float32, sharding=place)
        for path, place in param_shardings(specs, mesh).items()
    }
    rows = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh))
        for name, x in batch(with_(RUN, "train", batch_size=24, seq_len=128)).items()
    }
    setting = Setting(cfg.model, Serving.of(cfg.model, cfg.quant), "bfloat16", "tpu", 1, mesh=mesh)
    text = sums.trace(params, rows, jnp.float32(1), setting).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in text, "there was no kernel to lower"


def test_a_run_is_looked_at_on_one_device(tmp_path):
    """A run of 64 devices, on a machine that has eight: one of them, in microbatches of the rows that each had."""
    run = RunDir(tmp_path)
    cfg = dataclasses.replace(with_(preset("tiny"), "train", batch_size=256, accumulate=2), mesh=MeshConfig(data=4, fsdp=16))
    run.write_config(cfg, {"compute_dtype": "float32"})
    with pytest.raises(ConfigError, match="64 places but there are 8 devices"):
        open_session(cfg)
    session = open_to_look(run)
    assert session.mesh.size == 1 and session.cfg == cfg
    assert Evaluator(session, open_data(cfg, session.tokenizer))._setting(Serving(), cfg.model).microbatches == 2 * 64
