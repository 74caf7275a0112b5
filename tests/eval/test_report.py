"""The page about a run, from its files alone."""

import math

from configs.presets import preset
from eval.report import write_report
from train.metrics import MetricsFile, number, plain
from train.run_dir import RunDir


def test_a_run_that_diverged_gets_its_page(tmp_path):
    """metrics.jsonl has text where JSON has no number."""
    run = RunDir(tmp_path)
    run.write_config(preset("tiny"), {})
    file = MetricsFile(run.metrics)
    for step, loss in ((1, 5.0), (2, math.inf), (3, math.nan)):
        file.write("step", step, {"loss": loss, "load_max_over_mean": [1.5, loss], "grid_error": loss, "skipped_steps": 0,
                                  "dropped_tokens": 0, "seconds": 1.0, "tokens_per_second": 9.0, "mfu": "n/a"})
    file.write("eval", 3, {"held_out_loss": math.nan})
    file.close()
    assert write_report(tmp_path) == 0
    page = (tmp_path / "report.md").read_text()
    assert "| last training loss | nan |" in page and "| held-out loss | nan |" in page
    assert all((tmp_path / "plots" / f"{name}.png").stat().st_size > 5000 for name in ("loss", "expert_load", "grid"))


def test_numbers_come_back():
    assert number(plain([1.5, math.inf, -math.inf])) == [1.5, math.inf, -math.inf] and math.isnan(number(plain(math.nan)))
    assert number("n/a") == "n/a" and number(3) == 3
