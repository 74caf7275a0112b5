"""The live loop sees what the training row holds, token for token; tools, counts and bills."""

import re

import pytest

from configs.schema import ConfigError
from data.episodes import Bill, Episode, run_episodes
from data.parse import parse_conversation
from data.problem import check, right_steps
from data.render import KimiRenderer
from data.tasks import TASKS, make_problem
from data.tokenizer import load_tokenizer
from data.tools import Toolbox, arguments_error, calculator, call, decimal_text, exact, key_value, tool, tools_from_file

RENDERER = KimiRenderer(load_tokenizer("bytes"))


def playback(rows, prompts):
    """A model that has memorised training rows: every prompt must be the prefix of one, which then goes on."""

    def reply(prompt):
        prompts.append(prompt)
        row = next(row.ids for row in rows if row.ids[: len(prompt)] == prompt)
        end = row.index(RENDERER.tokenizer.eos_id, len(prompt))
        return row[len(prompt) : end + 1]

    return reply


def run(reply, episode, **settings):
    """One episode with a function from a prompt to a reply."""
    run_episodes(lambda prompts: {0: reply(prompts[0])}, RENDERER, [episode], **settings)
    return episode


@pytest.mark.parametrize("mode", ["interleaved", "preserved"])
@pytest.mark.parametrize("task", TASKS)
def test_the_live_loop_retraces_the_training_rows(task, mode):
    for index, length in enumerate((1, 2, 5, 30)):
        problem = make_problem(task, 0, index, length)
        rows = RENDERER.rows(problem.messages, problem.tools, mode)
        prompts = []
        episode = run(playback(rows, prompts), problem.episode(), mode=mode)
        assert episode.stopped == "done" and episode.answer == problem.answer
        assert episode.messages == list(problem.messages)
        assert check(problem, episode.messages) and right_steps(problem, episode.messages) == len(problem.steps)
        replies = [m for m in problem.messages if m["role"] == "assistant"]
        assert len(prompts) == len(replies)
        trained = sum(row.trained for row in rows)
        assert episode.bill.thinking + episode.bill.answer + episode.bill.tool == trained


def test_episodes_run_side_by_side():
    """Different lengths, one batch of prompts a round, every message shown once."""
    problems = [make_problem(task, 1, 0, length) for task in TASKS for length in (1, 3)]
    rows = [row for p in problems for row in RENDERER.rows(p.messages, p.tools)]
    sizes, shown = [], []

    def generate(prompts):
        sizes.append(len(prompts))
        return {number: playback(rows, [])(prompt) for number, prompt in prompts.items()}

    episodes = [p.episode() for p in problems]
    run_episodes(generate, RENDERER, episodes, watch=shown.append)
    assert all(check(p, e.messages) for p, e in zip(problems, episodes, strict=True))
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == len(problems)
    assert len(shown) == sum(len(p.messages) - len(p.question) for p in problems)


def test_ledger_conserves_money_and_meets_errors():
    errors = 0
    for index in range(30):
        problem = make_problem("ledger", 0, index, 8)
        opening = problem.messages[0]["content"].split()[0]
        deposits = sum(int(order[-1]) for order in problem.messages[0]["content"].split() if "+" in order)
        closing = re.findall(r"\d+", problem.answer)
        assert sum(map(int, closing)) == sum(map(int, re.findall(r"\d", opening))) + deposits
        errors += sum(m["content"].startswith("error") for m in problem.messages)
    assert errors > 10


def test_cut_off_and_unreadable_replies_end_the_episode():
    problem = make_problem("pointer_chase", 0, 0, 3)
    tok = RENDERER.tokenizer
    cut = run(lambda _: tok.encode("no end"), problem.episode())
    assert cut.stopped == "failure" and cut.failures == ["the reply is not finished"]
    assert not check(problem, cut.messages) and cut.answer == ""
    special = tok.special
    broken = [
        special["<think>"],
        special["</think>"],
        special["<|tool_calls_section_begin|>"],
        special["<|tool_call_begin|>"],
        *tok.encode("functions.get:0"),
        special["<|tool_call_argument_begin|>"],
        *tok.encode("{"),
        special["<|tool_call_end|>"],
        special["<|tool_calls_section_end|>"],
        tok.eos_id,
    ]
    episode = run(lambda _: broken, problem.episode())
    assert episode.stopped == "failure" and "not JSON" in episode.failures[0]
    endless = [special["<think>"], special["</think>"], tok.eos_id]
    asking = Episode(problem.question, lambda message: [{"role": "user", "content": "?"}])
    looped = run(lambda _: endless, asking, max_replies=3)
    assert looped.stopped == "limit" and len(looped.messages) == 7


def test_miscounted_calls_are_renumbered():
    problem = make_problem("pointer_chase", 0, 0, 4)
    (row,) = RENDERER.rows(problem.messages, problem.tools)
    right = playback([row], [])

    def generate(prompt):
        ids = right(prompt)
        at = 2 + len("abcdef") + 2 + len("functions.get:")  # two marks, the thought, two marks
        return [*ids[:at], ord("7"), *ids[at + 1 :]] if len(ids) > at else ids  # every call is number 7

    episode = run(generate, problem.episode())
    assert episode.misnumbered == 4 and episode.messages == list(problem.messages) and check(problem, episode.messages)


def test_calculator_is_exact_and_harmless():
    asked = {"role": "assistant", "tool_calls": [call(0, "calculate", expression="0.1+0.2")]}
    assert Toolbox([calculator()]).results(asked)[0]["content"] == "0.3"
    assert exact("2*(3-4)//2 % 7") == 6 and exact("-.5") * 2 == -1
    assert decimal_text(exact("1e999 / 1e999 + 1e-999 * 1e999")) == "2"
    for wrong in (
        "1/0",
        "__import__('os')",
        "2**9999999",
        "a",
        "1+",
        "'a'*9",
        "1 if 1 else 2",
        "(" * 500,
        "1e999999999",
        "1e-999999999",
        "0e999999999",
        "*".join(["1e99"] * 11),
        "9" * 5000,
    ):
        with pytest.raises(ValueError, match="cannot compute"):
            exact(wrong)


def test_what_goes_wrong_becomes_the_result():
    box = Toolbox(key_value({"a": "1"}))
    calls = [
        call(0, "get", key="a"),
        call(1, "get", key="b"),
        call(2, "get"),
        call(3, "got", key="a"),
        call(4, "put", key="c", value=3),
        call(5, "put", key="b", value="\ud8002"),
        call(6, "get", key="b"),
    ]
    results = box.results({"role": "assistant", "tool_calls": calls})
    assert [r["content"] for r in results] == [
        "1",
        "error: 'no key b'",
        "error: key is missing",
        "error: no tool got; there are get, put",
        "error: value is integer, not string",
        "ok",
        "?2",
    ]
    assert [r["tool_call_id"] for r in results][:2] == ["functions.get:0", "functions.get:1"]
    assert (box.counts.made, box.counts.unfit, box.counts.failed) == (7, 3, 1)
    assert box.counts.valid_share == 4 / 7


def test_tools_from_functions():
    def book(city: str, nights: int = 1) -> str:
        """Book a room.

        More words."""
        return f"{city} {nights}"

    made = tool(book)
    assert made.declaration == {
        "type": "function",
        "function": {
            "name": "book",
            "description": "Book a room.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "nights": {"type": "integer"}},
                "required": ["city"],
            },
        },
    }
    assert arguments_error(made.parameters, {"city": "Rome", "nights": True}) == "nights is boolean, not integer"
    assert arguments_error(made.parameters, {"city": "Rome", "day": 1}) == "day is not an argument"
    assert Toolbox([made]).results({"tool_calls": [call(0, "book", city="Rome")]})[0]["content"] == "Rome 1"
    with pytest.raises(ConfigError, match="annotate x"):
        tool(lambda x: x)


def test_tools_of_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from json import dumps\ndef double(x: int) -> str:\n    'Twice x.'\n    return dumps([2 * x])\ndef _hidden(): pass\n"
    )
    box = Toolbox(tools_from_file(path))
    assert list(box.tools) == ["double"]
    assert box.results({"tool_calls": [call(0, "double", x=4)]})[0]["content"] == "[8]"
    for content, words in (
        ("x = 1", "no public function"),
        ("import nowhere_", "No module"),
        ("def f(x): 1", "annotate x"),
        ("def f(x: 'y'): 1", "tool f: name 'y' is not defined"),
    ):
        path.write_text(content)
        with pytest.raises(ConfigError, match=words):
            tools_from_file(path)


def test_bill_splits_thinking_answer_and_tool():
    problem = make_problem("pointer_chase", 0, 0, 1)
    (row,) = RENDERER.rows(problem.messages, problem.tools)
    bill = Bill()
    bill.add([i for i, w in zip(row.ids, row.weights) if w], RENDERER.tokenizer.special)
    assert bill.thinking == 2 + 6 + 2 + 2  # two marks around a key of six letters, then around `=` and a digit
    assert bill.answer == 1 + 2  # the digit, two ends of message
    assert bill.tool == row.trained - 15


def test_in_a_small_context_calls_are_counted_as_shown():
    """A solver that numbers its calls from what it sees: every prompt is a conversation of its own, counted from 0."""
    problem = make_problem("pointer_chase", 0, 0, 30)
    right = [message for message in problem.messages if message["role"] == "assistant"]
    counts = []

    def reply(prompt):
        assert len(prompt) <= 600
        messages, _ = parse_conversation(prompt, RENDERER.tokenizer)
        shown = [made["id"] for message in messages for made in message.get("tool_calls", ())]
        assert shown == [f"functions.get:{i}" for i in range(len(shown))]
        message = right[len(counts)]
        counts.append(len(shown))
        if message.get("tool_calls"):
            message = message | {"tool_calls": [message["tool_calls"][0] | {"id": f"functions.get:{len(shown)}"}]}
        (row,) = RENDERER.rows([{"role": "user", "content": ""}, message], mode="preserved")
        return [i for i, weight in zip(row.ids, row.weights) if weight]

    episode = run(reply, problem.episode(), context=600)
    assert episode.stopped == "done" and episode.misnumbered == 0 and check(problem, episode.messages)
    assert episode.messages == list(problem.messages), "the record counts over the whole conversation"
    assert 3 <= max(counts) <= 5
