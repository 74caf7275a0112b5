"""What a run was trained on is what it is evaluated on."""

import dataclasses

import pytest

from configs.schema import ConfigError
from data.pipeline import PLAN_VERSION, open_data
from tests.train.conftest import small
from train.loop import train
from train.run_data import data_of
from train.run_dir import RunDir
from train.session import open_session, open_to_look


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


def test_rows_longer_than_the_config_promises_stop_new_runs_only(tmp_path):
    """A run that was trained so before this was asked can still be evaluated and exported."""
    cfg = small()
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, max_position_embeddings=32))
    with pytest.raises(ConfigError, match="train.seq_len=64 is more than model.max_position_embeddings=32"):
        train(cfg, RunDir(tmp_path / "new"))
    run = RunDir(tmp_path / "old")
    run.write_config(cfg, {})
    assert open_to_look(run).cfg.train.seq_len == 64 and not (tmp_path / "new").exists()
