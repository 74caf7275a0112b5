"""Problems played in live conversations, and what one such conversation tells: success, steps, tokens, loops, calls."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from configs.schema import RunConfig, require
from data.episodes import Episode, run_episodes
from data.problem import Problem, call_arguments, check
from data.render import KimiRenderer, Mode
from data.tasks import TASKS
from data.tools import arguments_error
from train.weights import Weights

LONGEST_PERIOD, REPEATS, LOOP_TOKENS = 64, 4, 32
"""A reply loops if it ends in `REPEATS` copies of up to `LONGEST_PERIOD` tokens, at least `LOOP_TOKENS` in all; an
episode also if it makes `REPEATS` equal calls in a row."""


class OutOfTime(Exception):
    """The deadline passed while episodes were running."""


@dataclass(frozen=True)
class Settings:
    """How the conversations of a run are held."""

    mode: Mode
    context: int | None
    """Tokens of the longest row; where a prompt leaves no room for a reply, its oldest tool exchanges are left out. None:
    everything is shown."""

    @classmethod
    def of(cls, cfg: RunConfig) -> Settings:
        """As the run's rows were laid out: with data.too_long=shorten none was longer than train.seq_len."""
        return cls(cfg.data.mode, cfg.train.seq_len if cfg.data.too_long == "shorten" else None)


@dataclass(frozen=True)
class Played:
    """What happened in one episode."""

    solved: bool
    first_wrong: int
    """Steps before the first one that is wrong or missing."""
    right: int
    """Steps equal to the right step at their place."""
    steps: int
    thinking: int
    answer: int
    tool: int
    loops: bool
    overthought: bool
    """The last step was written rightly at its place, the answer is wrong all the same."""
    calls: int
    """Attempted ones, unreadable ones included."""
    valid_calls: int
    """Those that name a declared tool and fit its parameters."""
    misnumbered: int
    stopped: str
    ids: list[int]
    """Everything that was generated."""

    @property
    def tokens(self) -> int:
        return self.thinking + self.answer + self.tool


def playable(asked: tuple[int, ...], usual: tuple[int, ...], task: str) -> tuple[int, ...]:
    """The lengths to play, each once: those asked for, or as many of the usual ones as the task has. ConfigError for one that
    it does not have."""
    longest = TASKS[task][1]
    wrong = next((n for n in asked if not 1 <= n <= longest), None)
    require(wrong is None, f"--lengths {wrong}: the {task} task has chains of 1 to {longest} steps")
    return tuple(sorted(set(asked) or {n for n in usual if n <= longest}))


def play(
    weights: Weights,
    renderer: KimiRenderer,
    problems: Sequence[Problem],
    settings: Settings,
    deadline: float | None = None,
    after_round: Callable[[int], None] = lambda live: None,
) -> list[Played]:
    """Greedy replies to all problems side by side, each to its end. OutOfTime if `time.monotonic()` passes `deadline`.

    A reply may be half again as long as the longest right one, and there may be a tenth more of them, so that a lost
    model can ramble a little.

    after_round   is told how many episodes got a reply
    """
    episodes = [problem.episode() for problem in problems]
    rows = [row for problem in problems for row in renderer.rows(problem.messages, problem.tools, settings.mode)]
    limit = max(longest_run(row.weights) for row in rows) * 3 // 2
    replies = max(sum(m["role"] == "assistant" for m in problem.messages) for problem in problems)
    longest = max(len(row.ids) for row in rows)
    context = None if settings.context is None else max(settings.context - limit, 1)
    decoder = weights.decoder(len(problems), positions=min(longest, settings.context or longest) + limit)
    written: list[list[int]] = [[] for _ in problems]

    def generate(prompts: dict[int, list[int]]) -> dict[int, list[int]]:
        if deadline is not None and time.monotonic() > deadline:
            raise OutOfTime
        made = decoder.reply(prompts, limit)
        for number, ids in made.items():
            written[number] += ids
        after_round(len(prompts))
        return made

    run_episodes(generate, renderer, episodes, replies + replies // 10 + 2, settings.mode, context)
    return [played(*each) for each in zip(problems, episodes, written, strict=True)]


def longest_run(weights: Sequence[float]) -> int:
    """The most trained tokens in a row: the longest reply."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.asarray(weights) > 0, [0]])))
    return int(np.diff(edges)[::2].max())


def played(problem: Problem, episode: Episode, ids: list[int]) -> Played:
    given = problem.read_steps(episode.messages)
    right = [a == b for a, b in zip(given, problem.steps)]
    solved = episode.stopped == "done" and check(problem, episode.messages)
    made = [c["function"] for m in episode.messages for c in m.get("tool_calls", ())]
    known = {t["function"]["name"]: t["function"]["parameters"] for t in episode.declarations}
    valid = sum(f["name"] in known and arguments_error(known[f["name"]], json.loads(f["arguments"])) is None for f in made)
    bill = episode.bill
    overthought = episode.stopped == "done" and not solved and len(right) == len(problem.steps) and right[-1]
    return Played(
        solved,
        right.index(False) if False in right else len(right),
        sum(right),
        len(problem.steps),
        bill.thinking,
        bill.answer,
        bill.tool,
        loops(ids) or repeats_calls(call_arguments(episode.messages)),
        overthought,
        len(made) + episode.unreadable,
        valid,
        episode.misnumbered,
        episode.stopped,
        ids,
    )


def loops(ids: Sequence[int]) -> bool:
    """Whether the tokens end in copies of a short stretch."""
    tail = np.asarray(ids[-LONGEST_PERIOD * REPEATS :])
    for period in range(1, LONGEST_PERIOD + 1):
        length = max(period * REPEATS, LOOP_TOKENS)
        if len(tail) >= length and (tail[-length + period :] == tail[-length:-period]).all():
            return True
    return False


def repeats_calls(calls: Sequence[str]) -> bool:
    return any(len(set(calls[at : at + REPEATS])) == 1 for at in range(len(calls) - REPEATS + 1))
