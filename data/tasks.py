"""Built-in problems whose steps and answers can be checked exactly. The number of steps is a parameter.

A problem is a pure function of (task, split, seed, index, length), by a generator whose stream Python promises to keep.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from string import ascii_lowercase
from typing import Any, Literal

from configs.schema import ConfigError
from data import tokenizer as tok

Message = dict[str, Any]
Split = Literal["train", "heldout"]


@dataclass(frozen=True)
class Problem:
    """A conversation that solves the problem, its final answer, and the right thought lines in order."""

    messages: tuple[Message, ...]
    answer: str
    steps: tuple[str, ...]

    @property
    def question(self) -> tuple[Message, ...]:
        """What the model is given: everything before the first assistant message."""
        first = next(i for i, m in enumerate(self.messages) if m["role"] == "assistant")
        return self.messages[:first]


class Draw:
    """Integers below a bound, from `Random.random`, the only stream that Python keeps over versions."""

    def __init__(self, *key: object):
        self._random = random.Random("/".join(map(str, key))).random

    def below(self, bound: int) -> int:
        return int(self._random() * bound)


def chain(draw: Draw, length: int) -> Problem:
    """`7k+5l-2=` -> thoughts `7k+5=2`, `2l-2=0` -> answer `0`: arithmetic modulo 10, one line a step.

    The letters are addresses: step and operand carry the same one, and they run on from a random start. So the next
    operand is found by looking up a letter, not by counting, and chains may be longer than any seen in training.
    """
    if not 1 <= length <= len(ascii_lowercase):
        raise ConfigError(f"the chain task has 1 to {len(ascii_lowercase)} steps, not {length}")
    value = first = draw.below(10)
    start = draw.below(26)
    question, steps = [str(first)], []
    for step in range(length):
        letter = ascii_lowercase[(start + step) % 26]
        sign, operand = "+-"[draw.below(2)], draw.below(10)
        result = (value + operand if sign == "+" else value - operand) % 10
        question.append(f"{letter}{sign}{operand}")
        steps.append(f"{value}{letter}{sign}{operand}={result}")
        value = result
    return solved("".join(question) + "=", steps, str(value))


def solved(question: str, steps: list[str], answer: str) -> Problem:
    """A one-turn problem: question, thoughts of one line a step, answer."""
    messages = ({"role": "user", "content": question},
                {"role": "assistant", "reasoning_content": "\n".join(steps), "content": answer})
    return Problem(messages, answer, tuple(steps))


TASKS: dict[str, Callable[[Draw, int], Problem]] = {"chain": chain}


def make_problem(task: str, seed: int, index: int, length: int, split: Split = "heldout") -> Problem:
    """Problem number `index` with `length` steps. Training draws from split `train`, so the default is never trained on.

    ConfigError for an unknown task or a length that the task does not have.
    """
    if task not in TASKS:
        raise ConfigError(f"data.task {task!r} does not exist; choose one of {', '.join(TASKS)}")
    return TASKS[task](Draw(task, split, seed, index, length), length)


def split_reply(reply: str | Message) -> tuple[str, str]:
    """(thoughts, content) of generated text or of a message."""
    if not isinstance(reply, str):
        return reply.get("reasoning_content") or "", reply.get("content") or ""
    thoughts, closed, content = reply.partition(tok.THINK_END)
    thoughts = thoughts.rpartition(tok.THINK)[2]
    return (thoughts, content.partition(tok.IM_END)[0]) if closed else (thoughts, "")


def check(problem: Problem, reply: str | Message) -> bool:
    """Whether the content of a reply (text with think tags, or a message) is exactly the answer."""
    return split_reply(reply)[1].strip() == problem.answer


def right_steps(problem: Problem, reply: str | Message) -> int:
    """How many thought lines equal the right line at their place."""
    lines = split_reply(reply)[0].strip().split("\n")
    return sum(line == step for line, step in zip(lines, problem.steps))
