"""Contenders of a benchmark in processes of their own, each in the Python it is best in, that work one at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def serve(versions: dict[str, str], actions: dict[str, Callable[[], float]]) -> None:
    """A contender's side: says its versions, then does what each line of standard input names and answers with a line
    of JSON: seconds, processor seconds of all threads, the action's value."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    sys.stdout.flush()
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    print(json.dumps(versions), file=answers, flush=True)
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        value = actions[line.strip()]()
        answer = time.perf_counter() - wall, time.process_time() - cpu, value
        print(json.dumps(answer), file=answers, flush=True)


class Contender:
    """The other side. `command`: of the process, after the interpreter."""

    def __init__(self, python: str, *command: str):
        self.process = subprocess.Popen(
            [python, *command],
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        self.command = " ".join(command)
        self.versions = self._answer()

    def _answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.command} ended with exit code {self.process.wait()}; run it by itself to see why")
        return json.loads(line)

    def do(self, action: str) -> tuple[float, float, float]:
        """(seconds, processor seconds, value) of one action."""
        print(action, file=self.process.stdin, flush=True)
        return tuple(self._answer())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def fastest(contenders: dict[str, Contender], actions: Sequence[str], rounds: int) -> list[dict[str, tuple[float, float]]]:
    """Best (seconds, processor seconds) of each, for every action, all in turns: a machine that slows down does so for all of
    them. The first round, in which they compile, is not counted."""
    best = [dict.fromkeys(contenders, (float("inf"), float("inf"))) for _ in actions]
    for turn in range(rounds + 1):
        for name, contender in contenders.items():
            for action, so_far in zip(actions, best):
                seconds, busy, _ = contender.do(action)
                if turn:
                    so_far[name] = min(so_far[name][0], seconds), min(so_far[name][1], busy)
    return best
