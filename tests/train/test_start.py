"""What a run starts from: here, that its first step waits for no compiler."""

import jax
import pytest

from data.pipeline import open_data
from tests.train.conftest import small
from train import processes
from train.checkpoint import Checkpoints
from train.compat import compile_seconds, known_options, slowed_kernels
from train.loop import build
from train.mesh import batch_sharding
from train.run_dir import RunDir
from train.session import open_session
from train.start import starting_state


def test_the_first_step_finds_its_program(tmp_path):
    """It is compiled beside the making of initial weights; the call neither traces nor compiles."""
    cfg = small()
    session = open_session(cfg)
    machine, sharding = build(session), batch_sharding(session.mesh)
    rows = processes.my_rows(sharding, cfg.train.batch_size, cfg.train.seq_len)
    batch = next(iter(open_data(cfg, session.tokenizer).iterate(0, rows)))
    batch = processes.place(batch, sharding, rows, cfg.train.batch_size)
    state, _ = starting_state(
        session, machine.optimizer, Checkpoints(tmp_path / "checkpoints"), RunDir(tmp_path), machine.compile_first
    )
    compiling = compile_seconds()
    machine.train_step(0, state, batch)
    assert compiling() == 0


@pytest.mark.parametrize(
    "platform, version, slow",
    [("hopper", (0, 12, 0), True), ("hopper", (0, 11, 2), False), ("gpu", (0, 12, 0), False), ("cpu", (0, 12, 0), False)],
)
def test_a_jax_that_slows_kernels_down_is_named(platform, version, slow, monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", version)
    assert ("cuda13" in slowed_kernels(platform)) == slow


def test_options_that_the_user_sets_are_theirs(monkeypatch):
    """XLA_FLAGS would otherwise lose to the options of the step."""
    options = {"xla_gpu_enable_triton_gemm": False, "xla_no_such_option": 1}
    assert known_options(options) == {"xla_gpu_enable_triton_gemm": False}
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true")
    assert known_options(options) == {}
