"""Golden renderings and masks, written out by hand from K2-Thinking's rules."""

import json
from pathlib import Path

import numpy as np

from data.render import KimiRenderer, LossWeights
from data.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer("bytes")
CALL = {"id": "functions.add:0", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "reasoning_content": "use it", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "functions.add:0", "name": "add", "content": "2"},
    {"role": "assistant", "reasoning_content": "done", "content": "two"},
    {"role": "user", "content": "more <|im_end|>"},
    {"role": "assistant", "reasoning_content": "last", "content": "bye"},
]
ADD = [{"type": "function", "function": {"name": "add", "description": "ü"}}]
A = "<|im_assistant|>assistant<|im_middle|>"
USER = "<|im_user|>user<|im_middle|>hi<|im_end|>"
CALLED = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.add:0<|tool_call_argument_begin|>"
    '{"a":1}<|tool_call_end|><|tool_calls_section_end|><|im_end|>'
)
RESULT = "<|im_system|>add<|im_middle|>## Return of functions.add:0\n2<|im_end|>"


def trained(row):
    """Text of the trained tokens, a bar for every gap."""
    out, last = "", True
    for i, w in zip(row.ids, row.weights):
        out += TOKENIZER.decode([i]) if w else "" if not last else "|"
        last = bool(w)
    return out.strip("|")


def test_interleaved_rows():
    first, second = KimiRenderer(TOKENIZER).rows(TALK)
    assert TOKENIZER.decode(first.ids) == (
        USER + A + "<think>use it</think>" + CALLED + RESULT + A + "<think>done</think>two<|im_end|>"
    )
    assert trained(first) == "<think>use it</think>" + CALLED + "|<think>done</think>two<|im_end|>"
    assert TOKENIZER.decode(second.ids) == (
        USER
        + A
        + "<think></think>"
        + CALLED
        + RESULT
        + A
        + "<think></think>two<|im_end|>"
        + "<|im_user|>user<|im_middle|>more <|im_end|><|im_end|>"
        + A
        + "<think>last</think>bye<|im_end|>"
    )
    assert trained(second) == "<think>last</think>bye<|im_end|>"
    assert second.ids.count(TOKENIZER.eos_id) == 6, "the user's look-alike is plain text"


def test_other_modes():
    renderer = KimiRenderer(TOKENIZER)
    (row,) = renderer.rows(TALK, mode="preserved")
    assert trained(row) == (
        "<think>use it</think>" + CALLED + "|<think>done</think>two<|im_end|>|<think>last</think>bye<|im_end|>"
    )
    (last,) = renderer.rows(TALK, mode="last_segment")
    assert last == renderer.rows(TALK)[1]


def test_prompt_is_the_prefix_of_the_row():
    for mode in ("interleaved", "preserved"):
        renderer = KimiRenderer(TOKENIZER, system="Be brief.")
        rows = renderer.rows(TALK, ADD, mode)
        for index, message in enumerate(TALK):
            if message["role"] == "assistant":
                prompt = renderer.prompt(TALK[:index], ADD, mode)
                row = rows[0] if mode == "preserved" or index < 4 else rows[1]
                assert row.ids[: len(prompt)] == prompt


def test_declaration_and_system_message():
    text = TOKENIZER.decode(KimiRenderer(TOKENIZER, system="Be brief.").prompt(TALK[:1], ADD))
    declared = '[{"function":{"description":"ü","name":"add"},"type":"function"}]'
    assert text == (
        "<|im_system|>tool_declare<|im_middle|>"
        + declared
        + "<|im_end|><|im_system|>system<|im_middle|>Be brief.<|im_end|>"
        + USER
        + A
    )
    own = [{"role": "system", "content": "Mine."}, *TALK[:1]]
    text = TOKENIZER.decode(KimiRenderer(TOKENIZER, system="Be brief.").prompt(own))
    assert text == "<|im_system|>system<|im_middle|>Mine.<|im_end|>" + USER + A


def test_weights_per_part_and_untrained_messages():
    renderer = KimiRenderer(TOKENIZER, weights=LossWeights(think=0.5, content=2.0, tool=0.0))
    row = renderer.rows(TALK)[0]
    by_weight = {w: TOKENIZER.decode([i for i, v in zip(row.ids, row.weights) if v == w]) for w in set(row.weights)}
    assert by_weight[0.5] == "<think>use it</think><think>done</think>" and by_weight[2.0] == "two"
    assert by_weight[1.0] == "<|im_end|><|im_end|>"
    muted = [dict(m, train=False) if m["role"] == "assistant" else m for m in TALK]
    assert KimiRenderer(TOKENIZER).rows(muted) == []


def test_content_of_parts_or_nothing():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    for content, expected in ((None, ""), ([], ""), (parts, "ab")):
        ids = KimiRenderer(TOKENIZER).prompt([{"role": "user", "content": content}])
        assert TOKENIZER.decode(ids) == f"<|im_user|>user<|im_middle|>{expected}<|im_end|>" + A
    assert np.all(np.array(KimiRenderer(TOKENIZER).rows(TALK)[0].weights) <= 1)


def test_golden_prompts():
    """50 conversations whose text was, when the file was made, byte for byte what Kimi-K2-Thinking's published template
    gives, with tools declared as Moonshot's own code does (keys sorted, no spaces)."""
    lines = (Path(__file__).parent / "golden_prompts.jsonl").read_text().splitlines()
    assert len(lines) == 50
    for case in map(json.loads, lines):
        prompt = KimiRenderer(TOKENIZER).prompt(case["messages"], case["tools"])
        assert TOKENIZER.decode(prompt) == case["text"]
