"""A corpus of chats as rows to train: segments, packing, what is left out and named."""

import json
import random

import pytest

from configs.schema import ConfigError, DataConfig, RunConfig, TrainConfig
from data.chat import numbered, shortened
from data.messages import RowError, conversation
from data.parse import parse_conversation
from data.pipeline import open_data
from data.preview import pieces
from data.render import KimiRenderer
from data.tasks import make_problem
from data.tokenizer import load_tokenizer
from tests.data.test_chat import called


def talk(answers, padding=1, **more):
    """A conversation of questions, each answered after one call."""
    messages = []
    for i in range(answers):
        messages += [
            {"role": "user", "content": f"question {i} " + "x" * padding},
            {"role": "assistant", "reasoning_content": f"thought {i}", "content": "", "tool_calls": [called(call_id=f"c{i}")]},
            {"role": "tool", "tool_call_id": f"c{i}", "content": "y" * padding},
            {"role": "assistant", "reasoning_content": "so", "content": f"answer {i}", **more},
        ]
    return {"messages": messages, "tools": [{"type": "function", "function": {"name": "add"}}]}


def open_rows(tmp_path, rows, seq_len=1024, **settings):
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    cfg = RunConfig(
        data=DataConfig(paths=(str(path),), validation_fraction=0.0, **settings), train=TrainConfig(batch_size=2, seq_len=seq_len)
    )
    return open_data(cfg, load_tokenizer("bytes"))


def test_one_row_per_segment_and_the_account(tmp_path):
    data = open_rows(tmp_path, [talk(3), talk(1)])
    facts = data.describe()
    assert (facts["conversations"], facts["chat_rows"], facts["rejected"]) == (2, 4, 0)
    assert 1.2 < facts["duplication"] < 2
    assert open_rows(tmp_path, [talk(3), talk(1)], mode="preserved").describe()["chat_rows"] == 2
    last = open_rows(tmp_path, [talk(3), talk(1)], mode="last_segment")
    assert last.describe()["chat_rows"] == 2
    text = "".join(last.tokenizer.decode(row) for row in last.batch(0)["tokens"])
    assert "answer 2" in text and "thought 2" in text and "thought 1" not in text


def test_an_answer_switched_off_is_counted(tmp_path):
    row = talk(2)
    row["messages"][3]["train"] = row["messages"][1]["train"] = False
    facts = open_rows(tmp_path, [row]).describe()
    assert (facts["chat_rows"], facts["untrained_answers"], facts["rejected"]) == (1, 1, 0)


def test_packing_changes_no_mask(tmp_path):
    """The pieces of an epoch's batches are the rendered rows, ids and weights, whole."""
    rows = [talk(1 + i % 3, padding=i * 7 % 50) for i in range(30)]
    data = open_rows(tmp_path, rows, seq_len=2048)
    expected = [row for given in map(conversation, rows) for row in data.renderer.rows(given.messages, given.tools)]
    found = [
        piece
        for step in range(-(-data.describe()["rows_per_epoch"] // 2))
        for row in range(2)
        for piece in pieces(data.batch(step), row)
    ][: len(expected)]

    def order(pairs):
        return sorted((list(map(int, ids)), list(map(float, weights))) for ids, weights in pairs)

    assert order(found) == order((row.ids, [0.0, *row.weights[1:]]) for row in expected)


def test_system_message_is_inserted(tmp_path):
    data = open_rows(tmp_path, [talk(1)], system="Be brief.")
    assert "<|im_system|>system<|im_middle|>Be brief.<|im_end|>" in data.tokenizer.decode(data.batch(0)["tokens"][0])


def test_bad_rows_stop_or_are_dropped_by_name(tmp_path):
    rows = [
        talk(1),
        "{oops",
        {"messages": [{"role": "bot"}]},
        talk(1, train=False)
        | {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "train": False}]},
    ]
    with pytest.raises(ConfigError, match="chat.jsonl line 2 is not JSON.*data.bad_rows=drop"):
        open_rows(tmp_path, rows)
    rejected = open_rows(tmp_path, rows, bad_rows="drop").account.rejected
    assert [reason.rpartition("chat.jsonl ")[2] for reason in rejected] == [
        "line 2 is not JSON: Expecting property name enclosed in double quotes at column 2",
        "line 3 message 1: unknown role 'bot'; known are system, developer, user, assistant, tool, human, gpt, "
        "model, function_call, observation, function, tool_call, tool_response",
        "line 4: no token of it is trained",
    ]


def test_too_long(tmp_path):
    rows = [talk(1), talk(3, padding=300)]
    with pytest.raises(ConfigError, match="line 2: row 1 has .* tokens, more than train.seq_len=700.*data.too_long"):
        open_rows(tmp_path, rows, seq_len=700)
    dropped = open_rows(tmp_path, rows, seq_len=700, too_long="drop")
    assert dropped.describe()["chat_rows"] == 1 and len(dropped.account.rejected) == 3
    shortened = open_rows(tmp_path, [talk(1), talk(3, padding=90)], seq_len=900, too_long="shorten")
    facts = shortened.describe()
    assert (facts["chat_rows"], facts["shortened"], facts["rejected"]) == (4, 1, 0)
    documents = shortened._train.documents
    text = shortened.tokenizer.decode(documents.piece(3, 0, documents.predictions[3]).ids)
    assert text.count("<|tool_call_begin|>") == text.count("## Return of") == 2 and "question 0" in text


def test_behind_a_gap_nothing_is_invented():
    """The reply behind left-out exchanges went on from what is gone: it is shown, not trained. As few as possible go."""
    renderer = KimiRenderer(load_tokenizer("bytes"))
    problem = make_problem("pointer_chase", 0, 0, 12)
    (whole,) = renderer.rows(problem.messages, problem.tools)
    for seq_len in range(330, len(whole.ids) - 1, 50):
        row = shortened(problem.messages, problem.tools, renderer, "interleaved", seq_len)
        assert seq_len - 100 < len(row.ids) - 1 <= seq_len  # an exchange takes 97 tokens
        messages, _ = parse_conversation(row.ids, renderer.tokenizer)
        assert messages == numbered([problem.messages[0], *problem.messages[1 - len(messages) :]])
        calls = [call["id"] for message in messages for call in message.get("tool_calls", ())]
        assert calls == [f"functions.get:{i}" for i in range(len(calls))], "as a server counts that is given these messages"
        trained_from = len(renderer.prompt(messages[:3], problem.tools))
        assert not any(row.weights[:trained_from]) and row.weights[trained_from]
    assert shortened(problem.messages, problem.tools, renderer, "interleaved", 200) is None


def test_nothing_left(tmp_path):
    with pytest.raises(ConfigError, match="holds nothing to train on"):
        open_rows(tmp_path, ["{oops"], bad_rows="drop")
    with pytest.raises(ConfigError, match="every row of the training part was left out .see data.bad_rows"):
        open_rows(tmp_path, [talk(3, padding=300)], seq_len=64, too_long="drop")


def mutate(rng, value, depth=0):
    """The value with one place of it replaced by junk."""
    if rng.random() < 0.15 + 0.1 * depth or not isinstance(value, (dict, list)) or not value:
        return rng.choice([None, 0, 3.5, True, "", "x", [], ["a"], [{}], {}, {"type": "text"}, {"a": {"b": 1}}, [[1]]])
    value = value.copy()
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    value[key] = mutate(rng, value[key], depth + 1)
    return value


def test_damaged_rows_are_refused_or_usable():
    """Whatever stands in a row: a RowError, or a conversation that renders."""
    rng = random.Random(0)
    renderer = KimiRenderer(load_tokenizer("bytes"))
    sharegpt = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "done"},
        ],
        "system": "s",
        "tools": "[]",
    }
    refused = 0
    for _ in range(3000):
        row = mutate(rng, rng.choice([talk(2), sharegpt]))
        try:
            made = conversation(row if isinstance(row, dict) else {})
            renderer.rows(made.messages, made.tools)
        except RowError as error:
            assert "\n" not in str(error)
            refused += 1
    assert 500 < refused < 2900
