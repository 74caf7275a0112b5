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
from train.start import kept_dtype


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
