"""`eval --suite horizon`, its page in the report, and generate with a task's own tools, on a small run."""

import json

import pytest

import launch
from train.stop import EXIT_DONE, EXIT_USAGE


def test_suite_horizon(trained, capsys):
    run = str(trained.path)
    arguments = ["eval", "--run", run, "--suite", "horizon", "--problems", "4", "--lengths", "1", "3"]
    assert launch.main([*arguments, "--", f"bf16={run}:bf16", f"RTN={run}:rtn", f"QAT={run}:int4"]) == EXIT_DONE
    result = json.loads((trained.path / "horizon.json").read_text())
    assert result["problems"] == {"1": 4, "3": 4} and result["left_out"] == [] and result["context"] is None
    bf16, *others = result["arms"]
    assert [arm["arm"] for arm in result["arms"]] == ["bf16", "RTN", "QAT"]
    assert bf16["same_share"] == 1.0 and set(bf16["kl_by_octave"].values()) == {0.0}
    assert all(0 < kl < 1 for arm in others for kl in arm["kl_by_octave"].values()), "tests/train/conftest.py: tiny and rough"
    for arm in result["arms"]:
        assert arm["by_length"]["3"]["interval"][0] <= arm["by_length"]["3"]["success"]
        assert arm["valid_calls"]["value"] == "nan", "the chain task calls no tool"
    assert "right answers by chain length" in capsys.readouterr().out
    assert launch.main(["report", run]) == EXIT_DONE
    page = (trained.path / "report.md").read_text()
    assert "## Long chains" in page and "| QAT |" in page and "4 of n=3" in page
    assert (trained.path / "plots" / "horizon.png").exists() and (trained.path / "plots" / "kl_by_position.png").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--minutes", "0"], "--minutes 0 is too short for chains of 1"),
        (["--lengths", "1000"], "--lengths 1000: the chain task has chains of 1 to 676 steps"),
        (["--lengths", "1", "0"], "--lengths 0: the chain task has chains of 1 to 676 steps"),
    ],
)
def test_what_a_suite_cannot_play_is_one_sentence(trained, capsys, arguments, words):
    assert launch.main(["eval", "--run", str(trained.path), "--suite", "horizon", *arguments]) == EXIT_USAGE
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--lengths", "5000"], "--lengths 5000: the chain task has chains of 1 to 676"),
        (["--minutes", "nan"], "at least 0, not nan"),
    ],
)
def test_what_no_evaluation_can_play_is_said_before_it_begins(trained, capsys, monkeypatch, arguments, words):
    monkeypatch.setattr("eval.run.load_arms", None)
    assert launch.main(["eval", "--run", str(trained.path), *arguments]) == EXIT_USAGE
    assert words in capsys.readouterr().err


def test_generate_plays_a_task_with_its_tools(trained, capsys):
    """Twenty steps teach nothing: what is tested is that the loop ends and the bill is printed."""
    arguments = ["generate", "--weights", str(trained.path), "--max-new-tokens", "24"]
    assert launch.main([*arguments, "--task", "pointer_chase", "--max-replies", "2"]) == EXIT_DONE
    assert launch.main([*arguments, "how much?", "--tools", "calculator", "key_value", "--think-budget", "4"]) == EXIT_DONE
    printed = capsys.readouterr().out
    assert printed.count("new tokens in") == 2 and "the answer is" in printed
    assert launch.main([*arguments, "x", "--tools", "calculate"]) == EXIT_USAGE
    assert "name calculator, key_value" in capsys.readouterr().err
