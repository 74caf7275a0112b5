"""`--preset tiny_sft`: from a pretrained run's weights, on conversations with tools."""

import dataclasses
import json

import numpy as np
import pytest

import launch
from configs.presets import preset
from data.messages import ROLES
from data.tasks import make_problem
from tests.train.conftest import small
from train.loop import train
from train.run_dir import RunDir
from train.session import load_params, open_session
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


def tuned(trained, chats, **optim):
    """The preset's recipe with the small model of these tests."""
    recipe, model = preset("tiny_sft"), small().model
    fields = dict(steps=2, batch_size=8, seq_len=384, eval_batches=1, compute_dtype="float32", init_from=str(trained.path))
    return dataclasses.replace(recipe, model=model, optim=dataclasses.replace(recipe.optim, **optim),
                               data=dataclasses.replace(recipe.data, paths=(str(chats),), bad_rows="drop"),
                               train=dataclasses.replace(recipe.train, **fields))


def test_it_goes_on_from_the_pretrained_weights(trained, chats, tmp_path):
    """With a learning rate of nearly nothing the weights after two steps are the pretrained ones; with the preset's they
    learn the rows."""
    cfg = tuned(trained, chats, lr=1e-12, weight_decay=0.0, qk_clip_tau=None)
    still, run = RunDir(tmp_path / "still"), RunDir(tmp_path / "run")
    assert train(cfg, still) == EXIT_DONE
    session = open_session(cfg)
    before, step = load_params(session, trained)
    after, _ = load_params(session, still)
    assert step == 20
    for path, spec in session.specs.items():
        if spec.update != "router_bias":  # balances itself at a rate of its own
            np.testing.assert_allclose(before[path], after[path], rtol=0, atol=1e-7, err_msg=path)
    assert train(tuned(trained, chats), run) == EXIT_DONE
    unchanged, learnt = ([row["loss"] for row in made.read_metrics() if row["kind"] == "step"] for made in (still, run))
    assert learnt[0] == pytest.approx(unchanged[0], rel=1e-5), "f32 sums; the learning rate is compiled in"
    assert learnt[1] < unchanged[1], "the same rows"
    assert run.left_out.read_text() == f"{chats} line 13 message 1: unknown role 'bot'; known are {', '.join(ROLES)}\n"
