"""parse(render(m)) = m, and lenient reading of what models really write."""

import json
import random

import pytest

from data.parse import parse_conversation, parse_ids, parse_text
from data.render import KimiRenderer
from data.tokenizer import SPECIAL_NAMES, load_tokenizer

TOKENIZER = load_tokenizer("bytes")
RENDERER = KimiRenderer(TOKENIZER)
WORDS = [
    "",
    " ",
    "\n",
    "word",
    "ünï",
    "漢字",
    "🙂",
    '{"a": [1, "x\\n"]}',
    "## Return of functions.f:0\n",
    *SPECIAL_NAMES,
    "<|tool_call_section_begin|>",
    "\u2028",
    "\\",
    "\x00",
]


def random_conversation(rng):
    """Canonical messages with every feature: names, thoughts, parallel calls, look-alikes, nested arguments."""

    def text(least=0):
        return "".join(rng.choice(WORDS) for _ in range(rng.randint(least, 4)))

    def value(depth=0):
        kinds = [lambda: text(), lambda: rng.randint(-9, 9), lambda: None, lambda: True, lambda: rng.random()]
        if depth < 2:
            kinds += [lambda: [value(depth + 1) for _ in range(2)], lambda: {text(): value(depth + 1)}]
        return rng.choice(kinds)()

    messages, calls = [], 0
    if rng.random() < 0.3:
        messages.append({"role": "system", "content": text()})
    for _ in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": text()})
        if rng.random() < 0.2:
            messages[-1]["name"] = "Ann"
        for _ in range(rng.randint(0, 3)):
            made = []
            for _ in range(rng.randint(1, 3)):
                name = rng.choice(["f", "get_it", "a-b.c", "x:1"])
                arguments = json.dumps({text(1): value()}, ensure_ascii=rng.random() < 0.5)
                made.append(
                    {"id": f"functions.{name}:{calls}", "type": "function", "function": {"name": name, "arguments": arguments}}
                )
                calls += 1
            messages.append({"role": "assistant", "content": text(), "tool_calls": made})
            if thoughts := text():
                messages[-1]["reasoning_content"] = thoughts
            messages += [
                {"role": "tool", "content": text(), "tool_call_id": c["id"], "name": c["function"]["name"]} for c in made
            ]
        messages.append({"role": "assistant", "content": text()})
        if thoughts := text():
            messages[-1]["reasoning_content"] = thoughts
    tools = [{"type": "function", "function": {"name": "f", "description": text()}}] if rng.random() < 0.5 else []
    return messages, tools


def test_parse_inverts_render():
    rng = random.Random(0)
    for _ in range(1000):
        messages, tools = random_conversation(rng)
        (row,) = RENDERER.rows(messages, tools, "preserved")
        assert parse_conversation(row.ids, TOKENIZER) == (messages, tools)


def test_every_prompt_is_a_prefix_and_every_reply_parses():
    """Step k of a live loop: the prompt is the training row's prefix, what is trained next is exactly the reply."""
    rng = random.Random(1)
    for _ in range(200):
        messages, tools = random_conversation(rng)
        rows = iter(RENDERER.rows(messages, tools))
        row = next(rows)
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = RENDERER.prompt(messages[:index], tools)
            if index >= row.end:
                row = next(rows)
            assert row.ids[: len(prompt)] == prompt
            assert not any(row.weights[len(prompt) - 1 : len(prompt)])
            end = len(prompt) + row.ids[len(prompt) :].index(TOKENIZER.eos_id) + 1
            reply = parse_ids(row.ids[len(prompt) : end], TOKENIZER)
            assert reply.finished and not reply.failures and reply.message() == message
            assert all(row.weights[len(prompt) : end])
        assert next(rows, None) is None


CALL = '<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"a": 1}<|tool_call_end|>'


@pytest.mark.parametrize(
    "text, reasoning, content, calls, failures",
    [
        ("<think>a</think>b<|im_end|>", "a", "b", 0, []),
        ("b<|im_end|>", "", "b", 0, []),
        (f"<think>a<|tool_calls_section_begin|>{CALL}<|tool_calls_section_end|><|im_end|>", "a", "", 1, []),
        (f"<think>a</think><|tool_call_section_begin|>{CALL}<|tool_call_section_end|><|im_end|>", "a", "", 1, []),
        (f"<|tool_calls_section_begin|>{CALL}\n{CALL.replace(':0', ':1')}<|tool_calls_section_end|>", "", "", 2, []),
        (f"<|tool_calls_section_begin|>{CALL}<|im_end|>", "", "", 1, ["the section of calls is not closed"]),
        (
            f"<|tool_calls_section_begin|>{CALL[:-5]}",
            "",
            "",
            0,
            ["call 'functions.f:0' is cut off", "the section of calls is not closed"],
        ),
        (f"<|tool_calls_section_begin|>{CALL.replace('1}', '1')}<|tool_calls_section_end|>", "", "", 0, ["not JSON"]),
        (
            f"<|tool_calls_section_begin|>{CALL.replace('functions.f:0', 'call_1')}<|tool_calls_section_end|>",
            "",
            "",
            0,
            ["not functions.NAME:INDEX"],
        ),
        (
            "<|tool_calls_section_begin|>" + CALL.replace('{"a": 1}', "[1]") + "<|tool_calls_section_end|>",
            "",
            "",
            0,
            ["not a JSON object"],
        ),
        *(
            (f"<|tool_calls_section_begin|>{CALL.replace('1}', arguments)}<|tool_calls_section_end|>", "", "", calls, failures)
            for arguments, calls, failures in (
                ("[" * 10**5, 0, ["too deep to read"]),
                ("9" * 5000 + "}", 0, ["number too long"]),
                ("[" * 100 + "]" * 100 + "}", 0, ["nested more than 100 deep"]),
                ("[" * 99 + "]" * 99 + "}", 1, []),
            )
        ),
        ("<think>never closed", "never closed", "", 0, []),
    ],
)
def test_text_of_other_engines(text, reasoning, content, calls, failures):
    reply = parse_text(text)
    assert (reply.reasoning, reply.content, len(reply.calls)) == (reasoning, content, calls)
    assert len(reply.failures) == len(failures) and all(part in got for part, got in zip(failures, reply.failures))
    assert reply.finished == text.endswith("<|im_end|>")


def test_rows_that_are_none():
    with pytest.raises(ValueError, match="not with a role token"):
        parse_conversation(TOKENIZER.encode("hello"), TOKENIZER)
    ids = RENDERER.prompt([{"role": "user", "content": "x"}])
    with pytest.raises(ValueError, match="is not closed"):
        parse_conversation(ids[:5], TOKENIZER)


@pytest.mark.parametrize(
    "section, calls, unreadable",
    [
        (CALL, 1, 0),  # a sound call in a section that is not closed
        ("<|tool_call_begin|>functions.f:0", 0, 1),
        (f"{CALL}<|tool_call_begin|>functions.f:0", 1, 1),
        ("f(1)<|tool_calls_section_end|>", 0, 1),
        ("", 0, 1),
        ("<|tool_calls_section_end|>", 0, 0),
    ],
)
def test_a_call_is_attempted_once(section, calls, unreadable):
    """However many sentences say what is wrong with it."""
    reply = parse_text(f"<|tool_calls_section_begin|>{section}")
    assert (len(reply.calls), reply.unreadable) == (calls, unreadable)
