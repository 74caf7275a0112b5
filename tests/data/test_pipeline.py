"""Batches: pure in the step, packed without leaks, every prediction once an epoch."""

import dataclasses

import numpy as np
import pytest

from configs.schema import ConfigError, DataConfig, ModelConfig, RunConfig, TrainConfig
from data import plan, streams
from data.pipeline import open_data
from data.tasks import make_problem
from data.tokenizer import load_tokenizer
from tests.data.histories import batch_hash


def config(batch_size=4, seq_len=128, model=None, **data):
    return RunConfig(
        model=model or ModelConfig(),
        data=DataConfig(**data),
        train=TrainConfig(batch_size=batch_size, seq_len=seq_len, eval_batches=2),
    )


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {i} of the text\n" for i in range(700)))
    return path


def open_bytes(cfg):
    return open_data(cfg, load_tokenizer("bytes"))


def documents(batch):
    """(tokens, targets, positions) of every piece of a batch."""
    for b in range(len(batch["tokens"])):
        for segment in range(1, batch["segments"][b].max() + 1):
            here = batch["segments"][b] == segment
            yield tuple(batch[name][b][here] for name in ("tokens", "targets", "positions"))


@pytest.mark.parametrize("kind", ["text", "task"])
def test_batches(kind, text_file):
    cfg = config(paths=(str(text_file),) if kind == "text" else ())
    data = open_bytes(cfg)
    batch = data.batch(5)
    assert {k: (v.shape, str(v.dtype)) for k, v in batch.items()} == {
        "tokens": ((4, 128), "int32"),
        "targets": ((4, 128), "int32"),
        "weights": ((4, 128), "float32"),
        "positions": ((4, 128), "int32"),
        "segments": ((4, 128), "int32"),
    }
    for tokens, targets, positions in documents(batch):
        np.testing.assert_array_equal(tokens[1:], targets[:-1])
        np.testing.assert_array_equal(positions, np.arange(len(tokens)))
    padding = batch["segments"] == 0
    assert (batch["weights"][padding] == 0).all() and (batch["tokens"][padding] == 257).all()
    assert batch_hash(batch) == batch_hash(open_bytes(cfg).batch(5))
    assert batch_hash(batch) != batch_hash(data.batch(6))


def test_last_token_of_a_document_predicts_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(f'{{"text": "document {i}"}}' for i in range(50)))
    batch = open_bytes(config(paths=(str(tmp_path / "a.jsonl"),))).batch(0)
    for tokens, targets, _ in documents(batch):
        assert tokens[0] == 256 and targets[-1] == 259  # [BOS] first, [EOS] only ever a target
    assert not (batch["tokens"] == 259).any()


def test_nothing_to_train_on(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": ""}')
    with pytest.raises(ConfigError, match="a.jsonl holds nothing to train on"):
        open_bytes(config(paths=(str(tmp_path / "a.jsonl"),)))


def test_a_lone_surrogate_is_a_question_mark(tmp_path):
    (tmp_path / "a.jsonl").write_text(r'{"text": "a\ud800b"}')
    data = open_bytes(config(batch_size=1, paths=(str(tmp_path / "a.jsonl"),)))
    assert data.describe()["train_bytes"] == 3 and data.batch(0)["targets"][0, :3].tolist() == [*b"a?b"]


def test_an_epoch_holds_every_prediction_once(text_file):
    data = open_bytes(config(batch_size=1, paths=(str(text_file),)))
    rows = data.describe()["rows_per_epoch"]
    train = text_file.read_bytes()[: int(text_file.stat().st_size * 0.9)]
    epochs = []
    for epoch in (0, 1):
        pieces = [d[1] for r in range(rows) for d in documents(data.batch(epoch * rows + r))]
        assert sorted(np.concatenate(pieces)) == sorted([*train, 259])
        epochs.append({bytes(targets.clip(max=255).astype(np.uint8)) for targets in pieces})
    assert len(epochs[0] & epochs[1]) < len(epochs[0]) / 2, "every epoch cuts at other places"


def test_validation_counts_the_bytes_of_the_last_tenth(text_file):
    data = open_bytes(config(paths=(str(text_file),)))
    size = text_file.stat().st_size
    batches = data.validation()
    assert sum(map(data.source_bytes, batches)) == size - int(size * 0.9)
    assert all(batch["tokens"].shape == (4, 128) for batch in batches)
    assert len(data.validation(limit=1)) == 1
    held = "".join(data.tokenizer.decode(d[1]) for b in batches for d in documents(b))
    assert sorted(held.replace("[EOS]", "")) == sorted(text_file.read_text()[int(size * 0.9) :])


def test_hosts_and_workers_do_not_change_a_batch(text_file):
    data = open_bytes(config(batch_size=8, paths=(str(text_file),)))
    whole = batch_hash(data.batch(3))
    for hosts in (1, 2, 4, 8):
        parts = [data.batch(3, rows=slice(h * 8 // hosts, (h + 1) * 8 // hosts)) for h in range(hosts)]
        assert batch_hash({k: np.concatenate([p[k] for p in parts]) for k in parts[0]}) == whole
    for _, batch in zip(range(2), data.iterate(start_step=2)):
        last = batch
    assert batch_hash(last) == whole


def test_plan_hash_follows_what_decides_the_order(text_file):
    base = config(paths=(str(text_file),))
    hashes = {
        open_bytes(cfg).plan_hash
        for cfg in (
            base,
            config(paths=(str(text_file),), seed=1),
            config(paths=(str(text_file),), batch_size=2),
            config(paths=(str(text_file),), seq_len=64),
            config(),
            config(task_length=(2, 3)),
        )
    }
    assert len(hashes) == 6
    longer = dataclasses.replace(base, train=dataclasses.replace(base.train, steps=999))
    assert open_bytes(longer).plan_hash in hashes


def test_padding_of_mixed_lengths_stays_under_half_a_percent():
    rng = np.random.default_rng(0)
    counts = np.clip(np.exp(rng.normal(6.0, 1.1, 20_000)).astype(int), 1, 40_000)
    pieces, rows = plan.pack_epoch(counts, 4096, 0, 0)
    assert sorted(i for row in rows for i in row) == list(range(len(pieces.doc)))
    filled = np.array([pieces.count[row].sum() for row in rows])
    assert filled.max() <= 4096 and 1 - filled.mean() / 4096 < 0.005
    covered = np.zeros(counts.sum(), int)
    offsets = np.cumsum(counts) - counts
    np.add.at(
        covered, np.concatenate([offsets[d] + s + np.arange(c) for d, s, c in zip(pieces.doc, pieces.start, pieces.count)]), 1
    )
    assert (covered == 1).all()


def test_order_is_the_one_written_down():
    """Golden: a change here changes the data order of every run and needs a new PLAN_VERSION."""
    assert plan.shuffled(10, 0, 1, 2).tolist() == [9, 6, 5, 2, 1, 8, 4, 0, 7, 3]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"paths": ("nowhere.txt",)}, "no file or folder nowhere.txt"),
        ({"task": "chains"}, "'chains' does not exist"),
        ({"model": ModelConfig(stop_token_ids=(5, 320))}, r"stop_token_ids names \[320\], outside the model's vocabulary of 320"),
        ({"model": ModelConfig(vocab_size=300)}, "does not fit the tokenizer bytes; set model.vocab_size=320"),
        ({"model": ModelConfig(eos_token_id=1)}, "set model.eos_token_id=258"),
        ({"seq_len": 40}, "raise train.seq_len=40"),
        (
            {"task": "copy", "task_length": (1, 8), "seq_len": 198},
            "problem of up to 8 steps can take 233 tokens; .*too_long=drop",
        ),
        (
            {"task": "ledger", "task_length": (1, 2), "too_long": "shorten", "seq_len": 256},
            "a ledger problem of up to 2 steps can",
        ),
        ({"task_length": (8, 8), "too_long": "drop", "seq_len": 64}, "hardly a chain problem fits train.seq_len=64"),
    ],
)
def test_unusable_settings(change, words):
    with pytest.raises(ConfigError, match=words):
        open_bytes(config(**change))


def test_the_longest_problem_that_is_drawn_fits():
    """A row of exactly the longest problem is long enough, one place less is not."""
    fits = {"task": "copy", "task_length": (1, 8)}
    assert open_bytes(config(seq_len=233, **fits)).batch(9)["segments"].any(axis=1).all()
    with pytest.raises(ConfigError, match="can take 233 tokens"):
        open_bytes(config(seq_len=232, **fits))


@pytest.mark.parametrize("too_long", ["drop", "error"])
def test_problems_that_are_too_long_are_drawn_again(too_long, monkeypatch):
    """With data.too_long=drop always; else where a tokenizer makes one long that could not be foreseen."""
    monkeypatch.setattr(streams, "WINDOW_TOKENS", 1 << 12)
    monkeypatch.setattr(streams, "longest_problem", lambda task, length: make_problem(task, 0, 0, 1))
    seq_len = 96 if too_long == "drop" else 190
    data = open_bytes(config(seq_len=seq_len, task="copy", task_length=(1, 8), too_long=too_long))
    left_out = [data._train._window(window)[1] for window in range(60)]
    assert max(left_out) > 0 and (left_out[0] > 0.3 if too_long == "drop" else left_out[0] == 0)
    assert data.describe().get("left_out", 0) == left_out[0]
    filled = [(batch["segments"] > 0).sum(1) for batch in map(data.batch, range(60 * data._train.window_rows // 4))]
    assert np.min(filled) > 0 and np.max(filled) <= seq_len


def test_settings_that_no_file_can_hold():
    with pytest.raises(ConfigError, match="data.system holds half a character"):
        config(system="a\udcffb").checked()
    with pytest.raises(ConfigError, match="train.seed has 64 bits"):
        TrainConfig(seed=1 << 63)
