"""GSM8K's worked solutions as interleaved thinking with calculator calls. `python -m data.gsm8k IN.jsonl OUT.jsonl`

A solution writes `48/2 = <<48/2=24>>24 clips`: the text up to the mark becomes a thought, the mark a call of the
calculator, and the text goes on after the result. The number behind `####` becomes the answer. Every call is run and
must give the number that stands in the mark (Cobbe et al. 2021, "Training Verifiers to Solve Math Word Problems").
"""

from __future__ import annotations

import json
import re
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

from configs.schema import ConfigError
from data.arrays import Unreadable
from data.messages import RowError, conversation
from data.problem import Problem, Reply, call_arguments, messages_of, thought_lines
from data.sources import decoded, json_object
from data.tools import Toolbox, calculator, call, exact

MARK = re.compile(r"<<(?P<expression>[^<>]+)=(?P<result>[^<>=]+)>>")
TOOLS = tuple(Toolbox([calculator()]).declarations)


NUMBER = r"-?(?:\d{1,3}(?:[, ]\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"


def number(text: str) -> Fraction | None:
    """The value of a text that is one number: `1,200`, `$.50`, `70%`, `18.`; else None."""
    found = re.fullmatch(rf"\$?({NUMBER})%?\.?", text.strip())
    return Fraction(re.sub("[, ]", "", found[1])) if found else None


def problem(row: dict[str, Any]) -> Problem:
    """The conversation that solves a row with `question` and `answer`. RowError for a wrong mark or no answer."""
    if not all(isinstance(row.get(name), str) for name in ("question", "answer")):
        raise RowError("needs a question and an answer, as GSM8K has them")
    solution, found, answer = row["answer"].rpartition("\n#### ")
    if not found:
        raise RowError("has no line `#### ANSWER` at its end")
    if number(answer) is None:
        raise RowError(f"answers {answer!r}, which is not a number")
    answer = answer.strip().replace(",", "")
    toolbox = Toolbox([calculator()])
    messages = [{"role": "user", "content": row["question"]}]
    at = 0
    for index, mark in enumerate(MARK.finditer(solution)):
        check_mark(mark)
        messages.append(
            {
                "role": "assistant",
                "reasoning_content": solution[at : mark.start()],
                "content": "",
                "tool_calls": [call(index, "calculate", expression=mark["expression"])],
            }
        )
        messages += toolbox.results(messages[-1])
        at = mark.end()
    rest = solution[at:]
    if "<<" in rest or ">>" in rest:
        raise RowError("has a calculator mark that is not <<EXPRESSION=RESULT>>")
    messages.append({"role": "assistant", "reasoning_content": rest, "content": answer})
    messages = conversation({"messages": messages}).messages  # arguments as a row of them is trained
    return Problem(
        tuple(messages), answer, tuple(call_arguments(messages)), TOOLS, lambda: Toolbox([calculator()]).results, call_arguments
    )


def check_mark(mark: re.Match) -> None:
    """RowError unless the expression in a mark has exactly the result that the mark gives."""
    try:
        right = exact(mark["expression"]) == exact(mark["result"])
    except ValueError as error:
        raise RowError(f"mark {mark[0]}: {error}") from None
    if not right:
        raise RowError(f"mark {mark[0]} is wrong")


def states_answer(problem: Problem) -> bool:
    """Whether the answer is written somewhere in the solution; in 14 of GSM8K's 7,473 training rows it is not."""
    text = " ".join([*thought_lines(problem.messages), *(m["content"] for m in problem.messages[1:-1])])
    return number(problem.answer) in map(number, re.findall(NUMBER, text))


def solves(problem: Problem, reply: Reply) -> bool:
    """Whether the last message answers with the right number, however it is written."""
    last = messages_of(reply)[-1]
    return last["role"] == "assistant" and not last.get("tool_calls") and number(last["content"]) == number(problem.answer)


def convert(source: Path, target: Path) -> tuple[int, list[int]]:
    """Write a chat row for every problem of a GSM8K file. ConfigError names the line that cannot be converted, and a target
    that is there already; blank lines are passed over.

    Returns the number of rows, and the lines whose solution never states the answer (data to look at, or to leave out).
    """
    if target.exists():
        raise ConfigError(f"{target} exists; remove it or choose another name")
    rows, doubtful = [], []
    for line, text in enumerate(source.read_bytes().split(b"\n"), start=1):  # U+2028 is no end of a row
        if not text.strip():
            continue
        try:
            made = problem(json_object(decoded(text)))
        except (RowError, Unreadable) as error:
            raise ConfigError(f"{source} line {line} {error}") from None
        rows.append({"messages": made.messages, "tools": made.tools})
        if not states_answer(made):
            doubtful.append(line)
    if not rows:
        raise ConfigError(f"{source} holds no rows")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    target.write_bytes(text.encode("utf-8", "replace"))  # half a surrogate pair, which JSON can write, is no text
    return len(rows), doubtful


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m data.gsm8k IN.jsonl OUT.jsonl")
    try:
        count, doubtful = convert(Path(sys.argv[1]), Path(sys.argv[2]))
        print(f"{count} conversations; the solution never states the answer in lines {doubtful}")
    except (OSError, ConfigError) as error:
        sys.exit(f"error: {error}")
