"""The preview shows exactly the trained tokens as trained."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

import launch
from configs.schema import DataConfig, RunConfig, TrainConfig
from data.pipeline import open_data
from data.preview import TRAINED, coloured, pieces, show
from data.tokenizer import load_tokenizer


def opened(tmp_path, kind):
    paths, more = (), {}
    if kind != "task":
        rows = [
            {
                "messages": [
                    {"role": "user", "content": "how [bold]many[/bold]?"},
                    {"role": "assistant", "content": "drei Äpfel", "reasoning_content": "hm"},
                ]
            },
            {"messages": [{"role": "user", "content": "?"}]},
        ]
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (tmp_path / "b").mkdir()
        (tmp_path / "b/b.txt").write_text("plain text " * 40)
        (tmp_path / "b/b.json").write_text("[]")
        paths = (str(tmp_path / "a.jsonl"), str(tmp_path / "b"))
        more = {"mixture": (1.0, 1.0)} if kind == "mixture" else {}
    cfg = RunConfig(data=DataConfig(paths=paths, bad_rows="drop", **more), train=TrainConfig(batch_size=4, seq_len=128))
    return open_data(cfg, load_tokenizer("bytes"))


def test_trained_text_is_coloured(tmp_path):
    data = opened(tmp_path, "chat")
    for step in range(4):
        batch = data.batch(step)
        for row in range(4):
            for ids, weights in pieces(batch, row):
                text = coloured(ids, weights, data.tokenizer)
                assert text.plain == data.tokenizer.decode(ids)
                green = "".join(text.plain[s.start : s.end] for s in text.spans if s.style == TRAINED)
                plain = [i for i, w in zip(ids, weights) if w and i < 256]
                assert green == data.tokenizer.decode(plain)
                if "drei" in text.plain:
                    return
    pytest.fail("the conversation was never shown")


def test_what_a_terminal_would_obey_is_written_out():
    tokenizer = load_tokenizer("bytes")
    ids = np.array(tokenizer.encode("a\x1b[2J\tb\n\x07"))
    assert coloured(ids, np.ones(len(ids)), tokenizer).plain == "a\\x1b[2J\tb\n\\x07"


@pytest.mark.parametrize("kind", ["task", "chat", "mixture"])
def test_everything_is_shown(tmp_path, kind):
    out = io.StringIO()
    show(opened(tmp_path, kind), Console(file=out, width=150))
    text = out.getvalue()
    assert "plan hash" in text and "padding" in text and "row 1:" in text
    if kind != "task":
        assert "left out" in text and "a.jsonl line 2 has no assistant message" in text
        assert "b.json is JSON, but rows are read one a line" in " ".join(text.split())
    for name in ("share", "filled per row", "trained per row"):
        assert (f"source 2: {name}" in text) == (kind == "mixture")


def test_the_verb_builds_an_index_and_previews(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("plain text " * 400)
    source, index = ["--data.paths", str(tmp_path / "a.txt")], tmp_path / "a.array_record"
    assert launch.main(["data", "--preset", "tiny", *source, "--index", str(index)]) == 0
    assert "wrote 1 documents" in capsys.readouterr().out
    assert launch.main(["data", "--preset", "tiny", *source, "--index", str(index)]) == 2
    assert launch.main(["data", "--preset", "tiny", *source, "--index", "a.bin"]) == 2
    assert "exists; remove it" in (errors := capsys.readouterr().err) and "ending .array_record" in errors
    more = ["--data.paths", str(index), str(index)]
    assert launch.main(["data", "--preset", "tiny", *more]) == 0
    assert "documents" in capsys.readouterr().out


def test_a_narrow_terminal_shows_everything(tmp_path):
    """What is wider goes on in the next line, in the console that the verbs print to as well, which wraps nothing by itself."""
    data, out = opened(tmp_path, "chat"), io.StringIO()
    show(data, Console(file=out, width=40, soft_wrap=True), rows=1)
    shown = "".join(line.strip("\u2502 \n") for line in out.getvalue().split("row 0:")[1].splitlines()[1:-1])
    for ids, _ in pieces(data.batch(0), 0):
        assert "".join(data.tokenizer.decode(ids).split()) in "".join(shown.split())
