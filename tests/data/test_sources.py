"""Files and folders; bad input is named."""

import pytest

from configs.schema import ConfigError, DataConfig
from data.chat import Account
from data.sources import read_source
from data.tokenizer import load_tokenizer


def read(path, share=0.1, **settings):
    return read_source(path, DataConfig(validation_fraction=share, **settings), load_tokenizer("bytes"), Account())


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_folder_in_sorted_order(tmp_path):
    write(tmp_path, "b/two.py", "22222")
    write(tmp_path, "a.txt", "11111")
    write(tmp_path, "c.jsonl", '{"text": "x"}\n\n{"text": "y"}\n{"text": ""}')
    write(tmp_path, ".git/hidden", "hidden")
    write(tmp_path, "empty.txt", "")
    write(tmp_path, "z.bin", b"\0\1")
    write(tmp_path, "z.latin", b"caf\xe9")
    texts = read(str(tmp_path), 0.0)
    assert texts.train == ["11111", "22222", "x", "y"] and not texts.heldout
    assert [line.rpartition(": ")[2] for line in texts.skipped] == ["binary", "not UTF-8"]


def test_last_tenth_is_held_out(tmp_path):
    text = "ä" * 50
    texts = read(write(tmp_path, "a.txt", text), 0.1)
    assert texts.train == ["ä" * 45] and texts.heldout == ["ä" * 5]
    inside = read(write(tmp_path, "b.txt", "aä" * 9), 0.25)  # byte 20 of 27 is the second of an ä
    assert inside.train == ["aä" * 7] and inside.heldout == ["aä" * 2]
    rows = "\n".join(f'{{"text": "{i}"}}' for i in range(20))
    texts = read(write(tmp_path, "c.jsonl", rows), 0.1)
    assert texts.heldout == ["18", "19"] and len(texts.train) == 18
    assert read(write(tmp_path, "d.jsonl", '{"text": "a"}\n{"text": "b"}'), 0.1).heldout == ["b"]


@pytest.mark.parametrize("name, content, words", [
    ("empty.txt", "", "is empty"),
    ("latin.txt", b"caf\xe9", "is not UTF-8 text .byte 3"),
    ("bad.jsonl", '{"text": "a"}\n{"text": }', "bad.jsonl line 2 is not JSON: .*; correct it"),
    ("list.jsonl", "[1]", "list.jsonl line 1 is not a JSON object but list"),
    ("field.jsonl", '{"body": "a", "n": 1}', "line 1 has no field 'text'; it has body, n"),
    ("number.jsonl", '{"text": 3}', "no text in field 'text' but int"),
    ("blank.jsonl", "\n\n", "holds no rows"),
    ("nothing.jsonl", '{"text": ""}', "holds nothing to train on"),
])
def test_bad_input(tmp_path, name, content, words):
    with pytest.raises(ConfigError, match=words):
        read(write(tmp_path, name, content), 0.1)


def test_folder_without_text(tmp_path):
    write(tmp_path, "x.bin", b"\0")
    with pytest.raises(ConfigError, match="holds no text file"):
        read(str(tmp_path), 0.1)
