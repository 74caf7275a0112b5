"""Files and folders; bad input is named."""

import gzip
import json
from functools import partial

import pytest

from configs.schema import ConfigError, DataConfig
from data.chat import Account
from data.sources import read_source
from data.tokenizer import load_tokenizer

packed = partial(gzip.compress, mtime=0)
"""Always the same bytes: workers that share the tests name them by these."""


def read(path, share=0.1, account=None, **settings):
    """(train, held out)"""
    train, heldout = [], []
    for file in read_source(path, DataConfig(validation_fraction=share, **settings), load_tokenizer("bytes"),
                            account or Account()):
        items = list(file.items)
        cut = file.cut(len(items))
        train, heldout = train + items[:cut], heldout + items[cut:]
    return train, heldout


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
    write(tmp_path, "z.json", "[1]")
    write(tmp_path, "z.latin", b"caf\xe9")
    assert read(str(tmp_path), 0.0, account := Account()) == (["11111", "22222", "x", "y"], [])
    skipped = [reason.removeprefix(f"{tmp_path}/") for reason in account.rejected]
    assert [reason.partition(",")[0] for reason in skipped] == [
        "z.bin holds zero bytes", "z.json is JSON", "z.latin is not UTF-8 text (byte 3); convert it first"]
    assert (account.files, account.skipped_files) == (3, 3) and account.summary() == {"rejected": 3}


@pytest.mark.parametrize("name, content", [
    ("a.JSONL", b'\xef\xbb\xbf{"text": "x"}\r\n{"text": "y"}\r\n'),
    ("a.ndjson", '{"text": "x"}\n{"text": "y"}'),
    ("a.jsonl.gz", packed(b'{"text": "x"}\n{"text": "y"}')),
])
def test_rows_by_any_ending(tmp_path, name, content):
    assert read(write(tmp_path, name, content), 0.0) == (["x", "y"], [])


@pytest.mark.parametrize("name, content", [("a.TXT", b"\xef\xbb\xbftext"), ("a.py.GZ", packed(b"text"))])
def test_text_by_any_ending(tmp_path, name, content):
    assert read(write(tmp_path, name, content), 0.0) == (["text"], [])


def test_a_damaged_row_of_a_folder_costs_that_row(tmp_path):
    write(tmp_path, "a.jsonl", b'{"text": "x"}\n{"text": "caf\xe9"}\n{"text": "y"}')
    with pytest.raises(ConfigError, match="a.jsonl line 2 is not UTF-8 text .byte 13.*data.bad_rows=drop"):
        read(str(tmp_path))
    assert read(str(tmp_path), 0.0, account := Account(), bad_rows="drop") == (["x", "y"], [])
    assert account.skipped_files == 0
    assert account.rejected == [f"{tmp_path}/a.jsonl line 2 is not UTF-8 text (byte 13); convert it first"]


@pytest.mark.parametrize("row, words", [
    ('{"text": ' + "1" * 5000 + "}", "holds a number of more than 4,300 digits"),
    ('{"text": ' + "[" * 10**5 + "]" * 10**5 + "}", "is nested too deeply"),
    ('{"ids": [1, 2], "weights": [1, 1' + "0" * 400 + "]}", "are no list of numbers"),
    (r'{"\ud800": 1}', r"it has \\ud800: choose"),
    ('{"te\0xt": 1}', "holds zero bytes"),
])
def test_rows_that_json_allows_and_nobody_reads(tmp_path, row, words):
    path = write(tmp_path, "a.jsonl", '{"text": "x"}\n' + row)
    with pytest.raises(ConfigError, match=f"line 2 .*{words}") as error:
        read(path)
    assert "\n" not in str(error.value) and str(error.value).isascii()
    assert read(path, 0.0, account := Account(), bad_rows="drop") == (["x"], []) and len(account.rejected) == 1


def test_last_tenth_is_held_out(tmp_path):
    text = "ä" * 50
    assert read(write(tmp_path, "a.txt", text), 0.1) == (["ä" * 45], ["ä" * 5])
    inside = read(write(tmp_path, "b.txt", "aä" * 9), 0.25)  # byte 20 of 27 is the second of an ä
    assert inside == (["aä" * 7], ["aä" * 2])
    rows = "\n".join(f'{{"text": "{i}"}}' for i in range(20))
    assert read(write(tmp_path, "c.jsonl", rows), 0.1) == ([str(i) for i in range(18)], ["18", "19"])
    assert read(write(tmp_path, "d.jsonl", '{"text": "a"}\n{"text": "b"}'), 0.1) == (["a"], ["b"])


@pytest.mark.parametrize("name, content, words", [
    ("empty.txt", "", "is empty"),
    ("latin.txt", b"caf\xe9", "is not UTF-8 text .byte 3"),
    ("wide.txt", "text".encode("utf-16-le"), "wide.txt holds zero bytes, so it is binary or UTF-16"),
    ("share.json", json.dumps([{"conversations": []}]), "share.json is JSON, .* one a line; .* jq -c"),
    ("share.json.gz", packed(b"{}"), "share.json.gz is JSON"),
    ("a.parquet", b"PAR1\0", "a.parquet is a table .* with pandas to_json"),
    ("a.jsonl.zst", b"\x28\xb5\x2f\xfd", "a.jsonl.zst is packed .* unpack it, or pack it with gzip"),
    ("a.tar", b"a", "a.tar is an archive; unpack it and name the folder"),
    ("a.npy.gz", b"a", "a.npy.gz is gzipped; unpack it"),
    ("a.txt.gz", b"not gzip", "a.txt.gz is no whole gzip file, copy or pack it anew: Not a gzipped file"),
    ("a.jsonl.gz", packed(b'{"text": "a"}\n' * 99)[:-9], "a.jsonl.gz is no whole gzip file"),
    ("b.jsonl.gz", packed(b'{"text": "abc"}', 0).replace(b"abc", b"abd"), "is no whole gzip file.*CRC"),
    ("bad.jsonl", '{"text": "a"}\n{"text": }', "bad.jsonl line 2 is not JSON: .*; correct it"),
    ("list.jsonl", "[1]", "list.jsonl line 1 is not a JSON object but list"),
    ("field.jsonl", '{"body": "a", "n": 1}', "line 1 has no field 'text'; it has body, n"),
    ("number.jsonl", '{"text": 3}', "no text in field 'text' but int"),
    ("blank.jsonl", "\n\n", "holds no rows"),
])
def test_bad_input(tmp_path, name, content, words):
    with pytest.raises(ConfigError, match=words):
        read(write(tmp_path, name, content), 0.1)


def test_folder_without_text(tmp_path):
    write(tmp_path, "x.bin", b"\0")
    with pytest.raises(ConfigError, match="holds no file that can be read; .*x.bin holds zero bytes"):
        read(str(tmp_path), 0.1)
