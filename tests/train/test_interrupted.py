"""What comes from outside: signals while something is saved, a second trainer, a full disk, files that were damaged or lost."""

import errno
import fcntl
import json
import resource
import shutil
import signal

import jax
import numpy as np
import pytest

import launch
from configs.presets import preset
from configs.schema import ConfigError
from quant.export import written_whole
from tests.train.conftest import small
from train import loop, processes
from train.checkpoint import CheckpointError, Checkpoints
from train.loop import train
from train.run_dir import RunDir, config_hash
from train.stop import EXIT_DONE, EXIT_INTERRUPTED, EXIT_STOPPED, EXIT_USAGE
from train.stored import StoredParams


class Reached(BaseException):
    """A signal came to where it ends the program."""


@pytest.fixture
def deadly():
    """What the system does with SIGTERM, as an exception."""

    def end(*_):
        raise Reached

    before = signal.signal(signal.SIGTERM, end)
    yield end
    assert signal.getsignal(signal.SIGTERM) is end
    signal.signal(signal.SIGTERM, before)


def without_steps(monkeypatch, run_steps):
    """train() around a loop that does nothing but this."""
    monkeypatch.setattr(loop, "build", lambda session: loop.Machine(session, *[None] * 6))
    monkeypatch.setattr(loop, "starting_state", lambda *_: (None, 0))
    monkeypatch.setattr(loop, "run_steps", run_steps)


@pytest.mark.parametrize("failed", [False, True])
def test_the_last_save_is_waited_for_under_a_signal(tmp_path, monkeypatch, deadly, failed):
    """Whether all steps were done or one failed."""

    def run_steps(*_):
        if failed:
            raise RuntimeError("no memory for it")
        return None, 20

    waited = []

    def close(self):
        signal.raise_signal(signal.SIGTERM)
        waited.append(self)

    without_steps(monkeypatch, run_steps)
    monkeypatch.setattr(Checkpoints, "close", close)
    if failed:
        with pytest.raises(RuntimeError, match="no memory"):
            train(small(), RunDir(tmp_path / "run"))
    else:
        assert train(small(), RunDir(tmp_path / "run")) == EXIT_STOPPED
    assert len(waited) == 1


def test_a_step_may_be_damaged_more_than_once(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for count in range(3):
        for step in (7, 21):
            (tmp_path / str(step)).mkdir(exist_ok=True)
            (tmp_path / str(step) / "content").write_text(str(count))
        checkpoints.set_aside(newer_than=7)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["7", "damaged-21", "damaged-21-2", "damaged-21-3"]
    assert (tmp_path / "damaged-21-3" / "content").read_text() == "2"


def test_a_run_has_one_trainer(trained, tmp_path, monkeypatch, capsys):
    """At every place where one begins to write. The directory of a new run is made when all else was found right, and what was
    refused can be done once the other has ended."""
    run, again = RunDir(tmp_path / "run"), RunDir(tmp_path / "run")
    without_steps(monkeypatch, lambda *_: (None, 20))
    with processes.alone(run, new=True), pytest.raises(ConfigError, match="run is being trained by another process; wait"):
        train(small(), again)
    assert not again.exists()
    assert train(small(), again) == EXIT_DONE and again.exists()
    with processes.alone(run):
        for cfg in (small(), small(steps=30)):
            with pytest.raises(ConfigError, match="is being trained by another process"):
                train(cfg, again)
    with pytest.raises(ConfigError, match="is being trained by another process"), processes.alone(run, new=True):
        raise AssertionError("another one began it meanwhile")
    assert launch.main(["export", str(trained.path), "--out", str(tmp_path / "hf")]) == EXIT_DONE
    command = ["import", str(tmp_path / "hf"), "--run", str(tmp_path / "imported"), "--train.batch-size", "8"]
    with processes.alone(RunDir(tmp_path / "imported")):
        assert launch.main(command) == EXIT_USAGE
    assert "imported is being trained by another process" in capsys.readouterr().err
    assert launch.main(command) == EXIT_DONE


def test_all_processes_hear_of_another_trainer(tmp_path, monkeypatch):
    """Only the first one asks for the lock."""
    run = RunDir(tmp_path / "run")
    with processes.alone(run):
        monkeypatch.setattr(jax, "process_index", lambda: 1)
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(processes.multihost_utils, "process_allgather", lambda mine: np.array([0, mine]))
        with pytest.raises(ConfigError, match="another process"), processes.alone(run):
            pass
        monkeypatch.setattr(processes.multihost_utils, "process_allgather", lambda mine: np.array([1, mine]))
        with processes.alone(run):
            pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks(tmp_path, monkeypatch, number):
    def flock(*_):
        raise OSError(number, "said the file system")

    monkeypatch.setattr(fcntl, "flock", flock)
    if number == errno.EIO:
        with pytest.raises(OSError, match="said the file system"):
            RunDir(tmp_path).lock()
    else:
        RunDir(tmp_path).lock().close()


def test_checkpoints_without_their_config(trained, tmp_path):
    """Other settings would not be noticed, and other shapes look like damage."""
    run = RunDir(shutil.copytree(trained.path, tmp_path / "run"))
    (run.path / "config.json").unlink()
    before = sorted(run.path.rglob("*"))
    with pytest.raises(ConfigError, match="run holds checkpoints but no config.json; restore it, or name a new directory"):
        train(small(), run)
    assert sorted(run.path.rglob("*")) == before


def test_a_finished_run_is_left_as_it_is(trained, tmp_path, capsys):
    """Also by a command for fewer steps than it has."""
    run = RunDir(shutil.copytree(trained.path, tmp_path / "run"))
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    assert train(small(steps=5), run) == EXIT_DONE
    assert "already trained to step 20" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before


def test_a_flipped_bit_costs_one_line_of_metrics(tmp_path):
    """In every byte of a row but the digits, whose damage leaves a row."""
    run, row = RunDir(tmp_path), b'{"kind": "step", "step": 2, "loss": 1.5}'
    others = [json.dumps({"kind": "step", "step": step, "loss": 1.5}).encode() for step in (1, 3)]
    for at, byte in enumerate(row):
        for bit in range(8):
            damaged = row[:at] + bytes([byte ^ 1 << bit]) + row[at + 1 :]
            run.metrics.write_bytes(b"\n".join([others[0], damaged, others[1]]) + b"\n")
            steps = [r["step"] for r in run.read_metrics() if r["kind"] == "step" and r["step"]]
            assert len(steps) in (2, 3) and {1, 3} <= {*steps}
    run.metrics.write_bytes(b"\n".join([others[0], b"17", b"[1]", b"null", b'{"loss": 1}', b"\xff\xfe", others[1]]))
    assert [r["step"] for r in run.read_metrics()] == [1, 3]


@pytest.mark.parametrize("content", [b'{"config": \xe9}', b"{", b"[]", b'{"config": 3}', b'{"hash": "0"}', b"[" * 100_000])
def test_a_damaged_config_is_one_sentence(tmp_path, content, capsys):
    (tmp_path / "config.json").write_bytes(content)
    assert launch.main(["export", str(tmp_path)]) == EXIT_USAGE
    error = capsys.readouterr().err
    assert "config.json" in error and "restore it from a copy" in error and error.count("\n") == 1


@pytest.mark.parametrize("noticed", ["by the next save", "at the end"])
def test_a_full_disk_is_one_sentence(tmp_path, capfd, noticed):
    """Simulated by a limit on the size of a file, whose error goes the same way."""
    state = {"params": {"w": jax.random.normal(jax.random.key(0), (1 << 20,))}}
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(3, {"params": {"w": np.zeros(4, np.float32)}})
    checkpoints.close()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(CheckpointError) as error, checkpoints.writing():
            checkpoints.save(4, state)
            if noticed == "by the next save":
                checkpoints.save(5, state)
            checkpoints.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(error.value) == (
        f"{tmp_path}/checkpoints cannot be written (File too large); free some space and run the same "
        "command again: it goes on from step 3"
    )
    assert not capfd.readouterr().err
    again = Checkpoints(tmp_path / "checkpoints")
    again.save(4, state)
    again.close()
    assert again.steps() == [3, 4] and not list((tmp_path / "checkpoints").glob("*tmp*"))


def test_what_else_fails_in_a_step_stays_what_it_is(tmp_path):
    with pytest.raises(RuntimeError, match="a mistake"), Checkpoints(tmp_path).writing():
        raise RuntimeError("a mistake")
    with (
        pytest.raises(CheckpointError, match=r"\(No space left on device\); free some space and run the same command again$"),
        Checkpoints(tmp_path).writing(),
    ):
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_an_export_that_is_stopped_leaves_nothing(tmp_path, deadly, number):
    """Even where a second signal comes."""
    out, before = tmp_path / "export", signal.getsignal(signal.SIGINT)
    with (
        pytest.raises(KeyboardInterrupt, match=f"export was not written: the export was stopped by {number.name}$"),
        written_whole(out) as scratch,
    ):
        scratch.mkdir()
        (scratch / "file").write_text("large")
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(signal.SIGTERM)
    assert not list(tmp_path.iterdir()) and signal.getsignal(signal.SIGINT) is before


def test_an_export_appears_whole(tmp_path):
    """A directory with the usual rights, a file, or nothing after an error."""
    with written_whole(tmp_path / "new" / "directory") as scratch:
        scratch.mkdir()
        (scratch / "file").write_text("1")
        assert not (tmp_path / "new" / "directory").exists()
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "new" / "directory").stat().st_mode == (tmp_path / "usual").stat().st_mode
    with written_whole(tmp_path / "new" / "file") as scratch:
        scratch.write_text("2")
    with pytest.raises(RuntimeError), written_whole(tmp_path / "new" / "none") as scratch:
        scratch.write_text("3")
        raise RuntimeError
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["directory", "file"]
    assert (tmp_path / "new" / "file").read_text() == "2"


def test_a_stopped_export_is_one_sentence(trained, tmp_path, monkeypatch, deadly, capsys):
    read, asked = StoredParams.read, []

    def stopped(self, path, index):
        asked.append(path)
        if len(asked) == 9:
            signal.raise_signal(signal.SIGTERM)
        return read(self, path, index)

    monkeypatch.setattr("train.export._probe", lambda *_: None)  # it reads them too, and nothing is written then
    monkeypatch.setattr(StoredParams, "read", stopped)
    assert launch.main(["export", str(trained.path), "--out", str(tmp_path / "out")]) == EXIT_INTERRUPTED
    error = capsys.readouterr().err
    assert "out was not written: the export was stopped by SIGTERM" in error and error.count("\n") == 1
    assert len(asked) == 9 and not list(tmp_path.iterdir())


def test_settings_that_were_edited_in_the_file_are_refused(tmp_path):
    """An export takes the grid and the group size from there."""
    run = RunDir(tmp_path)
    run.write_config(preset("tiny"), {})
    assert run.load_config() == preset("tiny")
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"group_size": 32', '"group_size": 64'))
    with pytest.raises(ConfigError, match="damaged or edited.*restore it from a copy"):
        run.load_config()


def in_facts(run, **changes):
    file = run.path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("changes", [{"compute_dtype": "float32"}, {"devices": 2}, {"mixtures": []}, {"plan_hash": "b"}])
def test_facts_that_were_edited_in_the_file_are_refused(tmp_path, changes):
    """They decide how a run goes on as much as its settings do."""
    run = RunDir(tmp_path)
    run.write_config(preset("tiny"), {"compute_dtype": "bfloat16", "devices": 1, "plan_hash": "a", "mixtures": [(2, (1.0, 3.0))]})
    assert run.load_facts()["mixtures"] == [[2, [1.0, 3.0]]]
    in_facts(run, **changes)
    for read in (run.load_config, run.load_facts):
        with pytest.raises(ConfigError, match="damaged or edited.*restore it from a copy"):
            read()


@pytest.mark.parametrize(
    "changes",
    [
        {"mixtures": 5},
        {"mixtures": [[2, 1.0]]},
        {"mixtures": [[2.5, [1.0]]]},
        {"compute_dtype": "bflot16"},
        {"compute_dtype": ["float32"]},
        {"devices": "x"},
        {"devices": 0},
        {"devices": None},
    ],
)
def test_a_run_whose_hash_is_of_the_settings_only_opens(tmp_path, changes):
    """As it was written before the hash was of all facts; those of another type are no run's."""
    run = RunDir(tmp_path)
    run.write_config(preset("tiny"), {"compute_dtype": "bfloat16", "devices": 1, "mixtures": []})
    in_facts(run, hash=config_hash(preset("tiny")), devices=2)
    assert run.load_config() == preset("tiny") and run.load_facts()["devices"] == 2
    in_facts(run, **changes)
    with pytest.raises(ConfigError, match=rf"is not a run's config \({next(iter(changes))} is .*restore it from a copy"):
        run.load_facts()
