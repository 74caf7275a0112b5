"""What metrics.jsonl says of the time of a step."""

import time

import jax
import jax.numpy as jnp

from tests.train.conftest import small
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
