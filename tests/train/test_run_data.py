"""What a run was trained on is what it is evaluated on."""

import dataclasses

import pytest

from configs.schema import ConfigError
from data.pipeline import PLAN_VERSION, open_data
from tests.train.conftest import small
from train.run_data import data_of
from train.run_dir import RunDir
from train.session import open_session


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
