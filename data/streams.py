"""Endless streams of packed rows. Row r of a stream is a pure function of r: no stream remembers what was read."""

from __future__ import annotations

import hashlib
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from configs.schema import ConfigError, DataConfig
from data import packing, plan
from data.chat import fits, shortened
from data.documents import Documents, Piece
from data.problem import Draw, Problem
from data.render import KimiRenderer, Rendered
from data.tasks import Split, longest_problem, make_problem

WINDOW_TOKENS = 1 << 17
"""Tokens of task problems that are drawn and packed together."""
FEW_FIT = 16
"""With data.too_long=drop, more rows than this are left out for each that is taken: the settings are a mistake."""


class RowStream(Protocol):
    """Packed rows by number."""

    def row(self, number: int) -> list[Piece]: ...
    def fingerprint(self) -> str: ...
    def describe(self) -> dict[str, Any]: ...


class Memo:
    """The last few results of a function of one integer. Threads share one computation; copies start empty."""

    def __init__(self, function: Callable[[int], Any], keep: int = 4):
        self._function, self._keep = function, keep
        self.__setstate__(None)

    def __getstate__(self) -> tuple:
        return self._function, self._keep

    def __setstate__(self, state: tuple | None) -> None:
        if state:
            self._function, self._keep = state
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.RLock()

    def __call__(self, key: int) -> Any:
        with self._lock:
            if key not in self._kept:
                self._kept[key] = self._function(key)
                if len(self._kept) > self._keep:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return self._kept[key]


class DocumentStream:
    """Epochs over a finite set of documents, each epoch shuffled, cut and packed anew."""

    def __init__(self, documents: Documents, seq_len: int, *key: int):
        self.documents, self.seq_len, self.key = documents, seq_len, key
        self._epoch = Memo(self._pack, keep=2)
        self._first_row = [0]

    def _pack(self, epoch: int) -> tuple[plan.Pieces, list[list[int]]]:
        return plan.pack_epoch(self.documents.predictions, self.seq_len, *self.key, epoch)

    def row(self, number: int) -> list[Piece]:
        while number >= self._first_row[-1]:
            known = len(self._first_row)
            behind = self._first_row[known - 1] + len(self._epoch(known - 1)[1])
            self._first_row[known : known + 1] = [behind]  # two threads may do this at once, and both write the same
        epoch = bisect_right(self._first_row, number) - 1
        pieces, rows = self._epoch(epoch)
        return [
            self.documents.piece(pieces.doc[i], pieces.start[i], pieces.count[i]) for i in rows[number - self._first_row[epoch]]
        ]

    def fingerprint(self) -> str:
        return self.documents.fingerprint()

    def describe(self) -> dict[str, Any]:
        pieces, rows = self._epoch(0)
        documents = self.documents
        return {
            "documents": len(documents.predictions),
            "tokens": documents.tokens,
            "rows_per_epoch": len(rows),
            "filled_per_row": int(documents.predictions.sum()) / len(rows),
            "trained_per_row": documents.trained / len(rows),
            "padding": packing.padding(rows, pieces.count, self.seq_len),
            "least_padding": packing.least_padding(pieces.count, self.seq_len),
        }


class TaskStream:
    """Fresh problems of a built-in task for ever. Windows of a fixed number of rows are drawn and packed on demand.

    What does not fit is an error only before anything is trained, for the longest problem that there can be, and for what
    the first window of those to train holds. Under tokenizers whose pieces have several characters a later one may still be
    longer: it is left out, as data.too_long=drop does with every one, and another is drawn.
    """

    def __init__(self, data: DataConfig, seq_len: int, renderer: KimiRenderer, split: Split):
        self.data, self.seq_len, self.renderer, self.split = data, seq_len, renderer, split
        self.window_rows = max(8, WINDOW_TOKENS // seq_len)
        self._window = Memo(self._draw)
        if data.too_long != "drop":
            self._rows(longest_problem(data.task, data.task_length[1]), must_fit=True)

    def _problem(self, window: int, number: int) -> Problem:
        data = self.data
        length = Draw("length", self.split, data.seed, window, number).between(*data.task_length)
        return make_problem(data.task, data.seed, window << 32 | number, length, self.split)

    def _rows(self, problem: Problem, must_fit: bool) -> list[Rendered | None]:
        """The training rows of a problem, None in the place of one that does not fit. ConfigError instead if it must."""
        data, rows = self.data, self.renderer.rows(problem.messages, problem.tools, self.data.mode)
        for at, row in enumerate(rows):
            if fits(row, self.seq_len):
                continue
            rows[at] = None
            if data.too_long == "shorten":
                rows[at] = shortened(problem.messages[: row.end], problem.tools, self.renderer, data.mode, self.seq_len)
            if must_fit and rows[at] is None:
                raise ConfigError(
                    f"a {data.task} problem of up to {data.task_length[1]} steps can take {len(row.ids) - 1} "
                    f"tokens; raise train.seq_len={self.seq_len}, lower data.task_length, or have another one "
                    "drawn instead with data.too_long=drop"
                )
        return rows

    def _draw(self, window: int) -> tuple[list[list[Piece]], float]:
        """The rows of a window, and the share of its problems' rows that were left out."""
        drawn: list[Rendered] = []
        number = total = left_out = 0
        judged = window == 0 and self.split == "train"
        while total < self.window_rows * self.seq_len:
            rows = self._rows(self._problem(window, number), must_fit=judged and self.data.too_long != "drop")
            taken = [row for row in rows if row is not None]
            left_out += len(rows) - len(taken)
            if judged and left_out > FEW_FIT * (len(drawn) + FEW_FIT):
                raise ConfigError(
                    f"hardly a {self.data.task} problem fits train.seq_len={self.seq_len}: {left_out} rows are "
                    f"too long and {len(drawn)} are not; raise it or lower data.task_length"
                )
            drawn += taken
            total += sum(len(row.ids) - 1 for row in taken)
            number += 1
        counts = np.array([len(row.ids) - 1 for row in drawn])
        packed = packing.pack(counts, self.seq_len, self.window_rows)
        pieces = [Piece(np.array(row.ids, np.int32), np.array(row.weights[1:], np.float32)) for row in drawn]
        rows = [[pieces[i] for i in packed[row]] for row in plan.shuffled(len(packed), self.data.seed, window)]
        return rows, left_out / (left_out + len(drawn))

    def row(self, number: int) -> list[Piece]:
        return self._window(number // self.window_rows)[0][number % self.window_rows]

    def fingerprint(self) -> str:
        first = self.row(0)
        return hashlib.sha256(b"".join(p.ids.tobytes() + p.weights.tobytes() for p in first)).hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        window, left_out = self._window(0)
        counts = np.array([len(piece.weights) for row in window for piece in row])
        return {
            "task": self.data.task,
            "steps": self.data.task_length,
            "padding": 1 - counts.sum() / (len(window) * self.seq_len),
            "least_padding": packing.least_padding(counts, self.seq_len),
            "problems_per_row": sum(map(len, window)) / len(window),
        } | ({"left_out": left_out} if left_out else {})
