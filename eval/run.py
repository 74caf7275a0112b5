"""`launch.py eval`: several sets of weights side by side on a run's held-out rows and, for a task, on new problems."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from rich.table import Table

from configs.schema import ConfigError, DataConfig
from data.episodes import Episode, run_episodes
from data.pipeline import open_data
from data.render import KimiRenderer
from data.tasks import Problem, check, make_problem, right_steps
from train.console import Bar, console
from train.held_out import Evaluator
from train.run_dir import RunDir
from train.session import open_session
from train.weights import Weights, load_weights

BATCH = 64
"""Problems generated together."""


def evaluate_arms(run_path: Path, arms: tuple[str, ...], lengths: tuple[int, ...], problems: int) -> int:
    """Evaluate `NAME=WEIGHTS` arms; prints a table and appends a line per arm to the run's evals.jsonl."""
    run = RunDir(run_path)
    cfg = run.load_config()
    session = open_session(cfg, run.load_facts().get("compute_dtype"))
    if problems < 1:
        raise ConfigError(f"--problems must be at least 1, not {problems}")
    named = [tuple(arm.split("=", 1)) if "=" in arm else (arm, arm) for arm in arms] or \
        [("bf16", f"{run_path}:bf16"), ("int4", f"{run_path}:int4")]
    data = open_data(cfg, session.tokenizer)
    lo, hi = cfg.data.task_length
    lengths = lengths or tuple(sorted({lo, (lo + hi) // 2, hi, hi + hi // 2, 2 * hi}))
    loaded = [(name, load_weights(source)) for name, source in named]
    evaluator = Evaluator(session, data)
    rows = []
    for name, weights in loaded:
        row = {"arm": name, "weights": weights.name, **evaluator.of_served(weights)}
        if not cfg.data.paths:
            row |= task_results(weights, cfg.data, lengths, problems, name)
        rows.append(row)
    console.print(_table(rows, lengths if not cfg.data.paths else ()))
    with open(run.path / "evals.jsonl", "a") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
    return 0


def task_results(weights: Weights, data: DataConfig, lengths: tuple[int, ...], problems: int, name: str) -> dict:
    """Share of exact answers and of right steps by length, on problems that training never draws, each in a live
    conversation with its tools or its user; and the generated tokens of an answer, by what they are."""
    renderer = KimiRenderer(weights.tokenizer, data.system)
    exact, steps, tokens = {}, {}, {}
    with Bar(f"evaluating {name}", len(lengths) * problems, "problem") as bar:
        for length in lengths:
            right = share = generated = 0.0
            for at in range(0, problems, BATCH):
                some = [make_problem(data.task, data.seed, i, length) for i in range(at, min(at + BATCH, problems))]
                for problem, episode in zip(some, answered(weights, renderer, some, data.mode), strict=True):
                    right += episode.stopped == "done" and check(problem, episode.messages)
                    share += right_steps(problem, episode.messages) / len(problem.steps)
                    generated += episode.bill.thinking + episode.bill.answer + episode.bill.tool
                bar.advance(len(some))
            exact[length], steps[length], tokens[length] = right / problems, share / problems, generated / problems
    return {"problems": problems, "exact": exact, "right_steps": steps, "tokens_per_answer": tokens}


def answered(weights: Weights, renderer: KimiRenderer, problems: list[Problem], mode: str) -> list[Episode]:
    """Episodes played to their ends with greedy replies. A reply may be half again as long as all that a right
    conversation generates, and there may be twice as many replies, so that a lost model can ramble a little."""
    episodes = [problem.episode() for problem in problems]
    rows = [row for problem in problems for row in renderer.rows(problem.messages, problem.tools, mode)]
    limit = max(row.trained for row in rows) * 3 // 2
    replies = max(sum(m["role"] == "assistant" for m in problem.messages) for problem in problems)
    run_episodes(lambda prompts: weights.generate(prompts, limit), renderer, episodes, 2 * replies, mode)
    return episodes


def interval(share: float, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share of n trials."""
    z = 1.96
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return float(max(middle - half, 0.0)), float(min(middle + half, 1.0))


def _table(rows: list[dict], lengths: tuple[int, ...]) -> Table:
    table = Table(title="exact answers by chain length" if lengths else "held-out loss")
    table.add_column("weights")
    table.add_column("held-out loss", justify="right")
    if "bits_per_byte" in rows[0]:
        table.add_column("bits/byte", justify="right")
    for length in lengths:
        table.add_column(f"n={length}", justify="right")
    for row in rows:
        cells = [row["arm"], f"{row['held_out_loss']:.4f}"]
        if "bits_per_byte" in row:
            cells.append(f"{row['bits_per_byte']:.4f}")
        table.add_row(*cells, *(f"{100 * row['exact'][n]:.1f} %" for n in lengths))
    return table
