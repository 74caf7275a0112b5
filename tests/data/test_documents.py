"""Documents in flat arrays: small, in order, the same for whoever gets a copy."""

import json
import pickle
import tracemalloc

import numpy as np
import pytest

from configs.schema import DataConfig, RunConfig, TrainConfig
from data import documents
from data.arrays import Mapped, Part
from data.chat import Account
from data.documents import CHAT, IDS, TEXT, Shelf
from data.intake import read_documents
from data.render import KimiRenderer
from data.tokenizer import load_tokenizer


def rows(found):
    return [(row.ids.tolist(), None if row.weights is None else row.weights.tolist()) for row in found.rows()]


@pytest.fixture
def shelf(tmp_path):
    """Two sources, the first of all kinds, its last item held out."""
    np.save(tmp_path / "a.npy", np.array([1, 2, 1, 3, 4, 1]))
    shelf = Shelf(320)
    shelf.add(0, CHAT, 0, [5, 6], [0.0, 1.0])
    shelf.add(0, TEXT, 1, [7, 8, 9], None, size=3)
    shelf.add(0, CHAT, 2, [10, 11], [1.0, 1.0])
    shelf.hold_out(0, 2)
    assert shelf.add_mapped(0, 0, Part(Mapped(tmp_path / "a.npy"), np.array([0, 2, 5, 6]))) == 3
    shelf.hold_out(3, 3)
    shelf.add(1, TEXT, 0, [12, 13], None, size=2)
    shelf.hold_out(6, 1)
    return shelf


def test_order_and_kinds(shelf):
    text, chat, arrays = [([7, 8, 9], None)], [([5, 6], [0, 1])], [([1, 2], None), ([1, 3, 4], None)]
    assert rows(shelf.documents(held=False, source=0)) == text + chat + arrays
    assert rows(shelf.documents(held=False)) == text + chat + arrays + [([12, 13], None)]
    assert rows(shelf.documents(held=True)) == [([10, 11], [1, 1])]
    assert shelf.documents(held=True, source=1) is None
    assert (shelf.text_bytes(held=False), shelf.text_bytes(held=True)) == (5, 0)
    assert (shelf.documents(held=False).tokens, shelf.documents(held=False).trained) == (12, 7)


def test_the_fingerprint_is_of_the_content(shelf, monkeypatch):
    whole = shelf.documents(held=False)
    plain = Shelf(1 << 17)
    for ids, weights in rows(whole):
        plain.add(0, IDS, 0, ids, [1.0] * len(ids) if weights is None else weights)
    plain.hold_out(0, 1)
    assert plain.documents(held=False).fingerprint() == whole.fingerprint()
    monkeypatch.setattr(documents, "CHUNK", 2)
    assert shelf.documents(held=False).fingerprint() == whole.fingerprint()


def test_weights_other_than_0_and_1_are_kept(shelf):
    small = shelf.documents(held=False).piece(1, 0, 1).weights
    assert small.dtype == np.uint8 and small == [1]
    fresh = Shelf(320)
    fresh.add(0, IDS, 0, [1, 2, 3], [0.0, 1.0, 1.0])
    fresh.add(0, IDS, 1, [4, 5, 6], [0.0, 0.5, 2.0])
    fresh.hold_out(0, 2)
    assert rows(fresh.documents(held=False)) == [([1, 2, 3], [0.0, 1.0, 1.0]), ([4, 5, 6], [0.0, 0.5, 2.0])]


def test_arrays_stay_in_their_file(tmp_path):
    """Neither a shelf nor a copy for another process holds the ids."""
    np.save(tmp_path / "a.npy", np.zeros(10**6, np.int32))
    shelf = Shelf(320)
    shelf.add_mapped(0, 0, Part(Mapped(tmp_path / "a.npy"), np.array([0, 10**6])))
    shelf.hold_out(0, 1)
    found = shelf.documents(held=False)
    assert len(copy := pickle.dumps(found)) < 10**4 and pickle.loads(copy).fingerprint() == found.fingerprint()
    mapped = Mapped(tmp_path / "a.npy")
    assert isinstance(mapped.array.base, np.memmap) and np.shares_memory(mapped.array, mapped[5:9])


def test_a_corpus_is_not_held_several_times(tmp_path):
    """Two bytes an id, one a weight, and what one row takes while it is read."""
    talk = {"messages": [{"role": "user", "content": "q" * 500}, {"role": "assistant", "content": "a" * 500}]}
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(talk) for _ in range(200)))
    cfg = RunConfig(data=DataConfig(paths=(str(tmp_path / "a.jsonl"),)), train=TrainConfig(seq_len=2048))
    renderer = KimiRenderer(load_tokenizer("bytes"))
    tracemalloc.start()
    try:
        read_documents(cfg, renderer, Account())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 6 * (tmp_path / "a.jsonl").stat().st_size
