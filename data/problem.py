"""What a built-in problem is, and how replies to it are checked."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from string import ascii_lowercase

from data.episodes import Environment, Episode
from data.parse import parse_text
from data.render import Message

Reply = str | Message | Sequence[Message]
"""Generated text with its special tokens written out, a message, or all messages of an episode."""


class Draw:
    """Integers below a bound, from `Random.random`, the only stream that Python keeps over versions."""

    def __init__(self, *key: object):
        self._random = random.Random("/".join(map(str, key))).random

    def below(self, bound: int) -> int:
        return int(self._random() * bound)

    def between(self, lo: int, hi: int) -> int:
        """lo to hi, both included."""
        return lo + self.below(hi - lo + 1)

    def sample(self, items: Sequence, count: int) -> list:
        """`count` different items in random order."""
        rest = list(items)
        return [rest.pop(self.below(len(rest))) for _ in range(count)]


def addresses(draw: Draw, count: int) -> list[str]:
    """Consecutive labels from a random start of the (cyclic) alphabet, of as many letters as `count` needs.

    Step and operand carry the same label, so the next operand can be found by looking up a label, without counting.
    Starts are random so that every transition is seen in short chains too.
    """
    width = 1
    while 26**width < count:
        width += 1
    start = draw.below(26**width)
    return ["".join(ascii_lowercase[(start + i) // 26**place % 26] for place in reversed(range(width))) for i in range(count)]


def thought_lines(messages: Sequence[Message]) -> list[str]:
    """The lines of all thoughts, in order."""
    return [line for m in messages for line in (m.get("reasoning_content") or "").strip().split("\n") if line]


def answers(messages: Sequence[Message]) -> list[str]:
    """The contents of all answers, in order."""
    return [m["content"].strip() for m in messages if m["role"] == "assistant" and not m.get("tool_calls")]


def call_arguments(messages: Sequence[Message]) -> list[str]:
    """NAME and arguments of all calls, in order."""
    return [c["function"]["name"] + c["function"]["arguments"] for m in messages for c in m.get("tool_calls", ())]


@dataclass(frozen=True)
class Problem:
    """A conversation that solves the problem, its final answer, and the right steps in order.

    environment   makes a fresh `data.episodes.Environment`, which plays the tools and the user's later turns
    read_steps    finds in messages what `steps` is compared with
    """

    messages: tuple[Message, ...]
    answer: str
    steps: tuple[str, ...]
    tools: tuple[dict, ...] = ()
    environment: Callable[[], Environment] = field(default=lambda: lambda _: [], compare=False)
    read_steps: Callable[[Sequence[Message]], list[str]] = field(default=thought_lines, compare=False)

    @property
    def question(self) -> list[Message]:
        """What the model is given: everything before the first assistant message."""
        first = next(i for i, m in enumerate(self.messages) if m["role"] == "assistant")
        return list(self.messages[:first])

    def episode(self) -> Episode:
        """A fresh start of the live conversation."""
        return Episode(self.question, self.environment(), self.tools)


def solved(question: str, steps: list[str], answer: str) -> Problem:
    """A one-turn problem: question, thoughts of one line a step, answer."""
    messages = (
        {"role": "user", "content": question},
        {"role": "assistant", "reasoning_content": "\n".join(steps), "content": answer},
    )
    return Problem(messages, answer, tuple(steps))


def messages_of(reply: Reply) -> list[Message]:
    if isinstance(reply, str):
        return [parse_text(reply).message()]
    return [reply] if isinstance(reply, dict) else list(reply)


def check(problem: Problem, reply: Reply) -> bool:
    """Whether the last message is an answer and exactly the right one."""
    last = messages_of(reply)[-1]
    return last["role"] == "assistant" and not last.get("tool_calls") and last["content"].strip() == problem.answer


def right_steps(problem: Problem, reply: Reply) -> int:
    """How many steps equal the right step at their place."""
    return sum(given == right for given, right in zip(problem.read_steps(messages_of(reply)), problem.steps))
