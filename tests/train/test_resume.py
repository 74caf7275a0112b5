"""Interrupting changes nothing; a wrong command loses nothing; damage is found and stepped over."""

import dataclasses
import json
import re
import shutil
import signal
import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from configs.schema import ConfigError, MeshConfig
from data.pipeline import PLAN_VERSION, open_data
from data.tokenizer import load_tokenizer
from optim.build import build_optimizer
from tests.train.conftest import small
from train import remix
from train.checkpoint import CheckpointError, Checkpoints, fingerprint
from train.held_out import Evaluator
from train.loop import train
from train.run_data import require_same_order
from train.run_dir import RunDir, differences
from train.session import load_params, open_session
from train.start import require_same_state
from train.state import abstract_state
from train.stop import EXIT_DONE, EXIT_STOPPED, StopSignal


def final_state(run: RunDir):
    cfg = run.load_config()
    session = open_session(cfg)
    optimizer = build_optimizer(session.specs, cfg.optim, cfg.train.steps)
    return Checkpoints(run.checkpoints).restore(abstract_state(cfg, session.specs, optimizer, session.mesh))


def losses(run: RunDir) -> dict[int, tuple[float, str]]:
    """Loss and rolling data hash of every step."""
    return {r["step"]: (r["loss"], r["data_hash"]) for r in run.read_metrics() if r["kind"] == "step"}


def test_resuming_is_bit_exact(trained, tmp_path, monkeypatch):
    """20 steps at once and 10 + resume + 10 end in the same bits: weights, momenta, counters, and every loss on the way."""
    run = RunDir(tmp_path / "run")
    seen = []
    real = Checkpoints.save

    def interrupt(self, step, state):
        seen.append(step)
        real(self, step, state)

    monkeypatch.setattr(Checkpoints, "save", interrupt)
    stop_at_ten(monkeypatch)
    assert train(small(), run) == EXIT_STOPPED
    assert seen[-1] == 10, "the step under way was finished and saved"
    monkeypatch.undo()
    assert train(small(), run) == 0
    whole, parts = final_state(trained), final_state(run)
    assert whole.step == parts.step == 20
    jax.tree.map(np.testing.assert_array_equal, whole.state, parts.state)
    assert losses(trained) == losses(run)


def stop_at_ten(monkeypatch):
    """A SIGTERM that arrives during step 10, through the real handler."""
    from train.recorder import Recorder

    real = Recorder.record

    def record(self, step, metrics):
        real(self, step, metrics)
        if step == 10:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Recorder, "record", record)


def test_signal_handlers_come_back():
    before = signal.getsignal(signal.SIGINT)
    with StopSignal() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert threading.current_thread() is threading.main_thread()


def test_an_incompatible_config_names_the_fields_and_leaves_the_run(trained):
    before = (trained.path / "config.json").read_bytes()
    cfg = small()
    cfg = dataclasses.replace(
        cfg, optim=dataclasses.replace(cfg.optim, lr=0.5), quant=dataclasses.replace(cfg.quant, start_step=2)
    )
    with pytest.raises(ConfigError, match=r"optim.lr: .* -> 0.5; quant.start_step: 4 -> 2"):
        train(cfg, trained)
    assert (trained.path / "config.json").read_bytes() == before


def test_what_a_run_was_begun_from_stays(trained, tmp_path):
    """Said once, it need not be said again, and something else is refused."""
    run, origin = RunDir(tmp_path / "run"), str(trained.path)
    assert train(small(steps=1, init_from=origin), run) == EXIT_DONE
    before = (run.path / "config.json").read_bytes()
    for other in ({"init_from": "elsewhere"}, {"init_from": f"{origin}@5"}, {"fork_from": f"{origin}@5"}):
        flag, value = next(iter(other.items()))
        with pytest.raises(ConfigError, match=f"own checkpoints, not from --train.{flag.replace('_', '-')} {value}; leave"):
            train(small(steps=2, **other), run)
    assert (run.path / "config.json").read_bytes() == before
    assert train(small(steps=2, init_from=origin), run) == EXIT_DONE
    assert train(small(steps=3), run) == EXIT_DONE
    assert run.load_config().train.init_from == origin and run.load_config().train.steps == 3


def test_a_damaged_checkpoint_is_stepped_over_and_kept(trained, tmp_path, capsys):
    """One flipped byte in the newest checkpoint: training goes on from the one before, and the damaged one stays."""
    run = RunDir(shutil.copytree(trained.path, tmp_path / "run"))
    newest, before = Checkpoints(run.checkpoints).steps()[:-3:-1]
    flip_a_byte(run.checkpoints / str(newest))
    assert train(small(), run) == 0
    printed = capsys.readouterr().out
    assert "damaged" in printed or "cannot be read" in printed
    assert f"from step {before}" in printed
    assert (run.checkpoints / f"damaged-{newest}").is_dir()
    jax.tree.map(np.testing.assert_array_equal, final_state(trained).state, final_state(run).state)


def flip_a_byte(directory):
    data = max((p for p in (directory / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 2] ^= 1
    data.write_bytes(raw)


def cut_files(directory):
    for file in (directory / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_no_sound_checkpoint_is_one_sentence(trained, tmp_path):
    run = RunDir(shutil.copytree(trained.path, tmp_path / "run"))
    for step in Checkpoints(run.checkpoints).steps():
        cut_files(run.checkpoints / str(step))
    with pytest.raises(CheckpointError, match="no sound checkpoint is left"):
        load_params(open_session(run.load_config()), run)


def test_a_damaged_checkpoint_that_was_named_names_the_others(trained, tmp_path):
    run = RunDir(shutil.copytree(trained.path, tmp_path / "run"))
    *others, last = Checkpoints(run.checkpoints).steps()
    cut_files(run.checkpoints / str(last))
    with pytest.raises(CheckpointError, match=re.escape(f"others are there: {others}")):
        load_params(open_session(run.load_config()), run, last)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8"])
def test_fingerprints_see_every_flipped_bit_and_every_swap(dtype):
    x = np.asarray(jax.random.randint(jax.random.key(0), (7, 5), 0, 200)).astype(dtype)
    right = int(fingerprint(jax.numpy.asarray(x)))
    flips = np.frombuffer(x.tobytes(), np.uint8)
    for bit in range(flips.size * 8):
        damaged = flips.copy()
        damaged[bit // 8] ^= 1 << bit % 8
        assert int(fingerprint(jax.numpy.asarray(damaged.view(x.dtype).reshape(x.shape)))) != right
    swapped = x.copy()
    swapped[0, 0], swapped[3, 2] = x[3, 2], x[0, 0]
    assert x[0, 0] == x[3, 2] or int(fingerprint(jax.numpy.asarray(swapped))) != right


def test_metrics_survive_a_line_cut_in_half(trained, tmp_path):
    run = RunDir(shutil.copytree(trained.path, tmp_path / "run"))
    text = run.metrics.read_text()
    run.metrics.write_text(text[: len(text) - 20])
    from train.metrics import MetricsFile

    file = MetricsFile(run.metrics)
    file.write("step", 99, {"loss": float("nan")})
    file.close()
    rows = run.read_metrics()
    assert rows[-1] == {"kind": "step", "step": 99, "loss": "nan"}
    assert all(json.dumps(r) for r in rows)


def mixed(tmp_path, **fields):
    paths = []
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(f"{name} says {name} " * 400)
        paths.append(str(tmp_path / f"{name}.txt"))
    cfg = small(**fields)
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, paths=tuple(paths), mixture=(1.0, 3.0)))


def test_a_mixture_is_edited_by_flag_only(tmp_path, capsys):
    """Steps before the edit keep their data; afterwards the same command goes on, and another edit is possible."""
    run, cfg = RunDir(tmp_path / "run"), mixed(tmp_path, steps=2, checkpoint_every=1)
    assert train(cfg, run) == EXIT_DONE
    before = [r["data_hash"] for r in run.read_metrics() if r["kind"] == "step"]
    edited = dataclasses.replace(
        mixed(tmp_path, steps=4, checkpoint_every=1), data=dataclasses.replace(cfg.data, mixture=(3.0, 1.0))
    )
    with pytest.raises(ConfigError, match="data.mixture: .*needs --remix"):
        train(edited, run)
    assert train(edited, run, remix=True) == EXIT_DONE
    assert "until step 2, (3.0, 1.0) from there on" in capsys.readouterr().out
    assert run.load_facts()["mixtures"] == [[2, [1.0, 3.0]]]
    hashes = [r["data_hash"] for r in run.read_metrics() if r["kind"] == "step"]
    assert hashes[:2] == before and len(hashes) == 4
    assert train(dataclasses.replace(edited, train=dataclasses.replace(edited.train, steps=5)), run) == EXIT_DONE
    whole = open_data(edited, load_tokenizer("bytes"), [(2, (1.0, 3.0))])
    assert run.load_facts()["plan_hash"] == whole.plan_hash, "tests/data/test_order.py says what such a plan holds"
    held_until = dataclasses.replace(edited.train, steps=5, fork_from=f"{run.path}@4")
    fork = RunDir(tmp_path / "fork")
    assert train(dataclasses.replace(edited, train=held_until), fork) == EXIT_DONE
    assert losses(fork) == {5: losses(run)[5]} and fork.load_facts()["mixtures"] == [[2, [1.0, 3.0]]]
    unmixed = dataclasses.replace(edited, data=dataclasses.replace(edited.data, mixture=()))
    with pytest.raises(ConfigError, match="keeps taking everything"):
        train(unmixed, run, remix=True)
    with pytest.raises(ConfigError, match="optim.lr"):
        train(dataclasses.replace(edited, optim=dataclasses.replace(edited.optim, lr=1.0)), run, remix=True)


@pytest.mark.parametrize(
    "table, step, expected",
    [
        ([], 2, [(2, "b")]),
        ([(2, "a")], 4, [(2, "a"), (4, "b")]),
        ([(30, "a")], 20, [(20, "a")]),  # 30 and what followed was lost, and b with it
        ([(20, "x"), (30, "a")], 20, [(20, "x")]),
        ([(10, "x"), (30, "a"), (40, "y")], 35, [(10, "x"), (30, "a"), (35, "y")]),
    ],
)
def test_another_mixture_behind_lost_steps(table, step, expected):
    """The run's present mixture is b, and another one takes over after a step."""
    assert remix.edited(table, "b", step) == expected


@pytest.mark.parametrize(
    "step, mixture, table",
    [
        (6, (1.0, 7.0), [(4, (1.0, 1.0))]),
        (4, (1.0, 7.0), [(4, (1.0, 1.0))]),
        (3, (1.0, 1.0), []),
        (3, (1.0, 7.0), [(3, (1.0, 1.0))]),
        (6, (2.0, 1.0), [(4, (1.0, 1.0)), (6, (1.0, 7.0))]),
        (6, (), []),
    ],
)
def test_a_fork_goes_on_in_the_order_of_its_origin(step, mixture, table):
    """Of a run that took sources one to one until step 4, then one to seven; not where it takes other rows at a time."""
    cfg = small()
    sources = dataclasses.replace(cfg.data, paths=("a.txt", "b.txt"))
    old, new = (dataclasses.replace(cfg, data=dataclasses.replace(sources, mixture=m)) for m in ((1.0, 7.0), mixture))
    facts = {"mixtures": [[4, [1.0, 1.0]]]}
    assert remix.forked(facts, old, new, step) == table
    assert remix.forked(facts, old, dataclasses.replace(new, train=dataclasses.replace(new.train, batch_size=32)), step) == []


def test_a_fork_with_nothing_to_do_is_refused(trained, tmp_path):
    cfg = trained.load_config()
    done = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, fork_from=str(trained.path)))
    with pytest.raises(ConfigError, match="nothing to do; raise --train.steps"):
        train(done, RunDir(tmp_path / "fork"))
    assert not (tmp_path / "fork").exists()


def test_a_checkpoint_under_another_name_is_none(trained, tmp_path, capsys):
    """A copy or a renamed one would go on with other rows than its state is at."""
    shutil.copytree(trained.path, tmp_path / "run")
    checkpoints = Checkpoints(RunDir(tmp_path / "run").checkpoints)
    newest = checkpoints.steps()[-1]
    (checkpoints.directory / str(newest)).rename(checkpoints.directory / str(newest + 1))
    cfg = trained.load_config()
    session = open_session(cfg)
    like = abstract_state(cfg, session.specs, build_optimizer(session.specs, cfg.optim, cfg.train.steps), session.mesh)
    restored = checkpoints.restore(like)
    assert restored.step < newest and f"holds step {newest}" in restored.damaged[0]


def test_a_run_is_found_by_any_path_to_it(trained):
    """TensorStore, which reads an export's weights from disk, takes no `..`."""
    detour = RunDir(trained.path / ".." / trained.path.name)
    shapes = {path: spec.shape for path, spec in open_session(trained.load_config()).specs.items()}
    assert Checkpoints(detour.checkpoints).stored(shapes).step == Checkpoints(trained.checkpoints).steps()[-1]


def test_weights_are_read_in_the_dtype_they_were_saved_in(trained):
    """A run in float32 is fine-tuned in bfloat16; a fork, which takes the whole state, is refused."""
    cfg = trained.load_config()
    half = dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, master_dtype="bfloat16"))
    single, double = (load_params(open_session(c), trained)[0] for c in (cfg, half))
    for path, w in double.items():
        np.testing.assert_array_equal(w, single[path].astype(w.dtype))
    assert {str(w.dtype) for w in double.values()} == {"bfloat16", "float32"}, "router biases stay float32"
    with pytest.raises(ConfigError, match="optim.master_dtype float32, not bfloat16.*--train.init-from"):
        require_same_state(trained, half)


def test_a_bucket_is_no_directory():
    with pytest.raises(ConfigError, match="mount the bucket"):
        RunDir("gs://bucket/run")


def test_how_a_run_is_computed_may_change():
    """A mesh with more devices needs fewer microbatches, and perhaps another transport."""
    cfg = small()
    other = dataclasses.replace(
        cfg,
        mesh=MeshConfig(data=1, fsdp=2),
        train=dataclasses.replace(cfg.train, accumulate=2, transport="all_to_all", layers="unroll", remat="layer"),
    )
    assert not differences(cfg, other)
    assert differences(cfg, dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, batch_size=16)))


def test_a_run_that_holds_nothing_out_ends_well(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a text that is learned by heart. " * 100)
    cfg = small(steps=2)
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, paths=(str(text),), validation_fraction=0.0))
    run = RunDir(tmp_path / "run")
    assert train(cfg, run) == EXIT_DONE
    assert (run.checkpoints / "2").is_dir() and not [r for r in run.read_metrics() if r["kind"] == "eval"]


def test_a_failing_evaluation_loses_no_step(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no memory for it")

    run = RunDir(tmp_path / "run")
    monkeypatch.setattr(Evaluator, "__call__", fail)
    with pytest.raises(RuntimeError, match="no memory for it"):
        train(small(steps=2), run)
    assert train(small(steps=2), run) == EXIT_DONE, "already trained"


def test_a_run_of_another_plan_version_is_refused(tmp_path):
    data, run = SimpleNamespace(plan_hash="abc"), RunDir(tmp_path)
    require_same_order(run, {}, data)
    require_same_order(run, {"plan_hash": "abc", "plan_version": PLAN_VERSION}, data)
    for facts in ({"plan_hash": "abc"}, {"plan_hash": "old", "plan_version": 1}):  # the first version wrote no number
        with pytest.raises(ConfigError, match=f"data plan 1; this program has plan {PLAN_VERSION}.*--train.init-from"):
            require_same_order(run, facts, data)
    with pytest.raises(ConfigError, match="has changed since it was started"):
        require_same_order(run, {"plan_hash": "old", "plan_version": PLAN_VERSION}, data)
