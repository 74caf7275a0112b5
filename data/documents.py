"""Every document of a run in a few flat arrays: ids of the smallest type that holds the vocabulary, one behind the other as
they are read, or in the memory map of a file; where each begins is one row of a table."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from data.arrays import Mapped, Part, TokenRow

TEXT, CHAT, IDS = range(3)
"""Kinds of documents. Those of a source are ordered by kind."""
COLUMNS = SOURCE, KIND, ITEM, HELD, BUFFER, START, LENGTH, WEIGHTS, TRAINED, SIZE = range(10)
"""Of the table: source and kind, number of the item in its file that the document comes from, 1 if held out (known once the
file is read), which array of ids and where in it, number of ids, where the weights stand (-1: all 1), ids that are trained,
bytes of text."""
CHUNK = 1 << 22
"""Ids that are hashed at once."""


class Piece(NamedTuple):
    """A stretch of one document: `ids` has one token more than `weights`, the weights being those of ids[1:]."""

    ids: np.ndarray
    weights: np.ndarray


class Shelf:
    """Takes documents in as they are read. Nothing can be added once they were asked for."""

    def __init__(self, vocab_size: int):
        self._small = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.int32)
        self._ids, self._weights, self._weight = bytearray(), bytearray(), np.dtype(np.uint8)
        self._maps: list[Mapped] = []
        self._table = array("q")

    def __len__(self) -> int:
        return len(self._table) // len(COLUMNS)

    def add(
        self,
        source: int,
        kind: int,
        item: int,
        ids: Sequence[int] | np.ndarray,
        weights: Sequence[float] | np.ndarray | None,
        size: int = 0,
    ) -> None:
        """A document from item number `item` of the file that is being read; `weights` None trains all of it."""
        at, trained = -1, len(ids) - 1
        if weights is not None:
            weights = np.asarray(weights, np.float32)
            if self._weight == np.uint8 and not ((weights == 0) | (weights == 1)).all():
                self._weight = np.dtype(np.float32)
                self._weights = bytearray(np.frombuffer(self._weights, np.uint8).astype(np.float32).tobytes())
            at, trained = len(self._weights) // self._weight.itemsize, np.count_nonzero(weights[1:])
            self._weights += weights.astype(self._weight).tobytes()
        start = len(self._ids) // self._small.itemsize
        self._ids += np.asarray(ids, self._small).tobytes()
        self._table.extend((source, kind, item, 0, 0, start, len(ids), at, trained, size))

    def add_mapped(self, source: int, item: int, part: Part) -> int:
        """Documents that stay where they are, each an item from number `item` on; returns the number of the next one."""
        self._maps.append(part.ids)
        rows = np.zeros((len(part.offsets) - 1, len(COLUMNS)), np.int64)
        rows[:, [SOURCE, KIND, BUFFER, WEIGHTS]] = source, IDS, len(self._maps), -1
        rows[:, START], rows[:, LENGTH] = part.offsets[:-1], np.diff(part.offsets)
        rows[:, TRAINED], rows[:, ITEM] = rows[:, LENGTH] - 1, np.arange(item, item + len(rows))
        self._table.frombytes(rows.tobytes())
        return item + len(rows)

    def hold_out(self, first: int, cut: int) -> None:
        """Hold out what comes from items `cut` and up, among document `first` and all behind it."""
        rows = self.table[first:]
        rows[:, HELD] = rows[:, ITEM] >= cut

    @property
    def table(self) -> np.ndarray:
        """[documents, COLUMNS] int64."""
        return np.frombuffer(self._table, np.int64).reshape(-1, len(COLUMNS))

    @cached_property
    def _arrays(self) -> tuple[list[np.ndarray | Mapped], np.ndarray]:
        return [np.frombuffer(self._ids, self._small), *self._maps], np.frombuffer(self._weights, self._weight)

    def documents(self, held: bool, source: int | None = None) -> Documents | None:
        """Those of all sources or of one, in the order source, kind, as read (held out: kind, source), less those of a single
        token, which predict nothing; None if there are none."""
        table = self.table
        rows = table[(table[:, HELD] == held) & (table[:, LENGTH] > 1) & (source is None or table[:, SOURCE] == source)]
        if not len(rows):
            return None
        rank = rows[:, KIND] if held else rows[:, SOURCE] * (IDS + 1) + rows[:, KIND]
        return Documents(*self._arrays, rows[np.argsort(rank, kind="stable")])

    def text_bytes(self, held: bool) -> int:
        """UTF-8 bytes of the texts."""
        return int(self.table[self.table[:, HELD] == held, SIZE].sum())


class Documents:
    """Some documents of a shelf, each of two tokens or more."""

    def __init__(self, buffers: Sequence[np.ndarray | Mapped], weights: np.ndarray, table: np.ndarray):
        self._buffers, self._weights, self._table = buffers, weights, table
        self.predictions = self._table[:, LENGTH] - 1
        self.tokens, self.trained = int(self._table[:, LENGTH].sum()), int(self._table[:, TRAINED].sum())

    def piece(self, doc: int, start: int, count: int) -> Piece:
        """Predictions start .. start + count of a document; `weights` are uint8 where all documents' are 0 or 1."""
        row = self._table[doc]
        at = row[START] + start
        ids = self._buffers[row[BUFFER]][at : at + count + 1]
        if row[WEIGHTS] < 0:
            return Piece(ids, np.broadcast_to(np.float32(1), count))
        at = row[WEIGHTS] + start
        return Piece(ids, self._weights[at + 1 : at + count + 1])

    def rows(self) -> Iterator[TokenRow]:
        """The documents whole."""
        for row in self._table:
            ids = self._buffers[row[BUFFER]][row[START] : row[START] + row[LENGTH]]
            yield TokenRow(ids, None if row[WEIGHTS] < 0 else self._weights[row[WEIGHTS] : row[WEIGHTS] + row[LENGTH]])

    def fingerprint(self) -> str:
        """Hash of lengths, ids and weights, whatever arrays they stand in."""
        digest = hashlib.sha256(np.cumsum(np.append(0, self._table[:, LENGTH])).astype("<i8").tobytes())
        for ids in self._stretches():
            digest.update(ids.astype("<i4").tobytes())
        if (self._table[:, WEIGHTS] >= 0).any():
            for ids, weights, _ in self.rows():
                digest.update((np.ones(len(ids)) if weights is None else weights).astype("<f4").tobytes())
        return digest.hexdigest()[:16]

    def _stretches(self) -> Iterator[np.ndarray]:
        """All ids in order, as few and long slices as possible."""
        buffer, start = self._table[:, BUFFER], self._table[:, START]
        end = start + self._table[:, LENGTH]
        breaks = np.flatnonzero((buffer[1:] != buffer[:-1]) | (start[1:] != end[:-1]))
        for first, last in zip([0, *(breaks + 1)], [*breaks, len(end) - 1]):
            for at in range(start[first], end[last], CHUNK):
                yield self._buffers[buffer[first]][at : min(at + CHUNK, end[last])]
