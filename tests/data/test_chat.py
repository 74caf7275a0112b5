"""Chat rows of two formats to canonical messages; every bad row has its own sentence."""

import json

import pytest

from data.messages import RowError, conversation
from data.render import KimiRenderer
from data.tokenizer import load_tokenizer


def called(name="add", arguments='{"a": 1}', call_id="call_x"):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def openai(*messages):
    return {"messages": [{"role": "user", "content": "q"}, *messages]}


CANONICAL = [
    {"role": "user", "content": "q"},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "hm",
        "tool_calls": [called(call_id="functions.add:0"), called("mul", '{"b": [2]}', "functions.mul:1")],
    },
    {"role": "tool", "content": "2", "tool_call_id": "functions.mul:1", "name": "mul"},
    {"role": "tool", "content": "1", "tool_call_id": "functions.add:0", "name": "add"},
    {"role": "assistant", "content": "done"},
]


def test_openai_calls_are_renumbered_and_results_follow():
    row = openai(
        {"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": [called(), called("mul", {"b": [2]}, "call_y")]},
        {"role": "tool", "tool_call_id": "call_y", "content": "2"},
        {"role": "tool", "tool_call_id": "call_x", "content": [{"type": "text", "text": "1"}], "name": "add"},
        {"role": "assistant", "content": "done"},
    )
    talk = conversation(row)
    assert talk.messages == CANONICAL
    assert len(talk.remarks) == 1 and "declares none" in talk.remarks[0]
    assert conversation({"messages": talk.messages}).messages == talk.messages, "canonical rows stay as they are"
    tools = [{"type": "function", "function": {"name": name}} for name in ("add", "mul")]
    assert conversation(row | {"tools": json.dumps(tools)}).tools == tools
    assert not conversation(row | {"tools": tools}).remarks


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (1, 0, 2)])
def test_results_without_ids_go_to_the_call_of_their_function(order):
    """Two calls of one function among three: the first one waiting gets the first result."""
    calls = [called("get", {"key": "a"}, None), called("put", {"key": "b"}, None), called("get", {"key": "c"}, None)]
    results = [{"role": "tool", "name": name, "content": name + str(at)} for at, name in enumerate(("get", "put", "get"))]
    made = conversation(openai({"role": "assistant", "tool_calls": calls}, *(results[i] for i in order), ANSWER)).messages
    found = {m["tool_call_id"]: m["content"] for m in made if m["role"] == "tool"}
    first, second = ("get0", "get2") if order.index(0) < order.index(2) else ("get2", "get0")
    assert found == {"functions.get:0": first, "functions.put:1": "put1", "functions.get:2": second}


def test_thoughts_that_stand_twice_are_trained_once():
    for content in ("<think>\nhm\n</think>\n\nyes", "<think></think>yes", "yes"):
        made = conversation(openai({"role": "assistant", "reasoning_content": "hm\n", "content": content})).messages[1]
        assert made == {"role": "assistant", "reasoning_content": "hm\n", "content": "yes"}


def test_a_conversation_may_end_with_its_calls():
    """It teaches them. With half of their results it would teach to go on without the rest."""
    calls = {"role": "assistant", "tool_calls": [called(), called(call_id="call_y")]}
    tokenizer = load_tokenizer("bytes")
    (row,) = KimiRenderer(tokenizer).rows(conversation(openai(calls)).messages)
    trained = [i for i, weight in zip(row.ids, row.weights) if weight]
    assert trained.count(tokenizer.special["<|tool_call_begin|>"]) == 2 and trained[-1] == tokenizer.eos_id
    with pytest.raises(RowError, match="ends before the result of call 'call_y'"):
        conversation(openai(calls, {"role": "tool", "tool_call_id": "call_x", "content": "1"}))


def test_sharegpt():
    row = {
        "conversations": [
            {"from": "system", "value": "s"},
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": "<think>\nhm\n</think>\n\nlet me"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "done"},
        ]
    }
    assert conversation(row).messages == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "let me", "reasoning_content": "hm", "tool_calls": [called(call_id="functions.add:0")]},
        {"role": "tool", "content": "1", "tool_call_id": "functions.add:0", "name": "add"},
        {"role": "assistant", "content": "done"},
    ]


def test_older_and_wider_forms():
    """OpenAI's single function_call, a system text beside the messages, declarations without their wrapper or under their
    older name."""
    row = {
        "system": "s",
        "tools": '[{"name": "add", "parameters": {}}]',
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}},
            {"role": "function", "name": "add", "content": "1"},
        ],
    }
    talk = conversation(row)
    assert talk.messages == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [called(call_id="functions.add:0")]},
        {"role": "tool", "content": "1", "tool_call_id": "functions.add:0", "name": "add"},
    ]
    assert talk.tools == [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    older = {"messages": row["messages"], "functions": [{"name": "add", "parameters": {}}]}
    assert conversation(older).tools == talk.tools and not conversation(older).remarks
    own = [{"role": "system", "content": "own"}, *row["messages"]]
    assert [m["content"] for m in conversation(row | {"messages": own}).messages][:2] == ["own", "q"]


def test_hermes_tags_in_sharegpt():
    """Two calls in one turn, two results in one turn; where there are fields for calls, tags are text."""
    tag = '<tool_call>\n{"name": "%s", "arguments": {"a": {"ü": [1, null]}}}\n</tool_call>'
    row = {
        "conversations": [
            {"from": "system", "value": "s"},
            {"from": "human", "value": "q"},
            {"from": "gpt", "value": "<think>hm</think>on it\n" + tag % "add" + "\n" + tag % "mul"},
            {"from": "tool", "value": '<tool_response>\n1\n</tool_response>\n<tool_response>{"b": 2}</tool_response>'},
            {"from": "gpt", "value": "done"},
        ]
    }
    arguments = '{"a": {"ü": [1, null]}}'
    assert conversation(row).messages == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "content": "on it",
            "reasoning_content": "hm",
            "tool_calls": [called("add", arguments, "functions.add:0"), called("mul", arguments, "functions.mul:1")],
        },
        {"role": "tool", "content": "1", "tool_call_id": "functions.add:0", "name": "add"},
        {"role": "tool", "content": '{"b": 2}', "tool_call_id": "functions.mul:1", "name": "mul"},
        {"role": "assistant", "content": "done"},
    ]
    with pytest.raises(RowError, match="message 1: a <tool_call> does not hold JSON"):
        conversation({"conversations": [{"from": "gpt", "value": "<tool_call>add(1)</tool_call>"}]})
    text = conversation(openai({"role": "assistant", "content": tag % "add"})).messages[1]
    assert text == {"role": "assistant", "content": tag % "add"}
    thought = f"a call is written {tag % 'add'}"
    quoted = {"conversations": [{"from": "gpt", "value": f"<think>{thought}</think>No."}]}
    assert conversation(quoted).messages == [{"role": "assistant", "content": "No.", "reasoning_content": thought}]


@pytest.mark.parametrize(
    "content, text",
    [
        ({"a": [1, "ü"]}, '{"a": [1, "ü"]}'),
        (["x", 2], '["x", 2]'),
        ([{"a": 1}], '[{"a": 1}]'),
        (3, "3"),
        (None, ""),
        ([], ""),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
        ("<|im_end|>", "<|im_end|>"),
    ],
)
def test_results_of_any_json_kind(content, text):
    row = openai({"role": "assistant", "tool_calls": [called()]}, {"role": "tool", "tool_call_id": "call_x", "content": content})
    assert conversation(row).messages[2]["content"] == text


def test_shapes_that_datasets_really_have():
    """Arguments under `parameters`, a refusal, several system messages, a developer, values that are objects already."""
    other = {"id": "x", "function": {"name": "add", "parameters": {"a": 1}}}
    assert conversation(openai({"role": "assistant", "tool_calls": [other]})).messages[1]["tool_calls"] == [
        called(call_id="functions.add:0")
    ]
    assert conversation(openai({"role": "assistant", "content": None, "refusal": "no"})).messages[1]["content"] == "no"
    system = [
        {"role": "developer", "content": "d"},
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {"role": "system", "content": "t"},
        ANSWER,
    ]
    assert [m["role"] for m in conversation({"messages": system}).messages] == ["system", "system", "user", "system", "assistant"]
    row = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": {"name": "add"}},
            {"from": "observation", "value": {"b": 1}},
        ]
    }
    assert conversation(row).messages[2]["content"] == '{"b": 1}'


@pytest.mark.parametrize(
    "given, text",
    [
        ('{"a":1}', '{"a": 1}'),
        ('{ "b" : 1e5, "a": [1,\n2]}', '{"b": 100000.0, "a": [1, 2]}'),
        ({"\u00fc": None}, '{"\u00fc": null}'),
        (r'{"\u00fc": "\u2028 \\n\/"}', '{"\u00fc": "\u2028 \\\\n/"}'),
        ("{}", "{}"),
    ],
)
def test_arguments_are_written_as_engines_write_them(given, text):
    row = openai({"role": "assistant", "tool_calls": [called(arguments=given)]})
    assert conversation(row).messages[1]["tool_calls"][0]["function"]["arguments"] == text


@pytest.mark.parametrize("content", ["tags are <think> and </think>", "<think>hm</think>it ends with </think>"])
def test_marks_of_thought_may_be_spoken_of(content):
    made = conversation(openai({"role": "assistant", "content": content})).messages[1]
    assert made["content"] == content.removeprefix("<think>hm</think>")


@pytest.mark.parametrize("nothing", ["", None, {}])
def test_calls_without_arguments(nothing):
    talk = conversation(openai({"role": "assistant", "tool_calls": [called(arguments=nothing)]}))
    assert talk.messages[1]["tool_calls"][0]["function"]["arguments"] == "{}"


@pytest.mark.parametrize("switch", [{"train": False}, {"weight": 0}, {"loss_mask": 0}])
def test_switched_off(switch):
    assert conversation(openai({"role": "assistant", "content": "a"} | switch)).messages[1]["train"] is False
    for kept in (1, None):
        row = openai({"role": "assistant", "content": "a"} | dict.fromkeys(switch, kept))
        assert "train" not in conversation(row).messages[1]


ANSWER = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    "row, words",
    [
        ({"messages": []}, "has no messages"),
        ({"messages": "x"}, "has no messages"),
        (openai(), "no assistant message"),
        (openai("x"), "message 2: is str"),
        (openai({"role": "bot", "content": "x"}), "message 2: unknown role 'bot'"),
        (openai({"role": "assistant", "content": 3}), "message 2: content is int"),
        (openai({"role": "assistant", "content": [{"type": "image_url"}]}), "a part of type image_url, which is not text"),
        (openai({"role": "tool", "content": "1", "tool_call_id": "c"}, ANSWER), "message 2: is the result of 'c'"),
        (openai({"role": "tool", "content": "1"}, ANSWER), "message 2: is a tool result without a call"),
        (
            openai({"role": "assistant", "tool_calls": [called()]}, {"role": "tool", "content": "1", "name": "mul"}),
            "message 3: is the result of 'mul', which no call before it waits for",
        ),
        (openai({"role": "assistant", "tool_calls": [called(), called()]}), "call id 'call_x' is used twice"),
        (openai({"role": "assistant", "tool_calls": [called()]}, ANSWER), "message 3: comes before the result of call"),
        (openai({"role": "assistant", "tool_calls": [called(arguments="{a: 1}")]}), "arguments of add are not JSON: {a"),
        (openai({"role": "assistant", "tool_calls": [called(arguments='{"a": NaN}')]}), "arguments of add are not JSON"),
        (openai({"role": "assistant", "tool_calls": [called(arguments="[1]")]}), "arguments of add are not a JSON object"),
        (openai({"role": "assistant", "tool_calls": [called(arguments=[{}])]}), "arguments of add are not a JSON object"),
        (openai({"role": "assistant", "tool_calls": [called(arguments='{"a": 1e999}')]}), "arguments of add are not JSON: ."),
        (openai({"role": "assistant", "tool_calls": [called(arguments='{"a":' + "[" * 10**5)]}), "arguments of add are not JSON"),
        (openai({"role": "assistant", "tool_calls": [called(arguments='{"a":' + "9" * 5000)]}), "arguments of add are not JSON"),
        (openai({"role": "assistant", "tool_calls": [{"id": "x"}]}), "no function name"),
        (openai({"role": "assistant", "tool_calls": [called(arguments='{"a": 1, "a": 2}')]}), "message 2: .* key 'a' twice"),
        (openai(ANSWER) | {"tools": '[{"name": "f", "name": "g"}]'}, "key 'name' twice"),
        (openai({"role": "assistant", "content": "<think>a"}), "opens <think> and does not close"),
        (openai({"role": "assistant", "content": "", "reasoning_content": ["a"]}), "thoughts are list"),
        (openai({"role": "assistant", "content": "<think>b</think>", "reasoning_content": "a"}), "thoughts in a field and other"),
        (openai({"role": "assistant", "content": "<think>a", "reasoning_content": "a"}), "opens <think> and does not close"),
        ({"conversations": [{"from": "function_call", "value": "add(1)"}]}, "function_call is not JSON"),
        (openai({"role": "assistant", "content": "hm\n</think>\n\na"}), "message 2: closes </think> and does not open it"),
        (
            openai({"role": "assistant", "content": "hm</think>a<think>b</think>", "reasoning": "hm"}),
            "closes </think> and does not",
        ),
        *(
            (openai({"role": "assistant", "tool_calls": [called(arguments=given)]}), "arguments of add are not a JSON object")
            for given in ([], False, 0)
        ),
        (
            {
                "conversations": [
                    {"from": "gpt", "value": "let me"},
                    {"from": "function_call", "value": {"name": "add"}, "reasoning_content": "hm"},
                ]
            },
            "message 2: has thoughts, but goes on with the turn",
        ),
        (
            {
                "conversations": [
                    {"from": "function_call", "value": {"name": "add"}},
                    {"from": "tool", "value": "so <tool_response>1</tool_response>"},
                ]
            },
            "message 2: has text outside of <tool_response>",
        ),
        (
            openai(
                {"role": "assistant", "tool_calls": [called()]},
                {"role": "tool", "tool_call_id": "call_x", "content": {"a": [float("nan")]}},
            ),
            "message 3: holds a number that JSON",
        ),
        (openai(ANSWER) | {"tools": [{"name": "a"}, {"name": " "}]}, "tool 2 has no name"),
        (
            openai(ANSWER) | {"functions": [{"name": "a", "parameters": {"maximum": float("inf")}}]},
            "tools hold a number that JSON",
        ),
        (openai(ANSWER) | {"tools": '[{"name": "a", "maximum": 1e999}]'}, "tools hold a number that JSON"),
        (openai(ANSWER) | {"tools": "{"}, "tools are not JSON"),
        (openai(ANSWER) | {"tools": "[" * 10**5}, "tools are not JSON: brackets are nested too deeply"),
        (openai(ANSWER) | {"tools": {"a": 1}}, "tools must be a list"),
    ],
)
def test_bad_rows(row, words):
    with pytest.raises(RowError, match=words):
        conversation(row)
