"""The order of rows: the same for every number of hosts and workers and after every restart; mixtures are exact."""

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from configs.schema import ConfigError, DataConfig, RunConfig, TrainConfig
from data.mixture import PERIOD, MixedStream, quotas
from data.pipeline import open_data
from data.tokenizer import load_tokenizer
from tests.data.histories import batch_hash

BATCH = 8


def config(tmp_path, kind, mixture=()):
    paths = []
    if kind != "task":
        for name in "ab":
            path = tmp_path / f"{name}.jsonl"
            path.write_text("\n".join(f'{{"text": "{name} {i} {"x" * (i * 7 % 90)}"}}' for i in range(60)))
            paths.append(str(path))
    return RunConfig(
        data=DataConfig(paths=tuple(paths), mixture=mixture, seed=3),
        train=TrainConfig(batch_size=BATCH, seq_len=128, eval_batches=1),
    )


def hashes(batches, count):
    """The rolling hash after each batch."""
    out, rolling = [], ""
    for _, batch in zip(range(count), batches):
        rolling = batch_hash(batch, rolling)
        out.append(rolling)
    return out


@pytest.mark.parametrize("kind", ["text", "task", "mixture"])
def test_hosts_and_restarts(tmp_path, kind):
    cfg = config(tmp_path, kind, (1.0, 3.0) if kind == "mixture" else ())
    fresh = lambda: open_data(cfg, load_tokenizer("bytes"))  # noqa: E731  a restarted process
    data = fresh()
    steps = 12
    expected = [batch_hash(data.batch(step)) for step in range(steps)]
    assert len(set(expected)) == steps
    for hosts in (1, 2, 4, 8):
        size = BATCH // hosts
        iterators = [fresh().iterate(0, slice(h * size, (h + 1) * size)) for h in range(hosts)]
        for step in range(4):
            parts = [next(iterator) for iterator in iterators]
            assert batch_hash({k: np.concatenate([p[k] for p in parts]) for k in parts[0]}) == expected[step]
    for restart in (7, 3, 11):
        assert batch_hash(next(fresh().iterate(restart))) == expected[restart]


@pytest.mark.parametrize("workers", [1, 4])
def test_workers(tmp_path, workers):
    cfg = config(tmp_path, "mixture", (1.0, 3.0))
    data = open_data(cfg, load_tokenizer("bytes"))
    assert hashes(data.iterate(2, workers=workers), 5) == hashes(map(data.batch, range(2, 7)), 5)


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
@pytest.mark.parametrize("workers", [0, 1, 4])
def test_every_number_of_hosts_and_workers(tmp_path, hosts, workers):
    """The whole table, each cell restarted at two random steps."""
    cfg = config(tmp_path, "mixture", (1.0, 3.0))
    data, size = open_data(cfg, load_tokenizer("bytes")), BATCH // hosts
    for start in np.random.default_rng([hosts, workers]).integers(0, 500, 2).tolist():
        parts = [data.iterate(start, slice(h * size, (h + 1) * size), workers) for h in range(hosts)]
        for step in range(start, start + 3):
            arrived = [next(part) for part in parts]
            whole = {name: np.concatenate([part[name] for part in arrived]) for name in arrived[0]}
            assert batch_hash(whole) == batch_hash(data.batch(step))


def test_threads_do_not_disturb_each_other(tmp_path):
    cfg = config(tmp_path, "text")
    data, steps = open_data(cfg, load_tokenizer("bytes")), range(60)  # about fifteen epochs
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda step: batch_hash(data.batch(step)), reversed(steps)))
    fresh = open_data(cfg, load_tokenizer("bytes"))
    assert found[::-1] == [batch_hash(fresh.batch(step)) for step in steps]


def test_rolling_hash_sees_a_swap():
    a, b = {"x": np.zeros(2)}, {"x": np.ones(2)}
    assert hashes([a, b], 2)[-1] != hashes([b, a], 2)[-1]


class Counting:
    """A stream whose row n is n."""

    def row(self, number):
        return number

    def fingerprint(self):
        return "counting"


def test_mixture_holds_exactly_and_skips_nothing():
    streams = [Counting(), Counting(), Counting()]
    mixed = MixedStream(streams, [(0, (1, 2, 5))], seed=0)
    located = [mixed.locate(r) for r in range(2 * PERIOD)]
    for stream, share in enumerate((1 / 8, 2 / 8, 5 / 8)):
        rows = [row for s, row in located if s == stream]
        assert rows == list(range(int(2 * PERIOD * share)))
        assert abs(sum(s == stream for s, _ in located[:100]) - 100 * share) < 20


def test_an_edited_mixture_goes_on_where_each_source_stands():
    streams = [Counting(), Counting()]
    mixed = MixedStream(streams, [(0, (1, 1)), (1500, (1, 9)), (1700, (9, 1))], seed=0)
    before = MixedStream(streams, [(0, (1, 1))], seed=0)
    located = [mixed.locate(r) for r in range(4000)]
    assert located[:1500] == [before.locate(r) for r in range(1500)]
    for stream in (0, 1):
        assert [row for s, row in located if s == stream] == list(range(sum(s == stream for s, _ in located)))
    assert sum(s == 0 for s, _ in located[1700 : 1700 + PERIOD]) == round(0.9 * PERIOD)


def test_mixture_of_a_run(tmp_path):
    cfg = config(tmp_path, "mixture", (1.0, 3.0))
    tokenizer = load_tokenizer("bytes")
    data = open_data(cfg, tokenizer)
    text = "".join(tokenizer.decode(row) for step in range(PERIOD // BATCH) for row in data.batch(step)["tokens"])
    share = text.count("[BOS]b") / (text.count("[BOS]a") + text.count("[BOS]b"))
    assert abs(share - 0.75) < 0.02  # exact in rows; the number of documents in a row varies
    edited = open_data(
        dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, mixture=(1.0, 1.0))),
        tokenizer,
        earlier_mixtures=[(5, (1.0, 3.0))],
    )
    same = [batch_hash(edited.batch(step)) == batch_hash(data.batch(step)) for step in (0, 4, 5, 6)]
    assert same == [True, True, False, False]
    assert edited.plan_hash != data.plan_hash


def test_what_a_row_of_each_source_holds(tmp_path):
    """The mixture is one of rows: text fills them, short conversations that fit no second time do not."""
    cfg = config(tmp_path, "mixture", (1.0, 1.0))
    talk = {"messages": [{"role": "user", "content": "q" * 60}, {"role": "assistant", "content": "a" * 9}]}
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(talk) for _ in range(20)))
    data = open_data(cfg, load_tokenizer("bytes"))
    text, chat = data.describe()["sources"]
    batches = [data.batch(step) for step in range(2 * chat["rows_per_epoch"] // BATCH)]
    full = np.concatenate([(batch["segments"] > 0).sum(1) for batch in batches])
    trained = np.concatenate([(batch["weights"] > 0).sum(1) for batch in batches])
    assert set(full[trained == chat["trained_per_row"]]) == {chat["filled_per_row"]} and chat["filled_per_row"] < 100
    assert text["filled_per_row"] == text["trained_per_row"] > 110 and text["share"] == chat["share"] == 0.5


@pytest.mark.parametrize(
    "weights", [(1.0,), (1.0, 0.0), (1.0, 2.0, 3.0), (1.0, np.nan), (np.nan, 1.0), (1.0, np.inf), (1e308, 1e308)]
)
def test_weights_that_do_not_fit(tmp_path, weights):
    with pytest.raises(ConfigError, match="data.mixture"):
        config(tmp_path, "mixture", weights)


def test_a_weight_too_small():
    assert quotas((1, 1023)).tolist() == [1, 1023]
    with pytest.raises(ConfigError, match="under 1/1024"):
        quotas((1, 9999))
    with pytest.raises(ConfigError, match="under 1/1024"):  # when data is opened, which is before a run writes anything
        MixedStream([None, None], [(0, (1, 1)), (8, (1, 9999))], 0)
