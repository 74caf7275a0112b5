"""What metrics.jsonl says of the time of a step."""

import json
import time
from contextlib import contextmanager
from dataclasses import replace

import jax
import jax.numpy as jnp

from eval.report import write_report
from tests.train.conftest import small
from train.checkpoint import Checkpoints
from train.compat import compile_seconds
from train.loop import train
from train.machine import build
from train.recorder import Recorder
from train.run_dir import RunDir
from train.session import open_session


def test_what_is_done_between_steps_is_the_time_of_neither(tmp_path, monkeypatch):
    """A device that takes 0.1 s a step beside the host; 0.3 s are spent on something else after the second."""
    run, session, ready = RunDir(tmp_path), open_session(small()), [time.perf_counter()]
    monkeypatch.setattr(jax, "block_until_ready", lambda loss: time.sleep(max(ready[int(loss)] - time.perf_counter(), 0)))
    recorder = Recorder(session, run, 1, time.monotonic(), lambda: 0.0)
    for step in range(1, 5):
        ready.append(max(ready[-1], time.perf_counter()) + 0.1)
        recorder.record(step, {"loss": jnp.float32(step), "data_print": 1, "tokens": 100, "expert_load": 0})
        if step == 2:
            with recorder.apart():
                time.sleep(0.3)
    recorder.close()
    seconds = [row["seconds"] for row in run.read_metrics()]
    assert len(seconds) == 4 and all(0.08 < s < 0.25 for s in seconds), seconds


def test_the_compiler_is_the_time_of_no_step(tmp_path, monkeypatch):
    """Neither where a run begins or goes on, nor where another program takes over; the steps then find their programs."""
    apart, steps = [], []

    class Watched(Recorder):
        @contextmanager
        def apart(self):
            apart.append(True)
            with super().apart():
                yield
            apart.pop()

    def watched(session):
        machine, compiling = build(session), compile_seconds()

        def lower(step):
            steps.append((step, bool(apart)))
            return machine.lower(step)

        def train_step(step, state, batch):
            before = compiling()
            result = machine.train_step(step, state, batch)
            assert compiling() == before, f"step {step} waited for the compiler"
            return result

        return replace(machine, lower=lower, settles_at=2, train_step=train_step)

    monkeypatch.setattr("train.loop.Recorder", Watched)
    monkeypatch.setattr("train.loop.build", watched)
    cfg = small(steps=3, log_every=100)
    for end in (1, 3):
        assert train(replace(cfg, train=replace(cfg.train, steps=end)), RunDir(tmp_path / "run")) == 0
    beside_the_making_of_weights = (0, False)
    assert steps == [beside_the_making_of_weights, (0, True), (1, True), (2, True)]


def test_the_printed_rate_is_of_all_steps_since_the_last_line(tmp_path, capsys):
    """The clock of a step that was started while the one before still ran is the host's, not the device's."""
    recorder = Recorder(open_session(small()), RunDir(tmp_path), 1, time.monotonic(), lambda: 0.0)
    row = dict(loss=1.0, tokens_per_second=9e9, load_max_over_mean=[1.0], max_logit=1.0, grid_error=0.0, skipped_steps=0)
    recorder.tokens, recorder.seconds = 300.0, 2.0
    recorder._print(3, row)
    recorder.close()
    assert "  150 tok/s" in capsys.readouterr().out and recorder.tokens == recorder.seconds == 0


def test_skipped_steps_are_named_when_there_are_more(tmp_path, capsys):
    recorder = Recorder(open_session(small()), RunDir(tmp_path), 1, time.monotonic(), lambda: 0.0)
    row = dict(loss=1.0, tokens_per_second=1.0, load_max_over_mean=[1.0], max_logit=1.0, grid_error=0.0)
    for step, skipped in enumerate((0, 2, 2, 3), start=1):
        recorder._print(step, row | {"skipped_steps": skipped})
    recorder.close()
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    assert [note[:17] for note in notes] == ["note: 2 step(s) o", "note: 3 step(s) o"]


def test_what_a_checkpoint_holds_is_on_record_before_it_is_saved(tmp_path, monkeypatch, capsys):
    """Whatever happens in the save. The run ends before its grid begins, and says so."""
    run, save, on_record = RunDir(tmp_path / "run"), Checkpoints.save, []

    def recorded_save(self, step, state):
        on_record.append((step, [row["step"] for row in run.read_metrics() if row["kind"] == "step"]))
        save(self, step, state)

    monkeypatch.setattr(Checkpoints, "save", recorded_save)
    assert train(small(steps=3, checkpoint_every=2), run) == 0
    assert on_record == [(2, [1, 2]), (3, [1, 2, 3])]
    assert "begins at step 4 and the run ends at 3; set --quant.start-step" in " ".join(capsys.readouterr().out.split())


def test_what_a_run_cannot_measure(tmp_path, capsys):
    """Without a grid every width is allowed; where no group divides it, there is no distance to report or to draw. Of a source
    of one document nothing is held out."""
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "one long text " * 200}))
    cfg = small(steps=2)
    cfg = replace(cfg, data=replace(cfg.data, paths=(str(tmp_path / "text.jsonl"),)))
    cfg = replace(cfg, model=replace(cfg.model, moe_intermediate_size=24), quant=replace(cfg.quant, grid="none"))
    assert train(cfg, RunDir(tmp_path / "run")) == 0
    rows = [row for row in RunDir(tmp_path / "run").read_metrics() if row["kind"] == "step"]
    assert "expert_load" in rows[-1] and "grid_error" not in rows[-1]
    said = capsys.readouterr().out
    assert "step     2/2" in said and "nothing is held out" in said
    assert write_report(tmp_path / "run") == 0 and not (tmp_path / "run/plots/grid.png").exists()
