"""`launch.py eval --suite horizon`: how long a chain each set of weights gets right, side by side on the same problems."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from configs.schema import ConfigError, RunConfig
from data.pipeline import Data
from data.render import KimiRenderer
from data.tasks import Problem, make_problem
from eval.divergence import kl_by_octave
from eval.play import OutOfTime, Played, Settings, play, playable
from eval.results import write_result
from eval.statistics import MEASURES, bounds, divergence, interval, success
from train.compat import compile_seconds
from train.console import Bar, clock, console
from train.metrics import finite
from train.run_dir import RunDir
from train.weights import Weights

LENGTHS = (1, 3, 10, 30, 100, 300)
FEWEST = 8
"""Problems of the longest chains; up to `FULL` steps there are as many as asked for."""
FULL = 30
VALIDATION_BATCHES = 8


def problems_of(length: int, asked: int) -> int:
    return min(asked, max(FEWEST, asked * FULL // length))


@dataclass
class Arm:
    """One set of weights and its episodes by length."""

    name: str
    weights: Weights
    plays: dict[int, list[Played]]
    seconds: float = 0.0
    """Of the last length played, without compiling: what the next one is estimated from."""


def horizon(
    run: RunDir,
    cfg: RunConfig,
    data: Data,
    loaded: list[tuple[str, Weights]],
    lengths: tuple[int, ...],
    asked: int,
    minutes: float,
) -> None:
    """Play all arms, write RUN/horizon.json, print tables. The first arm is the one that others are compared with.

    Lengths are played in ascending order, each by all arms; one that cannot be finished in `minutes` is left out for all
    arms, and so are the longer ones. ConfigError if the run's task is no built-in one or has no chains of such a length.
    """
    if cfg.data.paths:
        raise ConfigError("--suite horizon plays built-in tasks: name a run that was trained on one (data.task)")
    lengths = playable(lengths, LENGTHS, cfg.data.task)
    settings = Settings.of(cfg)
    arms = [Arm(name, weights, {}) for name, weights in loaded]
    left_out = _play_all(arms, cfg, settings, lengths, asked, minutes)
    if not arms[0].plays:
        raise ConfigError(f"--minutes {minutes:g} is too short for chains of {lengths[0]}")
    batches = data.validation(VALIDATION_BATCHES)
    result = {
        "task": cfg.data.task,
        "trained_lengths": list(cfg.data.task_length),
        "context": settings.context,
        "problems": {n: len(plays) for n, plays in arms[0].plays.items()},
        "left_out": left_out,
        "arms": [_summary(arm, arms[0], batches) for arm in arms],
    }
    write_result(run.path / "horizon.json", result)
    for table in tables(result):
        console.print(table)
    if left_out:
        console.print(f"left out for want of time: n = {', '.join(map(str, left_out))}; see --minutes")
    console.print(f"wrote {run.path / 'horizon.json'}; `launch.py report {run.path}` draws it", markup=False)


def _play_all(
    arms: list[Arm], cfg: RunConfig, settings: Settings, lengths: tuple[int, ...], asked: int, minutes: float
) -> list[int]:
    """Fill in `Arm.plays`; returns the lengths that there was no time for."""
    deadline, compiling = time.monotonic() + 60 * minutes, compile_seconds()
    total = sum(n * problems_of(n, asked) for n in lengths) * len(arms)
    with Bar("chains", total, "step") as bar:
        for index, length in enumerate(lengths):
            problems = [make_problem(cfg.data.task, cfg.data.seed, i, length) for i in range(problems_of(length, asked))]
            growth = length / lengths[index - 1] if index else 0
            expected = sum(arm.seconds for arm in arms) * growth
            if time.monotonic() + expected > deadline:
                console.print(f"n={length} would take about {clock(expected)}, {clock(deadline - time.monotonic())} is left")
                return list(lengths[index:])
            try:
                for arm in arms:
                    _play_one(arm, length, cfg, settings, problems, deadline, compiling, bar)
            except OutOfTime:
                for arm in arms:
                    arm.plays.pop(length, None)
                return list(lengths[index:])
    return []


def _play_one(
    arm: Arm,
    length: int,
    cfg: RunConfig,
    settings: Settings,
    problems: list[Problem],
    deadline: float,
    compiling: Callable[[], float],
    bar: Bar,
) -> None:
    start, compiled, left = time.monotonic(), compiling(), len(problems) * length

    def after_round(live: int) -> None:
        nonlocal left
        bar.advance(min(live, left))
        left -= min(live, left)

    renderer = KimiRenderer(arm.weights.tokenizer, cfg.data.system)
    arm.plays[length] = play(arm.weights, renderer, problems, settings, deadline, after_round)
    bar.advance(left)
    arm.seconds = max(time.monotonic() - start - (compiling() - compiled), 0.0)


def _summary(arm: Arm, reference: Arm, batches: list) -> dict[str, Any]:
    by_length = {
        n: {
            "success": success(plays),
            "interval": interval(success(plays), len(plays)),
            "right_steps": sum(p.right for p in plays) / sum(p.steps for p in plays),
            "tokens_per_answer": sum(p.tokens for p in plays) / len(plays),
        }
        for n, plays in arm.plays.items()
    }
    every = [p for plays in arm.plays.values() for p in plays]
    kinds = {kind: sum(getattr(p, kind) for p in every) / len(every) for kind in ("thinking", "answer", "tool")}
    measures = {name: {"value": measure(arm.plays), "interval": bounds(arm.plays, measure)} for name, measure in MEASURES.items()}
    return finite(
        {
            "arm": arm.name,
            "weights": arm.weights.name,
            "by_length": by_length,
            "tokens": kinds,
            **measures,
            "misnumbered": sum(p.misnumbered for p in every),
            **divergence(arm.plays, reference.plays),
            "kl_by_octave": kl_by_octave(reference.weights, arm.weights, batches),
        }
    )


ROWS = {
    "step_accuracy": "steps right after right ones",
    "half_horizon": "half of the chains right up to n",
    "tokens_per_answer": "tokens per answer",
    "tokens_per_correct": "tokens per right answer",
    "loops": "loops",
    "overthought": "right on paper, answered wrong",
    "valid_calls": "calls that fit their tool",
}


def steps_right(arm: dict[str, Any]) -> tuple[float, float, float]:
    """Share of steps that are right after right ones, and its interval."""
    return arm["step_accuracy"]["value"], *arm["step_accuracy"]["interval"]


def cells(result: dict[str, Any]) -> tuple[list[list[str]], list[list[str]]]:
    """Two tables as text, a row per arm: success by length, and the other measures."""
    lengths = list(result["problems"])
    curve = [["weights", *(f"n={n}" for n in lengths)]]
    more = [["weights", *ROWS.values(), "thinking / answer / tool", "same as the first arm", "differs first at", "KL"]]
    shortest, longest = min(map(int, lengths)), max(map(int, lengths))
    for arm in result["arms"]:
        by = {str(n): v for n, v in arm["by_length"].items()}
        curve.append([arm["arm"], *(percent(by[str(n)]["success"], by[str(n)]["interval"]) for n in lengths)])
        kl = list(map(float, arm["kl_by_octave"].values()))
        first = arm["median_first_difference"]
        steps = "{:.3%} ({:.3%}–{:.3%})".format(*steps_right(arm)).replace("%", " %")
        more.append(
            [
                arm["arm"],
                steps,
                *(_measure(name, arm[name], shortest, longest) for name in list(ROWS)[1:]),
                " / ".join(f"{arm['tokens'][kind]:.0f}" for kind in ("thinking", "answer", "tool")),
                f"{100 * arm['same_share']:.0f} %",
                "" if first is None else f"token {first:.0f}",
                f"{sum(kl) / len(kl):.1e}",
            ]
        )
    return curve, more


def percent(value: float, bounds: list[float]) -> str:
    return f"{100 * value:.0f} % ({100 * bounds[0]:.0f}–{100 * bounds[1]:.0f})"


def _measure(name: str, found: dict, shortest: int, longest: int) -> str:
    value, bounds = float(found["value"]), [float(b) for b in found["interval"]]
    if name == "half_horizon":

        def text(n: float) -> str:
            return f"> {longest}" if math.isinf(n) else f"< {shortest}" if n == 0 else f"{n:.0f}"

        return text(value) if text(bounds[0]) == text(bounds[1]) else f"{text(value)} ({text(bounds[0])} – {text(bounds[1])})"
    if name.startswith("tokens"):
        return "no right answer" if math.isinf(value) else f"{value:.0f} ({bounds[0]:.0f}–{bounds[1]:.0f})"
    return "no calls" if math.isnan(value) else percent(value, bounds)


def tables(result: dict[str, Any]) -> list[Table]:
    """The same for the terminal; the second one lies on its side, so that it fits."""
    curve, more = cells(result)
    made = [Table(title=f"{result['task']}: right answers by chain length", box=SIMPLE), Table(box=SIMPLE)]
    for table, rows in zip(made, (curve, list(zip(*more)))):
        for number, name in enumerate(rows[0]):
            table.add_column(Text(name), justify="right" if number else "left", no_wrap=True)
        for row in rows[1:]:
            table.add_row(*map(Text, row))
    return made
