"""The page about a run, from its files alone."""

import json
import math

import pytest

from configs.presets import preset
from eval.report import _accuracy, _grid, _kl_by_position, _load, _results, write_report
from eval.results import append_rows, read_result, read_rows, write_result
from train.metrics import MetricsFile, number, plain
from train.run_dir import RunDir


@pytest.fixture
def run(tmp_path):
    """Of three steps, which diverged."""
    run = RunDir(tmp_path)
    run.write_config(preset("tiny"), {})
    file = MetricsFile(run.metrics)
    for step, loss in ((1, 5.0), (2, math.inf), (3, math.nan)):
        file.write(
            "step",
            step,
            {
                "loss": loss,
                "load_max_over_mean": [1.5, loss],
                "grid_error": loss,
                "skipped_steps": 0,
                "dropped_tokens": 0,
                "seconds": 1.0,
                "tokens_per_second": 9.0,
                "mfu": "n/a",
            },
        )
    file.write("eval", 3, {"held_out_loss": math.nan})
    file.close()
    return run


def test_an_evaluation_without_a_number_is_drawn(run, tmp_path):
    append_rows(tmp_path / "evals.jsonl", [evaluated("one", {"1": 0.5}, step=3) | {"held_out_loss": math.nan}])
    assert json.loads((tmp_path / "evals.jsonl").read_text(), parse_constant=pytest.fail)["held_out_loss"] == "nan"
    assert write_report(tmp_path) == 0
    assert "| one | nan |" in (tmp_path / "report.md").read_text()


def test_a_run_that_diverged_gets_its_page(run, tmp_path):
    """metrics.jsonl has text where JSON has no number."""
    assert write_report(tmp_path) == 0
    page = (tmp_path / "report.md").read_text()
    assert "| last training loss | nan |" in page and "| held-out loss | nan |" in page
    assert all((tmp_path / "plots" / f"{name}.png").stat().st_size > 5000 for name in ("loss", "expert_load", "grid"))


def evaluated(arm, exact, **more):
    return {"arm": arm, "held_out_loss": 1.0, "problems": 8, "exact": exact} | more


def test_what_a_kill_cut_in_half_is_left_out(run, tmp_path, capsys):
    """The next evaluation writes a line of its own behind it."""
    (tmp_path / "evals.jsonl").write_text(json.dumps(evaluated("one", {"1": 0.5})) + '\n{"arm": "two", "hel')
    (tmp_path / "horizon.json").write_text('{"task": "chain", "arms": [')
    assert write_report(tmp_path) == 0
    assert "horizon.json is cut off and left out" in capsys.readouterr().out
    assert "| one |" in (page := (tmp_path / "report.md").read_text()) and "Long chains" not in page
    append_rows(tmp_path / "evals.jsonl", [evaluated("three", {"1": 0.5})])
    append_rows(tmp_path / "evals.jsonl", [evaluated("four", {"1": 0.5})])
    assert [row["arm"] for row in read_rows(tmp_path / "evals.jsonl")] == ["one", "three", "four"]
    assert len((tmp_path / "evals.jsonl").read_text().splitlines()) == 4


def test_a_result_is_replaced_whole(tmp_path):
    path = tmp_path / "horizon.json"
    for result in ({"a": 1}, {"b": [2.5]}):
        write_result(path, result)
        assert read_result(path) == result and list(tmp_path.iterdir()) == [path]
    with pytest.raises(TypeError):
        write_result(path, {"c": object()})
    assert read_result(path) == {"b": [2.5]}


def test_arms_of_different_calls_stand_in_one_table():
    """With other lengths, other numbers of problems, and one without bytes to count."""
    lines = _results(
        [
            evaluated("one", {"1": 1.0, "10": 0.5}, bits_per_byte=2.0),
            evaluated("two", {"2": 0.25}, problems=64),
            {"arm": "three", "held_out_loss": 1.5},
        ]
    )
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert head == ["weights", "held-out loss", "bits per byte", "problems per length", "n=1", "n=2", "n=10"]
    assert rows[0][:5] == ["one", "1.0000", "2.0000", "8", "100.0 % (68–100)"] and rows[0][5] == ""
    assert rows[1][:4] == ["two", "1.0000", "", "64"] and rows[1][5] == "25.0 % (16–37)"
    assert rows[2] == ["three", "1.5000", *[""] * 5]


def test_more_arms_than_colours_are_drawn():
    names = [f"arm {i}" for i in range(9)]
    played = {"arms": [{"arm": name, "kl_by_octave": {"1": 0.1, "2": "nan"}} for name in names]}
    for figure, drawn in (
        (_accuracy([evaluated(name, {"1": 0.5}) for name in names]), names),
        (_kl_by_position(played), names[1:]),
    ):
        assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == drawn


@pytest.mark.parametrize("layers, named", [(3, 3), (60, 3)])
def test_a_legend_does_not_hide_the_layers(layers, named):
    figure = _load([{"step": step, "load_max_over_mean": [1.5] * layers} for step in (1, 2)])
    assert len(figure.axes[0].lines) == layers and len(figure.axes[0].get_legend().get_texts()) == named


def test_numbers_come_back():
    assert number(plain([1.5, math.inf, -math.inf])) == [1.5, math.inf, -math.inf] and math.isnan(number(plain(math.nan)))
    assert number("n/a") == "n/a" and number(3) == 3


@pytest.mark.parametrize("values", [[0.0971, 0.0975], [0.5], [float("nan")], [0.0]])
def test_a_line_that_hardly_changes_does_not_lie_on_the_frame(values):
    rows = [{"step": i, "grid_error": value} for i, value in enumerate(values)]
    (axes,) = _grid(rows).axes
    bottom, top = axes.get_ylim()
    assert bottom == 0 and not max(values) >= top
