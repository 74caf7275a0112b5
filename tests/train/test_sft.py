"""`--preset tiny_sft`: from a pretrained run's weights, on conversations with tools."""

import dataclasses
import json

import numpy as np
import pytest

import launch
import train.loop as loop
from configs.presets import preset
from data.messages import ROLES
from data.tasks import make_problem
from tests.train.conftest import small
from train.checkpoint import Checkpoints
from train.loop import train
from train.machine import build
from train.run_dir import RunDir
from train.session import load_params, open_session
from train.start import starting_state
from train.stop import EXIT_DONE, EXIT_USAGE


def test_without_a_pretrained_run_it_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert launch.main(["train", "--preset", "tiny_sft", "--train.batch-size", "8"]) == EXIT_USAGE
    assert "runs/tiny is not a run directory" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Twelve conversations with a tool, as chat JSONL; one row cannot be used."""
    problems = [make_problem("pointer_chase", 0, i, 1 + i % 2, "train") for i in range(12)]
    rows = [{"messages": problem.messages, "tools": problem.tools} for problem in problems]
    path = tmp_path_factory.mktemp("chats") / "tools.jsonl"
    path.write_text("\n".join(map(json.dumps, [*rows, {"messages": [{"role": "bot"}]}])))
    return path


def tuned(trained, chats):
    """The preset's recipe with the small model of these tests."""
    recipe, model = preset("tiny_sft"), small().model
    fields = dict(steps=2, batch_size=8, seq_len=384, eval_batches=1, compute_dtype="float32", init_from=str(trained.path))
    return dataclasses.replace(
        recipe,
        model=model,
        data=dataclasses.replace(recipe.data, paths=(str(chats),), bad_rows="drop"),
        train=dataclasses.replace(recipe.train, **fields),
    )


def test_it_starts_from_the_pretrained_weights(trained, chats, tmp_path):
    session = open_session(tuned(trained, chats))
    state, step = starting_state(build(session), Checkpoints(tmp_path / "checkpoints"), RunDir(tmp_path))
    before, at = load_params(session, trained)
    assert (step, at, int(state.step)) == (0, 20, 0)
    for path in session.specs:
        np.testing.assert_array_equal(before[path], state.params[path], err_msg=path)


def test_what_is_odd_about_rows_is_said_when_a_run_begins(tmp_path, monkeypatch, capsys):
    """Remarks by their number, left-out rows by name. Nothing is trained here."""
    messages = make_problem("pointer_chase", 0, 0, 1, "train").messages
    path = tmp_path / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, [{"messages": messages}, {"messages": messages}, {"messages": []}])))
    monkeypatch.setattr(loop, "starting_state", lambda *_: (None, 0))
    monkeypatch.setattr(loop, "run_steps", lambda machine, data, state, step, *rest: (state, step))
    run = RunDir(tmp_path / "run")
    assert train(tuned(RunDir(tmp_path / "none"), path), run) == EXIT_DONE
    printed = capsys.readouterr().out
    assert "2 remarks on conversations that are trained: `launch.py data` with the same settings shows them" in printed
    assert "1 rows or files are left out" in printed and "line 3 has no messages" in run.left_out.read_text()


@pytest.mark.slow
def test_it_learns_chats_and_names_what_it_leaves_out(trained, chats, tmp_path):
    run = RunDir(tmp_path / "run")
    assert train(tuned(trained, chats), run) == EXIT_DONE
    losses = [row["loss"] for row in run.read_metrics() if row["kind"] == "step"]
    assert len(losses) == 2 and losses[1] < losses[0], "rows of one kind, many places each"
    assert run.left_out.read_text() == f"{chats} line 13 message 1: unknown role 'bot'; known are {', '.join(ROLES)}\n"
