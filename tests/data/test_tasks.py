"""Built-in problems: reproducible, right, and checked exactly."""

import re

import pytest

from configs.schema import ConfigError
from data.tasks import check, make_problem, right_steps


def test_chain_is_right_and_reproducible():
    seen = set()
    for index in range(200):
        length = 1 + index % 30
        problem = make_problem("chain", 3, index, length)
        assert problem == make_problem("chain", 3, index, length)
        question, reply = problem.messages
        value = int(question["content"][0])
        operations = re.findall(r"([a-z]+)([+-])(\d)", question["content"])
        assert len(operations) == len(problem.steps) == length
        for (letter, sign, operand), step in zip(operations, problem.steps):
            result = (value + int(sign + operand)) % 10
            assert step == f"{value}{letter}{sign}{operand}={result}"
            value = result
        assert problem.answer == str(value) and check(problem, reply) and right_steps(problem, reply) == length
        seen.add(question["content"])
    assert len(seen) > 190


def test_golden():
    """The stream of problems must not change with the Python version."""
    assert make_problem("chain", 0, 0, 3).steps == ("2y+2=4", "4z-3=1", "1a+1=2")
    assert make_problem("chain", 0, 0, 3, "train").steps != make_problem("chain", 0, 0, 3).steps


def test_copy():
    """Words of every length from 1 to 8; thoughts hold one a line, the answer all of them."""
    assert make_problem("copy", 0, 0, 2).steps == ("d", "7oi")
    problems = [make_problem("copy", 0, index, 1 + index % 3) for index in range(100)]
    assert {len(word) for problem in problems for word in problem.steps} == set(range(1, 9))
    for problem in problems:
        question, reply = problem.messages
        assert question["content"] == problem.answer == reply["content"] == " ".join(problem.steps)
        assert reply["reasoning_content"] == "\n".join(problem.steps) and check(problem, reply)
        assert not check(problem, reply | {"content": problem.answer[:-1]})


def test_checks_of_generated_text():
    problem = make_problem("chain", 0, 0, 3)
    good = "<think>" + "\n".join(problem.steps) + "</think>2<|im_end|>"
    assert check(problem, good) and right_steps(problem, good) == 3
    assert not check(problem, good.replace("</think>2", "</think>1"))
    assert not check(problem, good.replace("</think>", "")), "an unclosed thought is no answer"
    assert right_steps(problem, good.replace("4z-3=1", "4z-3=8")) == 2
    assert not check(problem, "") and right_steps(problem, "") == 0


@pytest.mark.parametrize("task, length", [("chain", 0), ("chain", 677), ("nothing", 3)])
def test_unknown(task, length):
    with pytest.raises(ConfigError):
        make_problem(task, 0, 0, length)
