"""What a run starts from: here, that its first step waits for no compiler."""

from data.pipeline import open_data
from tests.train.conftest import small
from train import processes
from train.checkpoint import Checkpoints
from train.compat import compile_seconds
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
