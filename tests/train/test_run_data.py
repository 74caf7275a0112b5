"""What a run was trained on is what it is evaluated on."""

import dataclasses
import json

import pytest

import launch
from configs.schema import ConfigError
from data.pipeline import PLAN_VERSION, open_data
from data.tokenizer import load_tokenizer
from tests.quant.damage import first_tokens_swapped
from tests.train.conftest import small
from train.checkpoint import Checkpoints
from train.loop import train
from train.machine import build
from train.run_data import data_of
from train.run_dir import RunDir
from train.session import open_session, open_to_look
from train.start import kept_dtype, starting_state
from train.stop import EXIT_USAGE


@pytest.mark.parametrize("edit", [lambda text: "new" + text, lambda text: text + "new", lambda text: text[::-1]])
def test_changed_files_are_noticed(edit, tmp_path):
    """Also where only rows that are held out have changed."""
    text, run = tmp_path / "text.txt", RunDir(tmp_path / "run")
    text.write_text("".join(f"fox {i}, " for i in range(900)))
    cfg = small()
    session = open_session(dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, paths=(str(text),))))
    data = open_data(session.cfg, session.tokenizer)
    run.write_config(session.cfg, {"plan_hash": data.plan_hash, "plan_version": PLAN_VERSION})
    assert data_of(session, run).plan_hash == data.plan_hash
    run.write_config(session.cfg, {"plan_hash": "other", "plan_version": PLAN_VERSION - 1})
    with pytest.raises(ConfigError, match="with the program that trained it"):
        data_of(session, run)
    run.write_config(session.cfg, {"plan_hash": data.plan_hash, "plan_version": PLAN_VERSION})
    text.write_text(edit(text.read_text()))
    with pytest.raises(ConfigError, match="put its files back"):
        data_of(session, run)


@pytest.mark.parametrize(
    "asked, facts, kept", [("auto", {}, "bfloat16"), ("float32", {}, None), ("auto", {"compute_dtype": "float32"}, "float32")]
)
def test_a_fork_computes_as_the_run_it_shares_steps_with(asked, facts, kept, tmp_path):
    """Which dtype is faster is measured, and may come out otherwise the second time."""
    cfg, source = small(compute_dtype="auto"), RunDir(tmp_path / "source")
    source.write_config(cfg, {"compute_dtype": "bfloat16"})
    assert kept_dtype(small(compute_dtype=asked, fork_from=f"{source.path}@3"), facts) == kept
    assert kept_dtype(small(compute_dtype=asked), facts) == facts.get("compute_dtype")


def test_rows_longer_than_the_config_promises_stop_new_runs_only(tmp_path):
    """A run that was trained so before this was asked can still be evaluated and exported."""
    cfg = small()
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, max_position_embeddings=32))
    with pytest.raises(ConfigError, match="train.seq_len=64 is more than model.max_position_embeddings=32"):
        train(cfg, RunDir(tmp_path / "new"))
    run = RunDir(tmp_path / "old")
    run.write_config(cfg, {})
    assert open_to_look(run).cfg.train.seq_len == 64 and not (tmp_path / "new").exists()


def test_a_tokenizer_that_changed_after_training_is_noticed(trained, tmp_path, capsys):
    """By every verb that opens the run, and by a run that starts from it. One that does not know which it had is opened."""
    assert trained.load_facts()["tokenizer"] == load_tokenizer("bytes").fingerprint()
    load_tokenizer("bytes").save(tmp_path)
    file, run = tmp_path / "tokenizer.json", RunDir(tmp_path / "run")
    cfg = small()
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, tokenizer=str(file)))
    started = load_tokenizer(str(file)).fingerprint()
    run.write_config(cfg, {"tokenizer": started})
    run.checkpoints.mkdir()
    assert open_to_look(run).tokenizer.fingerprint() == started
    content = json.loads(file.read_text())
    first_tokens_swapped(content)
    file.write_text(json.dumps(content))
    for command in (
        ["export", str(run.path)],
        ["verify", str(tmp_path), "--run", str(run.path)],
        ["generate", "--weights", f"{run.path}:bf16"],
        ["eval", "--run", str(run.path)],
    ):
        assert launch.main(command) == EXIT_USAGE
        error = capsys.readouterr().err
        assert f"{file} has changed since {run.path} was started with it (fingerprint {started} -> " in error, command
        assert error.count("\n") == 1
    for start in ("init_from", "fork_from"):
        later = open_session(dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, **{start: str(run.path)})))
        with pytest.raises(ConfigError, match="has changed since"):
            starting_state(build(later), Checkpoints(tmp_path / "none"), RunDir(tmp_path / "new"))
    run.write_config(cfg, {})
    assert open_to_look(run).tokenizer.fingerprint() != started
