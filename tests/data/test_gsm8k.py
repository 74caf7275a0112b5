"""GSM8K as calculator calls between thoughts."""

import json
import runpy
from pathlib import Path

import pytest

from configs.schema import ConfigError, DataConfig, RunConfig, TrainConfig
from data import gsm8k
from data.episodes import run_episodes
from data.gsm8k import convert, number, problem, solves
from data.messages import RowError
from data.pipeline import open_data
from data.tokenizer import load_tokenizer

REAL = Path(__file__).parents[3] / "shared/data/gsm8k/train.jsonl"
ROW = {"question": "How many?", "answer": "First 6/2 = $<<6/2=3>>3.00 each.\nThen <<3*4=12.0>>12.\n#### 1,200"}


def test_one_row():
    made = problem(ROW)
    thoughts = [m.get("reasoning_content") for m in made.messages if m["role"] == "assistant"]
    assert thoughts == ["First 6/2 = $", "3.00 each.\nThen ", "12."]
    assert [m["content"] for m in made.messages if m["role"] == "tool"] == ["3", "12"]
    assert made.steps == ('calculate{"expression": "6/2"}', 'calculate{"expression": "3*4"}')
    assert made.answer == "1200" and solves(made, made.messages)
    assert solves(made, "<think></think>$1,200.00<|im_end|>") and not solves(made, "<think></think>1,201<|im_end|>")


@pytest.mark.parametrize(
    "text, value",
    [("1,200", 1200), ("$.50", 0.5), ("70%", 70), ("-3.", -3), ("1 000", 1000), ("3 apples", None), ("", None), ("12,34", None)],
)
def test_number(text, value):
    assert number(text) == value


@pytest.mark.parametrize(
    "answer, words",
    [
        ("<<1+1=3>>3\n#### 3", "mark <<1[+]1=3>> is wrong"),
        ("<<a+1=3>>3\n#### 3", "cannot compute a[+]1"),
        ("<<1+1>>2\n#### 2", "not <<EXPRESSION=RESULT>>"),
        ("2", "no line `#### ANSWER`"),
        ("2\n#### two", "answers 'two', which is not a number"),
    ],
)
def test_bad_rows(answer, words, tmp_path):
    with pytest.raises(RowError, match=words):
        problem({"question": "q", "answer": answer})
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "q", "answer": answer}))
    with pytest.raises(ConfigError, match="rows.jsonl line 1"):
        convert(path, tmp_path / "out.jsonl")


def test_the_converter_at_the_command_line(tmp_path, monkeypatch, capsys):
    """Blank lines are passed over, and only line feeds end a row; what is wrong is said once, without a lesson in usage."""
    source, target = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n" + json.dumps(ROW | {"question": "How\u2028many?"}, ensure_ascii=False) + "\n\n", encoding="utf-8")

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["gsm8k", *map(str, arguments)])
        runpy.run_path(gsm8k.__file__, run_name="__main__")

    run(source, target)
    assert "1 conversations" in capsys.readouterr().out
    assert json.loads(target.read_text(encoding="utf-8"))["messages"][0]["content"] == "How\u2028many?"
    for text, words in (
        ("\n{", "rows.jsonl line 2 is not JSON"),
        ("[1]", "line 1 is not a JSON object but list"),
        ("[" * 10**5, "line 1 is nested too deeply"),
        ("\n", "rows.jsonl holds no rows"),
    ):
        source.write_text(text)
        with pytest.raises(SystemExit, match=f"^error: .*{words}"):
            run(source, tmp_path / "new.jsonl")
    assert not (tmp_path / "new.jsonl").exists()
    source.write_text(json.dumps(ROW).replace("How", "\\ud800How"))
    run(source, tmp_path / "half.jsonl")
    assert json.loads((tmp_path / "half.jsonl").read_bytes())["messages"][0]["content"].startswith("?How")
    source.write_bytes(b"\ncaf\xe9")
    with pytest.raises(SystemExit, match="^error: .*rows.jsonl line 2 is not UTF-8 text .byte 3"):
        run(source, tmp_path / "new.jsonl")
    for there in (source, target):
        before = there.read_bytes()
        with pytest.raises(SystemExit, match="^error: .*jsonl exists; remove it or choose another name"):
            run(source, there)
        assert there.read_bytes() == before
    with pytest.raises(SystemExit, match="^usage: python -m data.gsm8k IN.jsonl OUT.jsonl$"):
        run(source)


@pytest.mark.skipif(not REAL.exists(), reason="GSM8K is not at ../shared/data/gsm8k")
def test_the_whole_training_set(tmp_path):
    """Every row converts, every call gives what its mark says, and the reference solution replays in the live loop."""
    count, doubtful = convert(REAL, tmp_path / "gsm8k.jsonl")
    assert count == 7473 and len(doubtful) == 14
    some = tmp_path / "some.jsonl"
    some.write_text("\n".join((tmp_path / "gsm8k.jsonl").read_text().split("\n")[:500]))
    cfg = RunConfig(data=DataConfig(paths=(str(some),), too_long="drop"), train=TrainConfig(batch_size=8, seq_len=2048))
    data = open_data(cfg, load_tokenizer("bytes"))
    facts = data.describe()
    assert facts["conversations"] == 500 and facts["duplication"] == 1.0
    assert facts["chat_rows"] + facts["rejected"] == 500 and facts["rejected"] < 25  # few exceed 2048 bytes
    for line in REAL.read_text().splitlines()[:20]:
        made = problem(json.loads(line))
        (row,) = data.renderer.rows(made.messages, made.tools)

        def generate(prompts, ids=row.ids):
            prompt = prompts[0]
            assert ids[: len(prompt)] == prompt
            return {0: ids[len(prompt) : ids.index(data.tokenizer.eos_id, len(prompt)) + 1]}

        episode = made.episode()
        run_episodes(generate, data.renderer, [episode])
        assert solves(made, episode.messages) and episode.messages == list(made.messages)
