"""One small run, trained once and shared by the tests of the loop, of resuming and of the verbs."""

import dataclasses
import os

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from configs.presets import preset
from configs.schema import ProfileConfig
from train.loop import train
from train.run_dir import RunDir


@pytest.fixture(scope="package", autouse=True)
def programs_on_disk(tmp_path_factory):
    """However many runs and test processes need a program, it is compiled once. Only in this folder: elsewhere tests ask
    compiled programs for what those from a cache do not know."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    jax.config.update("jax_compilation_cache_dir", str(shared / "xla"))
    compilation_cache.reset_cache()  # it may have been found unused
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


def small(**train_fields):
    """The tiny family at its smallest: seconds to compile, milliseconds a step. All eight simulated devices are used."""
    cfg = preset("tiny")
    # Under a constant rate the program does not depend on the number of steps.
    cfg = dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, schedule="constant"))
    model = dataclasses.replace(
        cfg.model,
        num_hidden_layers=3,
        hidden_size=64,
        moe_intermediate_size=32,
        q_lora_rank=32,
        intermediate_size=64,
        kv_lora_rank=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
    )
    fields = (
        dict(steps=20, batch_size=8, seq_len=64, log_every=4, checkpoint_every=5, eval_batches=1, compute_dtype="float32")
        | train_fields
    )
    return dataclasses.replace(
        cfg,
        model=model,
        data=dataclasses.replace(cfg.data, task_length=(2, 3)),
        quant=dataclasses.replace(cfg.quant, start_step=4),
        train=dataclasses.replace(cfg.train, **fields),
    )


@pytest.fixture(scope="package")
def trained(programs_on_disk, tmp_path_factory):
    """A finished run of 20 steps, two of them traced, which takes half a minute and so happens once."""
    run = RunDir(tmp_path_factory.mktemp("run") / "small")
    assert train(dataclasses.replace(small(), profile=ProfileConfig("3:4")), run) == 0
    return run
