"""Built-in problems: reproducible, right, and checked exactly."""

import json
import re

import pytest

from configs.schema import ConfigError
from data.render import KimiRenderer
from data.tasks import TASKS, check, longest_problem, make_problem, right_steps
from data.tokenizer import load_tokenizer


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
    assert make_problem("chain", 0, 0, 3).steps == ("4x+1=5", "5y-3=2", "2z+3=5")
    assert make_problem("chain", 0, 0, 3, "train").steps != make_problem("chain", 0, 0, 3).steps


@pytest.mark.parametrize("task", TASKS)
def test_no_problem_is_in_both_splits(task):
    """Also of the shortest, of which there are few: 1,560 chains of one step."""
    train, held = (
        {json.dumps(make_problem(task, 0, index, 1, split).messages) for index in range(number)}
        for split, number in (("train", 1500), ("heldout", 100))
    )
    assert not train & held and len(held) > 20


def test_copy():
    """Words of every length from 1 to 8; thoughts hold one a line, the answer all of them."""
    assert make_problem("copy", 0, 0, 2).steps == ("abi", "jzma")
    problems = [make_problem("copy", 0, index, 1 + index % 3) for index in range(100)]
    assert {len(word) for problem in problems for word in problem.steps} == set(range(1, 9))
    for problem in problems:
        question, reply = problem.messages
        assert question["content"] == problem.answer == reply["content"] == " ".join(problem.steps)
        assert reply["reasoning_content"] == "\n".join(problem.steps) and check(problem, reply)
        assert not check(problem, reply | {"content": problem.answer[:-1]})


@pytest.mark.parametrize("task", TASKS)
def test_no_problem_is_longer_than_the_longest(task):
    """Nor is one of fewer steps; of `ledger` the longest is drawn, of `copy` one that is almost as long."""
    renderer = KimiRenderer(load_tokenizer("bytes"))

    def tokens(problem):
        return max(len(row.ids) for row in renderer.rows(problem.messages, problem.tools))

    shorter = 0
    for length in (1, 2, 5, 26, 27):
        longest, drawn = tokens(longest_problem(task, length)), max(tokens(make_problem(task, 0, i, length)) for i in range(60))
        assert shorter < longest and drawn <= longest
        assert drawn == longest if task not in ("copy", "ledger") or length == 1 else drawn > 0.7 * longest
        shorter = longest


def test_checks_of_generated_text():
    problem = make_problem("chain", 0, 0, 3)
    good = "<think>" + "\n".join(problem.steps) + "</think>5<|im_end|>"
    assert check(problem, good) and right_steps(problem, good) == 3
    assert not check(problem, good.replace("</think>5", "</think>1"))
    assert not check(problem, good.replace("</think>", "")), "an unclosed thought is no answer"
    assert right_steps(problem, good.replace("5y-3=2", "5y-3=8")) == 2
    assert not check(problem, "") and right_steps(problem, "") == 0


@pytest.mark.parametrize("task, length", [("chain", 0), ("chain", 677), ("nothing", 3)])
def test_unknown(task, length):
    for made in (lambda: make_problem(task, 0, 0, length), lambda: longest_problem(task, length)):
        with pytest.raises(ConfigError):
            made()
