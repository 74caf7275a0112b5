"""What a run starts from: here, that its first step waits for no compiler."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import jax
import pytest

from configs.schema import MeshConfig, QuantConfig
from data.pipeline import open_data
from model.transformer import param_specs
from tests.train.conftest import small
from train import processes
from train.checkpoint import Checkpoints
from train.compat import compile_seconds, known_options, slowed_kernels
from train.loop import train
from train.machine import build
from train.mesh import batch_sharding, make_mesh
from train.program import step_program
from train.run_dir import RunDir
from train.session import open_session
from train.start import starting_state


def test_the_first_step_finds_its_program(tmp_path):
    """It is compiled beside the making of initial weights, and so is its report; the calls neither trace nor compile."""
    cfg = small()
    session = open_session(cfg)
    machine, sharding = build(session), batch_sharding(session.mesh)
    rows = processes.my_rows(sharding, cfg.train.batch_size, cfg.train.seq_len)
    batch = next(iter(open_data(cfg, session.tokenizer).iterate(0, rows)))
    batch = processes.place(batch, sharding, rows, cfg.train.batch_size)
    state, _ = starting_state(machine, Checkpoints(tmp_path / "checkpoints"), RunDir(tmp_path))
    compiling = compile_seconds()
    machine.grid_watch.before(state.params)
    state, _ = machine.train_step(0, state, batch)
    assert set(machine.grid_watch.report(state.params)) >= {"grid_error", "quant/flipped"}
    assert compiling() == 0


@pytest.mark.parametrize(
    "mesh, platform, settles_at",
    [(MeshConfig(data=8), "cpu", None), (MeshConfig(data=4, fsdp=2), "cpu", 5), (MeshConfig(data=8), "hopper", 5)],
)
def test_where_a_program_for_the_settled_grid_takes_over(mesh, platform, settles_at, monkeypatch):
    """Where experts are gathered packed or, but on a CPU, at least read once less; never without a grid."""
    monkeypatch.setattr("train.program.platform", lambda mesh: platform)
    for quant, step in ((QuantConfig(start_step=3, ramp_steps=2), settles_at), (QuantConfig(grid="none"), None)):
        cfg = replace(small(), mesh=mesh, quant=quant)
        assert step_program(cfg, param_specs(cfg.model), make_mesh(cfg.mesh), "float32").settles_at == step


def test_the_pause_for_another_program_is_explained(monkeypatch, capsys):
    class Jitted(SimpleNamespace):
        __call__ = lower = lambda self, *_: self.settled

    program = SimpleNamespace(settles_at=2, jitted=lambda settled, options: Jitted(settled=settled), optimizer=None, state=None)
    monkeypatch.setattr("train.machine.step_program", lambda *_: program)
    machine = build(open_session(small()))
    assert machine.settles_at == 2
    for called in (machine.train_step, lambda step, *_: machine.lower(step)):
        assert [called(step, None, None) for step in range(4)] == [False, False, True, True]
    assert capsys.readouterr().out.count("the grid is whole from step 3 on") == 1


@pytest.mark.parametrize(
    "platform, version, slow",
    [("hopper", (0, 12, 0), True), ("hopper", (0, 11, 2), False), ("gpu", (0, 12, 0), False), ("cpu", (0, 12, 0), False)],
)
def test_a_jax_that_slows_kernels_down_is_named(platform, version, slow, monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", version)
    assert ("cuda13" in slowed_kernels(platform)) == slow


def test_advice_is_printed_as_it_is_written(tmp_path, monkeypatch, capsys):
    """Square brackets are markup to the console, which would leave the extra's name out."""
    monkeypatch.setattr("train.loop.slowed_kernels", lambda platform: "pip install -e '.[cuda13]'")
    monkeypatch.setattr("train.loop.open_data", lambda *_: sys.exit())
    with pytest.raises(SystemExit):
        train(small(), RunDir(tmp_path / "run"))
    assert "'.[cuda13]'" in capsys.readouterr().out


def test_options_that_the_user_sets_are_theirs(monkeypatch):
    """XLA_FLAGS would otherwise lose to the options of the step."""
    options = {"xla_gpu_enable_triton_gemm": False, "xla_no_such_option": 1}
    assert known_options(options) == {"xla_gpu_enable_triton_gemm": False}
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true")
    assert known_options(options) == {}
