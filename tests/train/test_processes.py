"""Real processes on this machine, joined by jax.distributed over loopback: the same run as one process.

Every run here is `launch.py train`, started as a person would start it.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from configs.schema import ConfigError, MeshConfig, QuantConfig
from model.transformer import param_specs
from quant.export import export_model
from quant.source import InMemory
from tests.train.conftest import small
from train import processes
from train.local import GRACE_SECONDS, parse
from train.run_dir import RunDir
from train.stop import EXIT_FAILED, EXIT_LOST, EXIT_STOPPED, EXIT_USAGE
from train.weights import load_weights

ROOT = Path(__file__).parents[2]
# A constant rate, because other schedules depend on the number of steps, and a real run's: at the tiny preset's 5e-3 the
# rounding of sums in another order grows to 1e-3 of the loss within 20 steps.
FIELDS = {
    "model.num_hidden_layers": 2,
    "model.hidden_size": 64,
    "model.moe_intermediate_size": 32,
    "model.q_lora_rank": 32,
    "model.intermediate_size": 64,
    "model.kv_lora_rank": 32,
    "model.n_routed_experts": 8,
    "train.batch_size": 8,
    "train.seq_len": 64,
    "train.log_every": 5,
    "train.checkpoint_every": 10,
    "train.compute_dtype": "float32",
    "quant.start_step": 4,
    "train.eval_batches": 1,
    "optim.schedule": "constant",
    "optim.lr": 2e-4,
}
SMALL = [*(f"{name}={value}" for name, value in FIELDS.items()), "--data.task-length", "2", "3"]


def start(run: Path, steps: int, *extra: str) -> subprocess.Popen:
    alone = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "launch.py", "train", "--run", str(run), "--train.steps", str(steps), *SMALL, *extra]
    return subprocess.Popen(
        command, cwd=ROOT, env=alone | {"JAX_PLATFORMS": "cpu"}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finished(process: subprocess.Popen, code: int = 0) -> str:
    out, _ = process.communicate(timeout=600)
    assert process.returncode == code, out[-3000:]
    return out


def rows(run: Path) -> dict[int, tuple[float, str]]:
    return {r["step"]: (r["loss"], r["data_hash"]) for r in RunDir(run).read_metrics() if r["kind"] == "step"}


def reach(process: subprocess.Popen, run: Path, step: int) -> list[int]:
    """Wait until a step is recorded; the process ids of the workers, first one first."""
    deadline = time.monotonic() + 300
    while not (run / "metrics.jsonl").exists() or len(rows(run)) < step:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0][-3000:]
        time.sleep(0.2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in children]


@pytest.mark.parametrize(
    "where, mesh, expected",
    [
        ("local:2", MeshConfig(data=4), (2, 2)),
        ("local:2x4", MeshConfig(data=0, fsdp=2), (2, 4)),
        ("local:2", MeshConfig(), (2, 1)),
        ("local:4", MeshConfig(data=1, fsdp=2, expert=4), (4, 2)),
    ],
)
def test_where(where, mesh, expected):
    assert parse(where, mesh) == expected


@pytest.mark.parametrize(
    "where, mesh, sentence",
    [
        ("remote:3", MeshConfig(), "write local"),
        ("local:2x4", MeshConfig(data=1, fsdp=4), "choose processes x devices = 4"),
        ("local:3", MeshConfig(data=4), "choose processes x devices = 4"),
        ("local:0", MeshConfig(), "write local"),
        ("local:2x0", MeshConfig(), "write local"),
    ],
)
def test_where_not(where, mesh, sentence):
    with pytest.raises(ConfigError, match=sentence):
        parse(where, mesh)


BY_DEVICE = jax.errors.JaxRuntimeError


@pytest.mark.parametrize(
    "error, code, sentence",
    [
        (BY_DEVICE("UNAVAILABLE: Gloo all-reduce failed: connection closed by peer"), EXIT_LOST, "process 0 of 2 lost another"),
        (ValueError("UNKNOWN: Gloo AllGather failed: connection reset"), EXIT_LOST, "process 0 of 2 lost another one"),
        (BY_DEVICE("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"), EXIT_FAILED, "failed: RESOURCE_EXHAUSTED"),
        (BY_DEVICE("INTERNAL: Mosaic failed to compile TPU kernel"), EXIT_FAILED, "process 0 of 2 failed: INTERNAL"),
        (ValueError("no such axis"), EXIT_FAILED, "process 0 of 2 failed: no such axis"),
        (NotADirectoryError(20, "Not a directory", "a.txt/run"), EXIT_USAGE, "error: [Errno 20] Not a directory: 'a.txt/run'"),
    ],
)
def test_own_failures_are_not_the_loss_of_another(monkeypatch, capsys, error, code, sentence):
    """Starting again mends the one and not the other; what launch.py says of a single process is said of several too."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as ended, processes.ending_together():
        raise error
    assert ended.value.code == code and sentence in capsys.readouterr().err


def test_hosts_that_differ_are_told(monkeypatch):
    monkeypatch.setattr(processes, "several", lambda: True)
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", lambda x: np.array([x, x, x + 1]))
    with pytest.raises(ConfigError, match="settings are not the same in process 2 as in the first one"):
        processes.require_same("settings", "hash", 3)
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", lambda x: np.array([1, 0]))
    with pytest.raises(ConfigError, match="process 1 does not see the directory"):
        processes.require_all(True, "see the directory")


@pytest.mark.slow
def test_two_processes_are_one_run(tmp_path):
    """20 steps in one process; 10 in two with a checkpoint written by both; 10 more in one, on another mesh. Losses differ
    by rounding only (float32 sums in another order), the data not at all, and the restored weights are the saved ones.
    Around step 26 a token whose two best experts are nearly equal goes another way: then losses differ by 2e-5."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    finished(start(whole, 20))
    out = finished(start(parts, 10, "--on", "local:2", "--mesh.data", "2"))
    assert "2 x cpu" in out and out.count("trained to step 10") == 1, "only the first process prints"
    out = finished(start(parts, 20, "--mesh.data", "1"))
    assert "resuming" in out and "from step 10 (fingerprints of all arrays agree)" in out
    one, two = rows(whole), rows(parts)
    assert [h for _, h in one.values()] == [h for _, h in two.values()]
    np.testing.assert_allclose([x for x, _ in two.values()], [x for x, _ in one.values()], rtol=1e-5)


@pytest.mark.slow
def test_a_checkpoint_moves_to_another_mesh(tmp_path):
    """Written by two processes split over fsdp, read by one with four devices split over experts: the next 20 losses are
    those of the processes that wrote it, had they gone on."""
    moved, stayed = tmp_path / "moved", tmp_path / "stayed"
    for run in (moved, stayed):
        finished(start(run, 10, "--on", "local:2", "--mesh.data", "1", "--mesh.fsdp", "2"))
    finished(start(stayed, 30, "--on", "local:2", "--mesh.data", "1", "--mesh.fsdp", "2"))
    finished(start(moved, 30, "--on", "local:1x4", "--mesh.data", "1", "--mesh.expert", "4"))
    one, two = rows(stayed), rows(moved)
    np.testing.assert_allclose([x for x, _ in two.values()], [x for x, _ in one.values()], rtol=1e-5)


@pytest.mark.slow
def test_damage_that_one_process_sees_sends_all_back(tmp_path):
    """What the second process wrote, and reads, of the newest checkpoint is cut off: both go on from the one before, at once."""
    run, on = tmp_path / "run", ["--on", "local:2", "--mesh.data", "1", "--mesh.fsdp", "2"]
    finished(start(run, 20, *on))
    hurt = [file for file in (run / "checkpoints/20/state/ocdbt.process_1/d").iterdir() if file.stat().st_size > 1000]
    for file in hurt:
        file.write_bytes(file.read_bytes()[:500])
    begun = time.monotonic()
    out = finished(start(run, 21, *on))
    assert hurt and "checkpoints/20 cannot be read (by process 1" in out and "from step 10 (fingerprints" in out
    assert time.monotonic() - begun < 120 and (run / "checkpoints" / "damaged-20").is_dir()


@pytest.mark.slow
def test_two_processes_import(tmp_path):
    """Each reads its part, and both write one checkpoint: the same weights as one process imports."""
    model = small().model
    specs = param_specs(model)
    rng = np.random.default_rng(0)
    arrays = {path: rng.standard_normal(spec.shape).astype(np.float32) for path, spec in specs.items()}
    export_model(InMemory(arrays), specs, model, QuantConfig(grid="none"), tmp_path / "hf")
    for name, extra in (("one", []), ("two", ["--on", "local:2", "--mesh.data", "1", "--mesh.fsdp", "2"])):
        command = [sys.executable, "launch.py", "import", str(tmp_path / "hf"), "--run", str(tmp_path / name), *extra]
        subprocess.run([*command, "--train.batch-size", "8"], cwd=ROOT, check=True)
    one, two = (load_weights(f"{tmp_path / name}:bf16", dtype="float32").params for name in ("one", "two"))
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_to_one_stops_both(tmp_path, number):
    """Both save the same step and end with 75; the same command goes on."""
    run = tmp_path / "run"
    process = start(run, 4000, "--on", "local:2", "--mesh.data", "2")
    os.kill(reach(process, run, 8)[1], number)
    out = finished(process, EXIT_STOPPED)
    (line,) = [x for x in out.splitlines() if "stopped by SIGTERM after step" in x]
    step = int(line.split("after step ")[1].split(",")[0])
    assert (run / "checkpoints" / str(step)).is_dir() and max(rows(run)) == step
    out = finished(start(run, step + 2, "--on", "local:2", "--mesh.data", "2"))
    assert f"from step {step} (fingerprints" in out


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_a_killed_process_ends_the_other(tmp_path, which):
    """Within seconds, with a sentence that names it; the newest checkpoint stays good."""
    run = tmp_path / "run"
    process = start(run, 4000, "--on", "local:2", "--mesh.data", "2")
    children = reach(process, run, 12)
    killed = time.monotonic()
    os.kill(children[which], signal.SIGKILL)
    out = finished(process, EXIT_LOST)
    assert time.monotonic() - killed < GRACE_SECONDS + 10
    assert f"process {which} of 2 was killed by SIGKILL" in out
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)
    assert json.loads((run / "config.json").read_text())["devices"] == 2
