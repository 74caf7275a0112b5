"""Built-in problems whose steps and answers can be checked exactly. The number of steps is a parameter.

A problem is a pure function of (task, split, seed, index, length), and no problem is in both splits. All arithmetic is modulo
10 with operands 1 to 3: what is measured is the execution of long chains, and a short table of facts is learned in minutes
on a laptop.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from string import ascii_lowercase, digits
from typing import Literal

from configs.schema import ConfigError
from data.problem import Draw, Message, Problem, addresses, answers, check, right_steps, solved
from data.tool_tasks import ledger, longest_ledger, pointer_chase

__all__ = ["TASKS", "Problem", "check", "longest_problem", "make_problem", "right_steps"]

Split = Literal["train", "heldout"]

HELD_OUT = 8
"""One in so many problems is kept from training."""

KEYS_PER_TURN = 2
"""Look-ups of one dict_sum turn."""


def chain(draw: Draw, length: int) -> Problem:
    """`7k+2l-3=` -> thoughts `7k+2=9`, `9l-3=6` -> answer `6`: one line a step, found by its letter."""
    value = first = draw.below(10)
    question, steps = [str(first)], []
    for address in addresses(draw, length):
        sign, operand = "+-"[draw.below(2)], draw.between(1, 3)
        result = (value + operand if sign == "+" else value - operand) % 10
        question.append(f"{address}{sign}{operand}")
        steps.append(f"{value}{address}{sign}{operand}={result}")
        value = result
    return solved("".join(question) + "=", steps, str(value))


LETTERS = ascii_lowercase + digits
"""Of what `copy` copies: what keys, numbers and results of tool calls are made of."""
WORD = 8
"""Letters of its longest word."""


def copy(draw: Draw, length: int) -> Problem:
    """`mi7 kqolp x` -> thoughts `mi7`, `kqolp`, `x`, each on its line -> answer `mi7 kqolp x`: words of 1 to 8 letters.

    What every tool task is made of. Words are random and of different lengths, so that a letter can only be found by the
    letters before it, neither by its place nor by its neighbour alone.
    """
    words = ["".join(LETTERS[draw.below(len(LETTERS))] for _ in range(draw.between(1, WORD))) for _ in range(length)]
    return _copied(words)


def _copied(words: list[str]) -> Problem:
    return solved(" ".join(words), words, " ".join(words))


def permutation(draw: Draw, length: int) -> Problem:
    """`12345k13l25=` -> thoughts `k13=32145`, `l25=35142` -> answer `35142`: swaps of places in five."""
    state = list("12345")
    question, steps = ["12345"], []
    for address in addresses(draw, length):
        one, other = sorted(draw.sample(range(5), 2))
        state[one], state[other] = state[other], state[one]
        question.append(f"{address}{one + 1}{other + 1}")
        steps.append(f"{address}{one + 1}{other + 1}={''.join(state)}")
    return solved("".join(question) + "=", steps, "".join(state))


def dict_sum(draw: Draw, length: int) -> Problem:
    """Turns of a running total over a table: `a3b1c2:cb` -> `2` after thoughts `0c+2=2`, `2b+1=3`, then `ac`, ...

    Each turn is answered with the total, because the thoughts of answered turns are not shown again.
    """
    keys = draw.sample(ascii_lowercase, 5)
    table = {key: draw.between(1, 3) for key in keys}
    turns = [[keys[draw.below(5)] for _ in range(KEYS_PER_TURN)] for _ in range(length)]
    messages: list[Message] = []
    steps, total = [], 0
    for turn in turns:
        lines = []
        for key in turn:
            lines.append(f"{total}{key}+{table[key]}={(total + table[key]) % 10}")
            total = (total + table[key]) % 10
        given = "".join(turn)
        if not messages:
            given = "".join(f"{key}{value}" for key, value in table.items()) + ":" + given
        messages += [
            {"role": "user", "content": given},
            {"role": "assistant", "reasoning_content": "\n".join(lines), "content": str(total)},
        ]
        steps.append(str(total))
    return Problem(tuple(messages), str(total), tuple(steps), environment=_Turns([m for m in messages[2::2]]), read_steps=answers)


@dataclass(frozen=True)
class _Turns:
    """Makes environments that answer every message with the user's next turn."""

    turns: list[Message]

    def __call__(self) -> Callable[[Message], list[Message]]:
        rest = iter(self.turns)
        return lambda message: [turn for turn in [next(rest, None)] if turn]


TASKS: dict[str, tuple[Callable[[Draw, int], Problem], int]] = {
    "chain": (chain, 26**2),
    "copy": (copy, 1000),
    "permutation": (permutation, 26**2),
    "dict_sum": (dict_sum, 1000),
    "pointer_chase": (pointer_chase, 10_000),
    "ledger": (ledger, 26**2),
}
"""Name -> (the generator, its longest problem in steps)."""
LONGEST: dict[str, Callable[[int], Problem]] = {"copy": lambda length: _copied(["0" * WORD] * length), "ledger": longest_ledger}
"""Of the tasks whose problems of one number of steps differ in length: one that is as long as any."""


def make_problem(task: str, seed: int, index: int, length: int, split: Split = "heldout") -> Problem:
    """Problem number `index` with `length` steps. Training draws from split `train`; the default is never trained on: a
    problem belongs to one of the splits by what it says, so short ones, of which there are few, do not come up in both.

    ConfigError for an unknown task or a length that the task does not have.
    """
    if task not in TASKS:
        raise ConfigError(f"data.task {task!r} does not exist; choose one of {', '.join(TASKS)}")
    generator, longest = TASKS[task]
    if not 1 <= length <= longest:
        raise ConfigError(f"the {task} task has 1 to {longest} steps, not {length}: see data.task_length")
    for again in count():
        problem = generator(Draw(task, split, seed, index, length, *([again] if again else ())), length)
        if _is_held_out(problem) == (split == "heldout"):
            return problem


def longest_problem(task: str, length: int) -> Problem:
    """A problem that takes as many characters as any other of so many steps, and more than any with fewer. ConfigError as
    `make_problem`."""
    problem = make_problem(task, 0, 0, length)
    return LONGEST[task](length) if task in LONGEST else problem


def _is_held_out(problem: Problem) -> bool:
    said = json.dumps(problem.messages, sort_keys=True)
    return hashlib.sha256(said.encode()).digest()[0] % HELD_OUT == 0
