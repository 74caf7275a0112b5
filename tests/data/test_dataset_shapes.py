"""Rows in the shapes that public tool-use sets and benchmarks have (contents are ours): read rightly, or refused by name."""

import json

import pytest

from data.messages import RowError, conversation
from data.parse import parse_conversation
from data.render import KimiRenderer
from data.tokenizer import load_tokenizer

RENDERER = KimiRenderer(load_tokenizer("bytes"))

CANCEL = {
    "type": "function",
    "function": {
        "name": "cancel_booking",
        "description": "Cancel one.",
        "parameters": {"type": "object", "properties": {"booking": {"type": "string"}}, "required": ["booking"]},
    },
}


def booking(*, flat=False, **more):
    """A call as OpenAI writes it, or without the wrapper, as tau2-bench and LangChain do."""
    return more | (
        {"name": "cancel_booking"}
        if flat
        else {"type": "function", "function": {"name": "cancel_booking", "arguments": '{"booking": "XK2"}'}}
    )


EXPECTED = [
    {"role": "user", "content": "Cancel XK2, please. <|im_end|>"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "functions.cancel_booking:0",
                "type": "function",
                "function": {"name": "cancel_booking", "arguments": '{"booking": "XK2"}'},
            }
        ],
    },
    {
        "role": "tool",
        "content": '{"status": "cancelled"}',
        "tool_call_id": "functions.cancel_booking:0",
        "name": "cancel_booking",
    },
    {"role": "assistant", "content": "It is cancelled."},
]


def openai(first_call, result, **more):
    """The conversation above; `more` stands in every message, as dumps of client objects have it."""
    messages = [
        {"role": "user", "content": "Cancel XK2, please. <|im_end|>"},
        {"role": "assistant", "content": None, "tool_calls": [first_call]},
        {"role": "tool"} | result,
        {"role": "assistant", "content": "It is cancelled."},
    ]
    return {"messages": [more | message for message in messages], "tools": [CANCEL]}


def sharegpt(human, gpt, call_role, result_role, role="from", text="value", field="conversations"):
    turns = [
        (human, "Cancel XK2, please. <|im_end|>"),
        (call_role, '{"name": "cancel_booking", "arguments": {"booking": "XK2"}}'),
        (result_role, '{"status": "cancelled"}'),
        (gpt, "It is cancelled."),
    ]
    return {field: [{role: who, text: what} for who, what in turns], "tools": json.dumps([CANCEL["function"]])}


DONE = '{"status": "cancelled"}'
SHAPES = {
    "tau-bench": openai(
        booking(id="call_Zq9"),
        {"tool_call_id": "call_Zq9", "name": "cancel_booking", "content": DONE},
        function_call=None,
        tool_calls=None,
        refusal=None,
        annotations=[],
        audio=None,
    ),
    "tau2-bench": openai(
        booking(flat=True, id="call_1", arguments={"booking": "XK2"}, requestor="assistant"),
        {"id": "call_1", "content": DONE, "requestor": "assistant", "error": False},
        turn_idx=0,
        cost=0.0,
    ),
    "BFCL": openai(booking(), {"content": {"status": "cancelled"}}) | {"tools": [CANCEL["function"]]},
    "LangChain": openai(
        booking(flat=True, id="c", args={"booking": "XK2"}, type="tool_call"),
        {"tool_call_id": "c", "content": DONE, "status": "success"},
    ),
    "APIGen-MT": sharegpt("human", "gpt", "function_call", "observation"),
    "ms-swift": sharegpt("user", "assistant", "tool_call", "tool_response", "role", "content", "messages"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_conversation_in_every_shape(shape):
    talk = conversation(SHAPES[shape])
    assert talk.messages == EXPECTED and not talk.remarks
    (row,) = RENDERER.rows(talk.messages, talk.tools)
    messages, tools = parse_conversation(row.ids, RENDERER.tokenizer)
    assert [m["content"] for m in messages] == [m["content"] for m in EXPECTED] and tools == [CANCEL | {"type": "function"}]
    trained = RENDERER.tokenizer.decode([i for i, weight in zip(row.ids, row.weights) if weight])
    assert trained == (
        "<think></think><|tool_calls_section_begin|><|tool_call_begin|>functions.cancel_booking:0"
        '<|tool_call_argument_begin|>{"booking": "XK2"}<|tool_call_end|><|tool_calls_section_end|><|im_end|>'
        "<think></think>It is cancelled.<|im_end|>"
    )


@pytest.mark.parametrize(
    "row",
    [
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "two at once"},
                {"from": "function_call", "value": '{"name": "f"}'},
                {"from": "function_call", "value": '{"name": "g"}'},
                {"from": "observation", "value": "1"},
                {"from": "observation", "value": "2"},
            ]
        },
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "two at once"},
                {"from": "function_call", "value": '[{"name": "f"}, {"name": "g"}]'},
                {"from": "observation", "value": "1"},
                {"from": "observation", "value": "2"},
            ]
        },
    ],
)
def test_calls_in_a_row_are_parallel(row):
    _, made, first, second = conversation(row).messages
    assert made["content"] == "two at once" and [c["id"] for c in made["tool_calls"]] == ["functions.f:0", "functions.g:1"]
    assert (first["name"], first["content"], second["name"], second["content"]) == ("f", "1", "g", "2")


def test_a_switched_off_call_keeps_its_turn_out_of_the_loss():
    row = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": "hm"},
            {"from": "function_call", "value": '{"name": "f"}', "train": False},
        ]
    }
    assert conversation(row).messages[1]["train"] is False


USER_CALLS = {"role": "user", "content": None, "tool_calls": [booking(flat=True, id="u", arguments={})]}


@pytest.mark.parametrize(
    "row, words",
    [
        ({"messages": [USER_CALLS, EXPECTED[-1]]}, "message 1: has tool_calls, but only an assistant calls tools, not a user"),
        (
            {
                "conversations": [
                    {"from": "user", "value": "q"},
                    {"from": "assistant", "value": "Action: f\nAction Input: {}"},
                    {"from": "function", "value": "1"},
                ]
            },
            r"message 3: .*a call .*from fields, not",
        ),  # ToolBench
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "f", "input": {}}]}]},
            "a part of type tool_use, which is not text",
        ),  # Anthropic
        (SHAPES["BFCL"] | {"tools": [{"parameters": {}}]}, "tool 1 has no name"),
        (SHAPES["BFCL"] | {"tools": [CANCEL, {"type": "function", "function": "f"}]}, "tool 2 has no name"),
        ({"messages": [*EXPECTED[:3], EXPECTED[2]]}, "message 4: is a second result of call 'functions.cancel_booking:0'"),
        ({"messages": [EXPECTED[0], EXPECTED[-1] | {"weight": 0.5}]}, "message 2: weight is 0.5; a message is trained or not"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a b"}}]}]},
            "'a b' of a called function holds",
        ),
        ({"conversations": [{"from": "gpt", "value": '<tool_call>{"name": "f"}'}]}, "a <tool_call> without its other end"),
        (
            {"conversations": [{"from": "gpt", "value": '<tool_call>{"name": "f"}</tool_call>', "tool_calls": [{"name": "g"}]}]},
            "has calls in tags and in tool_calls",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f"}], "function_call": {"name": "g"}}]},
            "has tool_calls and a function_call",
        ),
        (
            {"messages": [EXPECTED[-1] | {"reasoning_content": "a", "thinking": "b"}]},
            "different thoughts in reasoning_content and thinking",
        ),
    ],
)
def test_refused_by_name(row, words):
    with pytest.raises(RowError, match=words):
        conversation(row)


@pytest.mark.parametrize(
    "row, words",
    [
        (SHAPES["BFCL"] | {"tools": [{"name": "other"}]}, "calls cancel_booking without declaring it"),
        ({"messages": [EXPECTED[0], {"role": "assistant", "content": None}]}, "message 2 says nothing"),
        ({"system": "s", "messages": [{"role": "system", "content": "t"}, EXPECTED[-1]]}, "begin with another one"),
    ],
)
def test_remarked_upon(row, words):
    (remark,) = conversation(row).remarks
    assert words in remark


def test_what_is_no_half_call_is_text():
    answer = {"from": "gpt", "value": "In XML the <tool_call> tag opens a call."}
    assert conversation({"conversations": [answer]}).messages[0]["content"] == answer["value"]
    parts = {"role": "system", "content": [{"type": "text", "text": "s"}]}
    assert not conversation({"system": "s", "messages": [parts, EXPECTED[-1]]}).remarks


def test_an_empty_thought_hides_none():
    (message,) = conversation({"messages": [EXPECTED[-1] | {"reasoning_content": " \n", "reasoning": "hm"}]}).messages
    assert message["reasoning_content"] == "hm"
