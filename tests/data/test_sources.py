"""Files and folders; bad input is named."""

import gzip
import json
import os
from functools import partial

import pytest

from configs.schema import ConfigError, DataConfig
from data.chat import Account
from data.sources import heldout_start, read_source
from data.tokenizer import load_tokenizer

packed = partial(gzip.compress, mtime=0)
"""Always the same bytes: workers that share the tests name them by these."""


def read(path, share=0.1, account=None, **settings):
    """(train, held out)"""
    train, heldout = [], []
    for file in read_source(
        path, DataConfig(validation_fraction=share, **settings), load_tokenizer("bytes"), account or Account()
    ):
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
        "z.bin holds zero bytes",
        "z.json is JSON",
        "z.latin is not UTF-8 text (byte 3); convert it first",
    ]
    assert (account.files, account.skipped_files) == (3, 3) and account.summary() == {"rejected": 3}


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.JSONL", b'\xef\xbb\xbf{"text": "x"}\r\n{"text": "y"}\r\n'),
        ("a.ndjson", '{"text": "x"}\n{"text": "y"}'),
        ("a.jsonl.gz", packed(b'{"text": "x"}\n{"text": "y"}')),
    ],
)
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


@pytest.mark.parametrize(
    "row, words",
    [
        ('{"text": ' + "1" * 5000 + "}", "holds a number of more than 4,300 digits"),
        ('{"text": ' + "[" * 10**5 + "]" * 10**5 + "}", "is nested too deeply"),
        ('{"ids": [1, 2], "weights": [1, 1' + "0" * 400 + "]}", "are no list of numbers"),
        (r'{"\ud800": 1}', r"it has \\ud800: choose"),
        ('{"te\0xt": 1}', "holds zero bytes"),
    ],
)
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


@pytest.mark.parametrize(
    "count, share, start",
    [
        (5, 0.8, 1),
        (10, 0.9, 1),  # one item less for floating point would leave nothing to train on
        (15, 0.8, 2),
        (10, 0.7, 3),
        (4, 0.8, 0),
        (2, 0.9, 0),
        (20, 0.1, 18),
        (20, 0.0, 20),
        (1, 0.5, 1),
        (3, 0.01, 2),
    ],
)
def test_where_held_out_items_begin(count, share, start):
    assert heldout_start(count, share) == start


@pytest.mark.parametrize("there", ["metrics.jsonl", "checkpoints/0/x"])
def test_a_run_among_its_data_is_no_data(tmp_path, there, monkeypatch):
    """What is read is the same before the run is there and after."""
    write(tmp_path, "a.txt", "11111")
    write(tmp_path, "runs/config.json", "{}")  # as of a dataset: no run
    write(tmp_path, "runs/b.txt", "22222")
    expected = ["11111", "22222"], []
    monkeypatch.chdir(tmp_path)
    assert read(".", 0.0) == expected
    for name in ("config.json", "left_out.txt", there):
        write(tmp_path, f"runs/one/{name}", "{}")
    assert read(".", 0.0, account := Account()) == expected
    assert account.rejected == ["runs/config.json " + account.rejected[0].partition(" ")[2], "runs/one is a run directory"]
    with pytest.raises(ConfigError, match="runs/one is a run directory, .* name the data in it"):
        read("runs/one", 0.0)


def test_links_are_read_or_named(tmp_path):
    """Those to files are read; folders may lead in a circle."""
    data = tmp_path / "data"
    write(tmp_path, "elsewhere/b.txt", "22222")
    write(data, "a.txt", "11111")
    (data / "circle").symlink_to(data)
    (data / "file.txt").symlink_to(tmp_path / "elsewhere/b.txt")
    (data / "folder").symlink_to(tmp_path / "elsewhere")
    (data / "gone").symlink_to(tmp_path / "nowhere")
    assert read(str(data), 0.0, account := Account()) == (["11111", "22222"], [])
    assert [line.removeprefix(f"{data}/")[:27] for line in account.rejected] == [
        "circle is a link to a folde",
        "folder is a link to a folde",
        "gone is a link to nothing",
    ]
    assert read(str(data / "folder"), 0.0) == (["22222"], []), "what is named is read"


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    """Who runs the tests may be allowed everything, so the refusal is the system's only in name."""
    write(tmp_path, "a.txt", "11111")
    write(tmp_path, "secret/b.txt", "22222")
    real = os.scandir

    def refused(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refused)
    assert read(str(tmp_path), 0.0, account := Account()) == (["11111"], [])
    assert account.rejected == [f"{tmp_path}/secret cannot be listed: Permission denied"]


def test_an_empty_path_is_not_the_working_directory():
    with pytest.raises(ConfigError, match="data.paths: a path is empty"):
        read("")


def test_what_is_binary_is_not_read_to_its_end(tmp_path):
    """The end of this file is damaged, and nobody comes so far."""
    with pytest.raises(ConfigError, match="a.bin.gz holds zero bytes"):
        read(write(tmp_path, "a.bin.gz", packed(b"\0" + bytes(range(256)) * 4096)[:-9]))
    text = "x" * (1 << 16) + "y"
    assert read(write(tmp_path, "a.txt.gz", packed(text.encode())), 0.0) == ([text], [])
    with pytest.raises(ConfigError, match="b.txt holds zero bytes"):
        read(write(tmp_path, "b.txt", text + "\0"))


def test_null_is_as_good_as_absent(tmp_path):
    """Tables of several kinds of rows have every column in every row."""
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = [
        {"messages": None, "text": "x"},
        {"messages": None, "conversations": talk, "text": None},
        {"conversations": None, "messages": talk},
    ]
    path = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)))
    (text, *talks), _ = read(path, 0.0)
    assert text == "x" and [given.conversation.messages for given in talks] == [talk, talk]


@pytest.mark.parametrize(
    "name, content, words",
    [
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
    ],
)
def test_bad_input(tmp_path, name, content, words):
    with pytest.raises(ConfigError, match=words):
        read(write(tmp_path, name, content), 0.1)


def test_folder_without_text(tmp_path):
    write(tmp_path, "x.bin", b"\0")
    with pytest.raises(ConfigError, match="holds no file that can be read; .*x.bin holds zero bytes"):
        read(str(tmp_path), 0.1)
