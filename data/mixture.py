"""Several row streams in fixed proportions of rows: which stream row r comes from, and which of its rows, follows from r."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from configs.schema import ConfigError
from data.documents import Piece
from data.plan import shuffled
from data.streams import RowStream

PERIOD = 1024
"""Rows in which the proportions hold exactly."""

Table = Sequence[tuple[int, Sequence[float]]]
"""(first row, weights of the streams) of every mixture a run has had, in order."""


def quotas(weights: Sequence[float]) -> np.ndarray:
    """Rows of each stream in a period, by largest remainder. ConfigError when a weight is too small for one row."""
    shares = np.asarray(weights, np.float64) / np.sum(weights) * PERIOD
    rows = np.floor(shares).astype(np.int64)
    rows[np.argsort(rows - shares, kind="stable")[: PERIOD - rows.sum()]] += 1
    if (rows == 0).any():
        raise ConfigError(
            f"data.mixture: weight {weights[int(np.argmin(rows))]:g} is under 1/{PERIOD} of the sum; "
            f"raise it or leave the path out"
        )
    return rows


class MixedStream:
    """Rows from several streams. A new mixture goes on where each stream stands: no row is repeated or skipped."""

    def __init__(self, streams: Sequence[RowStream], table: Table, seed: int):
        self.streams, self.seed = streams, seed
        self.table = [(first, list(weights)) for first, weights in table]
        self._quotas = [quotas(weights) for _, weights in self.table]
        self._starts = [np.zeros(len(streams), np.int64)]
        for index, (first, _) in enumerate(self.table[1:]):
            self._starts.append(self._starts[-1] + self._used(index, first - self.table[index][0]))

    def _period(self, index: int, period: int) -> np.ndarray:
        """[PERIOD] the stream of every row of one period of mixture `index`."""
        rows = self._quotas[index]
        return np.repeat(np.arange(len(rows)), rows)[shuffled(PERIOD, self.seed, 4, index, period)]

    def _used(self, index: int, rows: int) -> np.ndarray:
        """[streams] how many rows each stream gave to the first `rows` rows of mixture `index`."""
        period, rest = divmod(rows, PERIOD)
        partial = np.bincount(self._period(index, period)[:rest], minlength=len(self.streams))
        return self._quotas[index] * period + partial

    def locate(self, number: int) -> tuple[int, int]:
        """(stream, its row) of a row of the mixture."""
        index = max(i for i, (first, _) in enumerate(self.table) if first <= number)
        row = number - self.table[index][0]
        stream = int(self._period(index, row // PERIOD)[row % PERIOD])
        return stream, int(self._starts[index][stream] + self._used(index, row)[stream])

    def row(self, number: int) -> list[Piece]:
        stream, row = self.locate(number)
        return self.streams[stream].row(row)

    def fingerprint(self) -> str:
        facts = [self.table, [stream.fingerprint() for stream in self.streams]]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        share = self._quotas[-1] / PERIOD
        return {"sources": [stream.describe() | {"share": float(s)} for stream, s in zip(self.streams, share)]}
