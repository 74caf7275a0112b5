"""Arms by name, what they are compared on, and that results are on disk before they are shown. No weights are loaded."""

import dataclasses
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from configs.presets import preset
from configs.schema import ConfigError
from data.tokenizer import load_tokenizer
from eval import distortion, horizon, run
from train import held_out, weights
from train.held_out import Evaluator
from train.run_dir import RunDir

WILD = "[/x] :smile: [b]"
"""Names that rich would not print as they are, or not at all."""


@pytest.mark.parametrize(
    "arms, taken, words",
    [
        (["a=X", "b=Y", "a=Z"], (), "two arms are named a, .*; write NEW=X"),
        (["X", "X"], (), "two arms are named X, .*; write NEW=X"),
        (["rtn=X"], ("bf16", "rtn"), "two arms are named rtn"),
        (["=X"], (), "the arm '=X' has no name; write NAME=WEIGHTS"),
        ([""], (), "the arm '' has no name"),
        (["x="], (), "'' names no weights; give a run directory or an exported one"),
    ],
)
def test_names_that_cannot_be_told_apart(arms, taken, words):
    with pytest.raises(ConfigError, match=words):
        weights.load_arms(arms, taken)


def test_names_of_arms(monkeypatch):
    monkeypatch.setattr(weights, "load_weights", str.upper)
    assert weights.load_arms(["a=x=1", "y"], ("bf16",)) == [("a", "X=1"), ("y", "Y")]


def as_weights(tokenizer, name="arm", vocab_size=320):
    return SimpleNamespace(name=name, tokenizer=tokenizer, model=SimpleNamespace(vocab_size=vocab_size), params={})


@pytest.fixture
def session():
    return SimpleNamespace(cfg=preset("tiny"), tokenizer=load_tokenizer("bytes"), mesh=None)


def test_weights_of_another_tokenizer_are_not_compared(session, tmp_path, monkeypatch):
    """Of the same size: its ids are other text. The run's own, saved and read again, is the same."""
    session.tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    evaluator = Evaluator(session, None)
    monkeypatch.setattr(Evaluator, "_evaluate", lambda self, params, amount, serving, batches, model: "evaluated")
    assert evaluator.of_served(as_weights(load_tokenizer(str(file)))) == "evaluated"
    spec = json.loads(file.read_text())
    vocab = spec["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(spec))
    with pytest.raises(ConfigError, match="other has another tokenizer than the run's data"):
        evaluator.of_served(as_weights(load_tokenizer(str(file)), "other"))
    with pytest.raises(ConfigError, match="wide has another vocabulary than the run's data"):
        evaluator.of_served(as_weights(session.tokenizer, "wide", 640))


@pytest.mark.parametrize("source_bytes, measured", [(0, {"held_out_loss"}), (4, {"held_out_loss", "bits_per_byte"})])
def test_rows_that_stand_for_no_text_have_no_bits_per_byte(session, monkeypatch, source_bytes, measured):
    """A conversation may train nothing but the end of an empty answer."""
    session.cfg = dataclasses.replace(session.cfg, data=dataclasses.replace(session.cfg.data, paths=("a",)))
    for name, made in (("sums", lambda *_: np.array([6.0, 2.0])), ("batch_sharding", lambda mesh: None)):
        monkeypatch.setattr(held_out, name, made)
    monkeypatch.setattr(held_out.processes, "place", lambda *_: None)
    monkeypatch.setattr(Evaluator, "_setting", lambda *_: None)
    data = SimpleNamespace(validation=lambda batches: [{"tokens": [0]}], source_bytes=lambda batch: source_bytes)
    found = Evaluator(session, data)({}, amount=0.0)
    assert found["held_out_loss"] == 3.0 and set(found) == measured


@pytest.fixture
def broken_screen(monkeypatch):
    """A console that prints nothing but raises: whoever is asked for results has to find them on disk all the same."""

    def closed(*_, **__):
        raise BrokenPipeError

    for module in (run, distortion, horizon):
        monkeypatch.setattr(module, "console", SimpleNamespace(print=closed, is_terminal=False))


def test_losses_are_written_before_they_are_shown(session, tmp_path, monkeypatch, broken_screen):
    RunDir(tmp_path).write_config(session.cfg, {})
    monkeypatch.setattr(run, "open_to_look", lambda _: session)
    monkeypatch.setattr(run, "data_of", lambda *_: None)
    monkeypatch.setattr(run, "load_arms", lambda arms: [(WILD, as_weights(session.tokenizer))])
    monkeypatch.setattr(Evaluator, "of_served", lambda *_: {"held_out_loss": 1.0})
    monkeypatch.setattr(run, "task_results", lambda *_: {"problems": 1, "exact": {3: 1.0}})
    with pytest.raises(BrokenPipeError):
        run.evaluate_arms(tmp_path, ("x",), (3,), 1)
    assert json.loads((tmp_path / "evals.jsonl").read_text())["arm"] == WILD


def test_distortion_is_written_before_it_is_shown(session, tmp_path, monkeypatch, broken_screen):
    RunDir(tmp_path).write_config(session.cfg, {})
    for name, made in (("open_to_look", lambda _: session), ("data_of", lambda *_: None), ("load_params", lambda *_: ({}, 7))):
        monkeypatch.setattr(distortion, name, made)
    row = {"summary": {}, "kl": float("nan")}
    report = SimpleNamespace(arms=lambda extra: [("bf16", {}, {}, ())], row=lambda *_: row)
    monkeypatch.setattr(distortion, "_Report", lambda *_: report)
    monkeypatch.setattr(distortion, "_table", lambda rows: None)
    with pytest.raises(BrokenPipeError):
        distortion.distortion_report(str(tmp_path))
    found = json.loads((tmp_path / "distortion.json").read_text())
    assert found["step"] == 7 and found["arms"] == {"bf16": {"summary": {}, "kl": "nan", "notes": []}}


@pytest.mark.parametrize("arms", [("bf16=X",), ("gptq=X",), ("a=X", "a=Y")])
def test_distort_keeps_its_own_names(session, tmp_path, monkeypatch, arms):
    RunDir(tmp_path).write_config(session.cfg, {})
    monkeypatch.setattr(distortion, "open_to_look", lambda _: session)
    with pytest.raises(ConfigError, match="two arms are named"):
        distortion.distortion_report(str(tmp_path), arms)


def test_distort_compares_one_network(session, tmp_path, monkeypatch):
    """The arms' weights go through the reference's layers, whatever they were trained in."""
    RunDir(tmp_path).write_config(session.cfg, {})
    other = SimpleNamespace(model=dataclasses.replace(session.cfg.model, rope_theta=77.0), tokenizer=session.tokenizer)
    monkeypatch.setattr(distortion, "open_to_look", lambda _: session)
    monkeypatch.setattr(distortion, "load_arms", lambda *_, **__: [("qat", other)])
    with pytest.raises(ConfigError, match="qat is another network than the run .rope_theta 77.0, not"):
        distortion.distortion_report(str(tmp_path), ("qat=X",))


def played():
    point = {"value": 0.5, "interval": [0.25, 0.75]}
    arm = dict.fromkeys(horizon.ROWS, point) | {
        "arm": WILD,
        "by_length": {3: {"success": 0.5, "interval": [0.25, 0.75]}},
        "same_share": 1.0,
        "median_first_difference": None,
        "tokens": dict.fromkeys(("thinking", "answer", "tool"), 1.0),
        "kl_by_octave": {1: "nan"},
    }
    return {"task": "chain", "problems": {3: 4}, "arms": [arm]}


def test_chains_are_written_before_they_are_shown(session, tmp_path, monkeypatch, broken_screen):
    monkeypatch.setattr(horizon, "_play_all", lambda arms, *_: arms[0].plays.update({3: [None] * 4}) or [])
    monkeypatch.setattr(horizon, "_summary", lambda *_: played()["arms"][0])
    data = SimpleNamespace(validation=lambda batches: [])
    with pytest.raises(BrokenPipeError):
        horizon.horizon(RunDir(tmp_path), session.cfg, data, [(WILD, None)], (3,), 4, 1.0)
    assert json.loads((tmp_path / "horizon.json").read_text())["arms"][0]["arm"] == WILD


DISTORTED = dict.fromkeys([*distortion.COLUMNS], 0.5)


@pytest.mark.parametrize(
    "tables",
    [
        lambda: [run._table([{"arm": WILD, "held_out_loss": 1.0, "exact": {3: 0.5}}], (3,))],
        lambda: [distortion._table({WILD: {"summary": {}} | DISTORTED})],
        lambda: horizon.tables(played()),
    ],
    ids=["loss", "distortion", "horizon"],
)
def test_names_stand_in_tables_as_they_are(tables):
    console = Console(width=200, record=True, file=io.StringIO())
    for table in tables():
        console.print(table)
    assert WILD in console.export_text()
