"""Pre-tokenised files."""

import io
import json

import numpy as np
import pytest

from configs.schema import ConfigError, DataConfig, RunConfig, TrainConfig
from data.arrays import TokenRow, record_row, write_array_record
from data.messages import RowError
from data.pipeline import open_data, write_index
from data.tokenizer import load_tokenizer

DOCUMENTS = [[256, *range(10)], [256, *range(50, 75)], [256, 7]]
WEIGHTS = [[0.0] * 5 + [1.0] * 6, None, [0.0, 0.5]]


def open_path(path, **settings):
    cfg = RunConfig(
        data=DataConfig(paths=(str(path),), validation_fraction=0.0, **settings), train=TrainConfig(batch_size=1, seq_len=64)
    )
    return open_data(cfg, load_tokenizer("bytes"))


def rows_of(data):
    return sorted(data._train.documents.piece(i, 0, n).ids.tolist() for i, n in enumerate(data._train.documents.predictions))


def write(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "npy":
        np.save(path, np.concatenate(DOCUMENTS).astype(np.uint16))
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps({"ids": i, "weights": w}) for i, w in zip(DOCUMENTS, WEIGHTS)))
    else:
        assert write_array_record(path, [TokenRow(i, w) for i, w in zip(DOCUMENTS, WEIGHTS)]) == 3
    return path


@pytest.mark.parametrize("kind", ["npy", "jsonl", "array_record"])
def test_documents(tmp_path, kind):
    data = open_path(write(tmp_path, kind))
    assert rows_of(data) == sorted(DOCUMENTS)
    batch = data.batch(0)
    weights = [[1.0] * (len(i) - 1) if kind == "npy" or w is None else w[1:] for i, w in zip(DOCUMENTS, WEIGHTS)]
    assert batch["weights"].sum() == sum(map(sum, weights))


def test_rows_of_a_matrix(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(60).reshape(3, 20))
    assert rows_of(open_path(tmp_path / "a.npy")) == np.arange(60).reshape(3, 20).tolist()


@pytest.mark.parametrize(
    "array, words",
    [
        (np.array([1, 320]), "token id 320, outside the vocabulary of 320"),
        (np.array([-1, 3]), "token id -1"),
        (np.array([0.5]), "float64, not integer"),
        (np.zeros((2, 2, 2), int), "3 dimensions"),
        (np.array([], int), "is empty"),
    ],
)
def test_bad_arrays(tmp_path, array, words):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ConfigError, match=words):
        open_path(tmp_path / "a.npy")


def test_foreign_arrays_of_a_folder_are_passed_over(tmp_path):
    """What nobody can mean as token ids. Ids of another vocabulary are a mistake that stops."""
    np.save(tmp_path / "a.npy", np.array([1, 2, 3]))
    for name, array in (
        ("float", np.zeros(3, np.float32)),
        ("empty", np.array([], int)),
        ("image", np.zeros((2, 2, 2), int)),
        ("scalar", np.array(3)),
        ("objects", np.array([{}])),
    ):
        np.save(tmp_path / f"{name}.npy", array)
    data = open_path(tmp_path)
    assert rows_of(data) == [[1, 2, 3]] and (data.account.files, data.account.skipped_files) == (1, 5)
    assert [reason.removeprefix(f"{tmp_path}/").partition(":")[0] for reason in data.account.rejected] == [
        "empty.npy is empty",
        "float.npy holds float32, not integer token ids",
        "image.npy has 3 dimensions; token ids need 1 or 2",
        "objects.npy is not a readable .npy array",
        "scalar.npy has 0 dimensions; token ids need 1 or 2",
    ]
    np.save(tmp_path / "b.npy", np.array([1, 320]))
    with pytest.raises(ConfigError, match="b.npy holds token id 320, outside the vocabulary"):
        open_path(tmp_path)


def test_index_of_text_and_chat(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(f'{{"text": "document {i}"}}' for i in range(20)))
    talk = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(talk) for _ in range(10)))
    tokenizer = load_tokenizer("bytes")

    def config(*names, share=0.1):
        return RunConfig(
            data=DataConfig(paths=tuple(str(tmp_path / n) for n in names), validation_fraction=share),
            train=TrainConfig(batch_size=1, seq_len=64),
        )

    assert write_index(config("a.jsonl", "b.jsonl"), tokenizer, tmp_path / "all.array_record") == 30
    whole, indexed = (
        open_data(config(*names, share=0.0), tokenizer) for names in (("a.jsonl", "b.jsonl"), ("all.array_record",))
    )
    assert whole.plan_hash == indexed.plan_hash
    assert write_index(config("a.jsonl"), tokenizer, tmp_path / "a.array_record") == 20
    held = [open_data(config(name), tokenizer).validation() for name in ("a.jsonl", "a.array_record")]
    assert all((held[0][0][k] == held[1][0][k]).all() for k in held[0][0]) and len(held[0]) == len(held[1])
    with pytest.raises(ConfigError, match="exists"):
        write_index(config("a.jsonl"), tokenizer, tmp_path / "a.array_record")
    with pytest.raises(ConfigError, match="d.array_record: there is no folder .*nowhere; make it first"):
        write_index(config("not read yet"), tokenizer, tmp_path / "nowhere/d.array_record")
    with pytest.raises(ConfigError, match="need no index"):
        write_index(config(), tokenizer, tmp_path / "c.array_record")


def test_an_index_of_another_tokenizer_is_refused(tmp_path):
    """By its fingerprint, though all ids lie in the vocabulary; a file that names no tokenizer is taken."""
    write_array_record(tmp_path / "a.array_record", [TokenRow([1, 2], None)], "0123456789abcdef")
    with pytest.raises(ConfigError, match="a.array_record was made with another tokenizer than data.tokenizer=bytes; "):
        open_path(tmp_path / "a.array_record")
    write_array_record(tmp_path / "b.array_record", [TokenRow([1, 2], None)])
    assert rows_of(open_path(tmp_path / "b.array_record")) == [[1, 2]]
    write_array_record(tmp_path / "c.array_record", [], load_tokenizer("bytes").fingerprint())
    with pytest.raises(ConfigError, match="c.array_record holds no records"):
        open_path(tmp_path / "c.array_record")


@pytest.mark.parametrize("kind", ["jsonl", "array_record"])
@pytest.mark.parametrize(
    "weights, setting, words",
    [
        ([1, 0, 0], "bad_rows", "trains no token: all weights behind the first are 0"),
        ([1] * 66, "too_long", "has 65 tokens, more than train.seq_len=64"),
    ],
)
def test_weighted_ids_are_kept_whole_or_left_out(tmp_path, kind, weights, setting, words):
    """Conversations of an index like those of JSONL: none is cut, so every row trains a token."""
    rows = [TokenRow([1, 2, 3], None), TokenRow(list(range(len(weights))), weights), TokenRow([7] * 70, None)]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps({"ids": ids, "weights": weights}) for ids, weights, _ in rows))
    else:
        write_array_record(path, rows, load_tokenizer("bytes").fingerprint())
    with pytest.raises(ConfigError, match=f"a.{kind} (line|record) 2 {words}; .*data.{setting}"):
        open_path(path)
    data = open_path(path, **{setting: "drop"})
    assert rows_of(data) == [[1, 2, 3], [7] * 70] and [words in reason for reason in data.account.rejected] == [True]
    assert all(data.batch(step)["weights"].any() for step in range(data.describe()["rows_per_epoch"]))


def test_nothing_to_predict(tmp_path):
    """In training rows it is an error of the path; held-out rows that predict nothing hold nothing out."""
    good, bad = {"ids": [65, 66, 67]}, {"ids": [65]}
    for name, rows in (("last", [*[good] * 5, bad]), ("first", [bad, good])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokenizer, train = load_tokenizer("bytes"), TrainConfig(batch_size=1, seq_len=64)

    def config(*names, **settings):
        paths = tuple(str(tmp_path / f"{name}.jsonl") for name in names)
        return RunConfig(data=DataConfig(paths=paths, validation_fraction=0.1, **settings), train=train)

    data = open_data(config("last"), tokenizer)
    assert data.describe()["documents"] == 5 and not data.holds_out
    for cfg in (config("first"), config("last", "first", mixture=(1.0, 1.0))):
        with pytest.raises(ConfigError, match=r"data.paths: \S*first.jsonl: every row .* nothing to predict"):
            open_data(cfg, tokenizer)
    (tmp_path / "none.jsonl").write_text(json.dumps(bad))
    with pytest.raises(ConfigError, match=r"none.jsonl: every row .* nothing to predict"):
        write_index(config("none"), tokenizer, tmp_path / "none.array_record")
    assert not (tmp_path / "none.array_record").exists()


def damaged_headers():
    """As numpy.save writes an array, and damaged: a header that is no Python, one that tells of an array larger than any memory,
    an archive, an object."""
    whole = io.BytesIO()
    np.save(whole, np.arange(1, 9))
    whole, archive, objects = whole.getvalue(), io.BytesIO(), io.BytesIO()
    np.savez(archive, np.arange(8))
    np.save(objects, np.array([{}]), allow_pickle=True)
    return [
        whole.replace(b"{'descr'", b"{{{descr"),
        whole.replace(b"(8,)", b"(8,,"),
        whole.replace(b"(8,), ", b"(1" + b"0" * 30 + b",), ")[: len(whole)],
        whole.replace(b"'<i8'", b"'<z8'"),
        whole.replace(b"'<i8'", b"(1, 2)"),
        archive.getvalue(),
        objects.getvalue(),
        b"PK\3\4 and no archive",
        whole[:-1],
        b"",
    ]


@pytest.mark.parametrize("content", damaged_headers())
def test_damaged_arrays_are_one_sentence(tmp_path, content):
    """Alone, in a folder, where they are passed over, and as a record."""
    (tmp_path / "a.npy").write_bytes(content)
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(ConfigError, match="a.npy is "):
        open_path(tmp_path / "a.npy")
    assert open_path(tmp_path).describe()["documents"] == 1
    with pytest.raises(RowError, match="is not an array as numpy.save writes it"):
        record_row(content, "here", 320)


def saved(*arrays, more=b""):
    stream = io.BytesIO()
    for array in arrays:
        np.save(stream, array)
    return stream.getvalue() + more


@pytest.mark.parametrize(
    "record, words",
    [
        (saved(np.array([1, 2]), np.array(["1", "2"])), "weights of <U1, which are no numbers"),
        (saved(np.array([1, 2]), np.array([1j, 1])), "weights of complex128"),
        (saved(np.array([1, 2]), np.array([1.0, 1]), np.array([3])), "bytes behind its ids and weights"),
    ],
)
def test_what_a_record_does_not_hold(record, words):
    with pytest.raises(RowError, match=words):
        record_row(record, "here", 320)


def test_files_that_are_none(tmp_path):
    for name in ("a.npy", "b.array_record"):
        (tmp_path / name).write_bytes(b"not an array at all" * 9999)
        with pytest.raises(ConfigError, match=f"{name} is not a readable"):
            open_path(tmp_path / name)
    for weights, words in (("[1]", "weights of the same length"), ("[1, -1]", "negative"), ("[1, NaN]", "not finite")):
        (tmp_path / "c.jsonl").write_text(f'{{"ids": [1, 2], "weights": {weights}}}')
        with pytest.raises(ConfigError, match=f"line 1 .*{words}"):
            open_path(tmp_path / "c.jsonl")
