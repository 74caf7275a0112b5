"""Pre-tokenised files."""

import json

import numpy as np
import pytest

from configs.schema import ConfigError, DataConfig, RunConfig, TrainConfig
from data.arrays import TokenRow, write_array_record
from data.pipeline import open_data, write_index
from data.tokenizer import load_tokenizer

DOCUMENTS = [[256, *range(10)], [256, *range(50, 75)], [256, 7]]
WEIGHTS = [[0.0] * 5 + [1.0] * 6, None, [0.0, 0.5]]


def open_path(path):
    cfg = RunConfig(data=DataConfig(paths=(str(path),), validation_fraction=0.0),
                    train=TrainConfig(batch_size=1, seq_len=64))
    return open_data(cfg, load_tokenizer("bytes"))


def rows_of(data):
    return sorted(data._train.documents.piece(i, 0, n).ids.tolist()
                  for i, n in enumerate(data._train.documents.predictions))


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


@pytest.mark.parametrize("array, words", [
    (np.array([1, 320]), "token id 320, outside the vocabulary of 320"),
    (np.array([-1, 3]), "token id -1"),
    (np.array([0.5]), "float64, not integer"),
    (np.zeros((2, 2, 2), int), "3 dimensions"),
    (np.array([], int), "is empty"),
])
def test_bad_arrays(tmp_path, array, words):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ConfigError, match=words):
        open_path(tmp_path / "a.npy")


def test_index_of_text_and_chat(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(f'{{"text": "document {i}"}}' for i in range(20)))
    talk = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(talk) for _ in range(10)))
    tokenizer = load_tokenizer("bytes")

    def config(*names, share=0.1):
        return RunConfig(data=DataConfig(paths=tuple(str(tmp_path / n) for n in names), validation_fraction=share),
                         train=TrainConfig(batch_size=1, seq_len=64))

    assert write_index(config("a.jsonl", "b.jsonl"), tokenizer, tmp_path / "all.array_record") == 30
    whole, indexed = (open_data(config(*names, share=0.0), tokenizer)
                      for names in (("a.jsonl", "b.jsonl"), ("all.array_record",)))
    assert whole.plan_hash == indexed.plan_hash
    assert write_index(config("a.jsonl"), tokenizer, tmp_path / "a.array_record") == 20
    held = [open_data(config(name), tokenizer).validation() for name in ("a.jsonl", "a.array_record")]
    assert all((held[0][0][k] == held[1][0][k]).all() for k in held[0][0]) and len(held[0]) == len(held[1])
    with pytest.raises(ConfigError, match="exists"):
        write_index(config("a.jsonl"), tokenizer, tmp_path / "a.array_record")
    with pytest.raises(ConfigError, match="need no index"):
        write_index(config(), tokenizer, tmp_path / "c.array_record")


def test_rows_without_a_trained_token(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"ids": [1, 2, 3]}\n{"ids": [1, 2], "weights": [1, 0]}')
    with pytest.raises(ConfigError, match="line 2 trains no token"):
        open_path(tmp_path / "a.jsonl")
    write_array_record(tmp_path / "b.array_record", [TokenRow([1, 2, 3], [0.0, 0.0, 0.0])])
    with pytest.raises(ConfigError, match="no token of rows 0 to 0 is trained"):
        open_path(tmp_path / "b.array_record").batch(0)


def test_a_host_may_have_nothing_to_train_on(tmp_path):
    rows = [TokenRow(np.full(65, i), np.full(65, float(i == 1))) for i in range(2)]
    write_array_record(tmp_path / "a.array_record", rows)
    cfg = RunConfig(data=DataConfig(paths=(str(tmp_path / "a.array_record"),), validation_fraction=0.0),
                    train=TrainConfig(batch_size=2, seq_len=64))
    data = open_data(cfg, load_tokenizer("bytes"))
    assert sorted(data.batch(0, rows=slice(r, r + 1))["weights"].sum() for r in (0, 1)) == [0, 64]


def test_nothing_to_predict(tmp_path):
    np.save(tmp_path / "a.npy", np.array([5]))
    with pytest.raises(ConfigError, match="nothing to predict"):
        open_path(tmp_path / "a.npy")


def test_files_that_are_none(tmp_path):
    for name in ("a.npy", "b.array_record"):
        (tmp_path / name).write_bytes(b"not an array at all" * 9999)
        with pytest.raises(ConfigError, match=f"{name} is not a readable"):
            open_path(tmp_path / name)
    for weights, words in (("[1]", "weights of the same length"), ("[1, -1]", "negative"), ("[1, NaN]", "not finite")):
        (tmp_path / "c.jsonl").write_text(f'{{"ids": [1, 2], "weights": {weights}}}')
        with pytest.raises(ConfigError, match=f"line 1 .*{words}"):
            open_path(tmp_path / "c.jsonl")
