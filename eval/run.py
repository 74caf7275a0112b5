"""`launch.py eval`: several sets of weights side by side on a run's held-out rows and, for a task, on new problems."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from configs.schema import DataConfig, require
from data.render import KimiRenderer
from data.tasks import make_problem
from eval.horizon import horizon
from eval.play import Settings, play, playable
from eval.results import append_rows
from train.console import Bar, console
from train.held_out import Evaluator, require_same_ids
from train.run_data import data_of
from train.run_dir import RunDir
from train.session import open_to_look
from train.weights import Weights, load_arms

BATCH = 64
"""Problems generated together."""
Suite = Literal["loss", "horizon"]


def evaluate_arms(
    run_path: Path, arms: tuple[str, ...], lengths: tuple[int, ...], problems: int, suite: Suite = "loss", minutes: float = 10.0
) -> int:
    """Evaluate `NAME=WEIGHTS` arms. Suite loss appends a line per arm to the run's evals.jsonl and prints held-out loss and
    answers; suite horizon is eval/horizon.py."""
    run = RunDir(run_path)
    cfg = run.load_config()
    require(problems >= 1, f"--problems must be at least 1, not {problems}")
    require(minutes >= 0, f"--minutes must be at least 0, not {minutes:g}")
    require(
        not (lengths and cfg.data.paths), f"--lengths are of a built-in task's problems, and {run_path} was trained on data.paths"
    )
    lo, hi = cfg.data.task_length
    around = () if cfg.data.paths else playable(lengths, (lo, (lo + hi) // 2, hi, hi + hi // 2, 2 * hi), cfg.data.task)
    session = open_to_look(run)
    data = data_of(session, run)
    loaded = load_arms(arms or (f"bf16={run_path}:bf16", f"{cfg.quant.rounding_grid}={run_path}:int4"))
    for _, weights in loaded:
        require_same_ids(session, weights)
    if suite == "horizon":
        horizon(run, cfg, data, loaded, lengths, problems, minutes)
        return 0
    evaluator = Evaluator(session, data)
    settings = Settings.of(cfg)
    rows = []
    for name, weights in loaded:
        row = {"arm": name, "weights": weights.name, **evaluator.of_served(weights)}
        if not cfg.data.paths:
            row |= task_results(weights, cfg.data, settings, around, problems, name)
        rows.append(row)
    append_rows(run.path / "evals.jsonl", rows)
    console.print(_table(rows, around))
    return 0


def task_results(
    weights: Weights, data: DataConfig, settings: Settings, lengths: tuple[int, ...], problems: int, name: str
) -> dict:
    """Share of exact answers and of right steps by length, on problems that training never draws, each in a live
    conversation with its tools or its user; and the generated tokens of an answer."""
    renderer = KimiRenderer(weights.tokenizer, data.system)
    exact, steps, tokens = {}, {}, {}
    with Bar(f"evaluating {escape(name)}", len(lengths) * problems, "problem") as bar:
        for length in lengths:
            every = []
            for at in range(0, problems, BATCH):
                some = [make_problem(data.task, data.seed, i, length) for i in range(at, min(at + BATCH, problems))]
                every += play(weights, renderer, some, settings)
                bar.advance(len(some))
            exact[length] = sum(p.solved for p in every) / problems
            steps[length] = sum(p.right / p.steps for p in every) / problems
            tokens[length] = sum(p.tokens for p in every) / problems
    return {"problems": problems, "exact": exact, "right_steps": steps, "tokens_per_answer": tokens}


def _table(rows: list[dict], lengths: tuple[int, ...]) -> Table:
    table = Table(title="exact answers by chain length" if lengths else "held-out loss")
    table.add_column("weights")
    table.add_column("held-out loss", justify="right")
    if "bits_per_byte" in rows[0]:
        table.add_column("bits/byte", justify="right")
    for length in lengths:
        table.add_column(f"n={length}", justify="right")
    for row in rows:
        cells = [Text(row["arm"]), f"{row['held_out_loss']:.4f}"]
        if "bits_per_byte" in row:
            cells.append(f"{row['bits_per_byte']:.4f}")
        table.add_row(*cells, *(f"{100 * row['exact'][n]:.1f} %" for n in lengths))
    return table
