"""Pre-tokenised data: `.npy` arrays, and ArrayRecord files whose records are `.npy` arrays.

file.npy, 1-D integers    documents one after the other, each beginning with [BOS]; read through a memory map
file.npy, 2-D integers    one document a row
file.array_record         a record is a 1-D integer array, optionally followed by a float array of loss weights,
                          each as numpy.save writes it; the first record may name the tokenizer (MADE_BY)
"""

from __future__ import annotations

import io
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from configs.schema import ConfigError
from data.messages import RowError

DAMAGED = (ValueError, TypeError, OSError, EOFError, SyntaxError, OverflowError, MemoryError, tokenize.TokenError)
"""What numpy raises for a header that is none, or that tells of an array which is not there."""
MADE_BY = b"abruzzi tokenizer "
"""What the first record of an index begins with; the rest of it is the fingerprint of the tokenizer."""
AT_ONCE = 1 << 10
"""Records that are read together."""
CHUNK = 1 << 24
"""Ids of a memory map that are looked at together."""


class Unreadable(ConfigError):
    """A file or a line that cannot be read as what its ending says, and why; in a folder such a file is passed over."""


class TokenRow(NamedTuple):
    """A document as token ids; `weights` None trains all of it. `where` it stands in a file."""

    ids: np.ndarray
    weights: np.ndarray | None
    where: str = ""


class Mapped:
    """The ids of a .npy file as one memory-mapped line (a 2-D array in Fortran order is copied). Copies for other processes
    map the file anew."""

    def __init__(self, path: Path):
        self.path = path
        self.array = np.asarray(np.lib.format.open_memmap(path, mode="r"))
        self._flat = self.array.reshape(-1)

    def __reduce__(self) -> tuple:
        return Mapped, (self.path,)

    def __getitem__(self, part: slice) -> np.ndarray:
        return self._flat[part]


class Part(NamedTuple):
    """The documents of a memory-mapped array: document i is ids[offsets[i]:offsets[i + 1]]."""

    ids: Mapped
    offsets: np.ndarray


def not_ids(array: np.ndarray) -> str | None:
    """Why these are no token ids of any vocabulary, or None."""
    if array.size == 0:
        return "is empty"
    return None if np.issubdtype(array.dtype, np.integer) else f"holds {array.dtype}, not integer token ids"


def unknown_id(ids: np.ndarray, vocab_size: int) -> str | None:
    """Which id lies outside the vocabulary, or None."""
    lo, hi = int(ids.min()), int(ids.max())
    if lo < 0 or hi >= vocab_size:
        return (
            f"holds token id {lo if lo < 0 else hi}, outside the vocabulary of {vocab_size}; was it made with another tokenizer?"
        )
    return None


def checked_row(ids: np.ndarray, weights: np.ndarray | None, where: str, vocab_size: int) -> TokenRow:
    """RowError unless these are ids of the vocabulary, with a weight for each if any, and train something."""
    if ids.ndim != 1 or weights is not None and weights.shape != ids.shape:
        raise RowError("needs a 1-D array of ids and weights of the same length")
    if reason := not_ids(ids) or unknown_id(ids, vocab_size):
        raise RowError(reason)
    if weights is not None and not (np.isfinite(weights) & (weights >= 0)).all():
        raise RowError("has a weight that is negative or not finite")
    if weights is not None and not weights[1:].any():
        raise RowError("trains no token: all weights behind the first are 0")
    return TokenRow(ids, weights, where)


def read_npy(path: Path, vocab_size: int, bos_id: int) -> Part:
    """Documents of a .npy file. Unreadable if it holds anything but one or two dimensions of integers, ConfigError for ids
    outside the vocabulary."""
    try:
        ids = Mapped(path)
    except DAMAGED as error:
        raise Unreadable(f"is not a readable .npy array: {error}") from None
    array = ids.array
    if reason := not_ids(array):
        raise Unreadable(reason)
    if array.ndim not in (1, 2):
        raise Unreadable(f"has {array.ndim} dimensions; token ids need 1 or 2")
    if reason := unknown_id(array, vocab_size):
        raise ConfigError(f"data.paths: {path} {reason}")
    if array.ndim == 2:
        return Part(ids, np.arange(array.shape[0] + 1) * array.shape[1])
    starts = [at + np.flatnonzero(array[at : at + CHUNK] == bos_id) for at in range(0, len(array), CHUNK)]
    starts = np.concatenate(starts)
    return Part(ids, np.concatenate([[0], starts[starts > 0], [len(array)]]))


def numbered_records(path: Path, fingerprint: str, tokenizer: str) -> Iterator[tuple[str, bytes]]:
    """(where, record) of an ArrayRecord file. ConfigError if it is none, has none, or names a tokenizer of another
    `fingerprint` than that of data.tokenizer=`tokenizer`."""
    found = False
    for number, record in enumerate(_records(path)):
        if number == 0 and record.startswith(MADE_BY):
            if record != MADE_BY + fingerprint.encode():
                raise ConfigError(
                    f"{path} was made with another tokenizer than data.tokenizer={tokenizer}; name the one it "
                    f"was made with, or make it anew with launch.py data --index"
                )
            continue
        found = True
        yield f"{path} record {number}", record
    if not found:
        raise ConfigError(f"{path} holds no records")


def _records(path: Path) -> Iterator[bytes]:
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(str(path))
        number = reader.num_records()
        for at in range(0, number, AT_ONCE):
            yield from reader.read(at, min(at + AT_ONCE, number))
        reader.close()
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"{path} is not a readable ArrayRecord file: {error}") from None


def record_row(record: bytes, where: str, vocab_size: int) -> TokenRow:
    """The document of a record. RowError if it cannot be used."""
    stream = io.BytesIO(record)
    try:
        ids = np.lib.format.read_array(stream, allow_pickle=False)
        weights = np.lib.format.read_array(stream, allow_pickle=False) if stream.tell() < len(record) else None
    except DAMAGED as error:
        raise RowError(f"is not an array as numpy.save writes it: {error}") from None
    if stream.tell() < len(record):
        raise RowError(f"has {len(record) - stream.tell()} bytes behind its ids and weights")
    if weights is not None and weights.dtype.kind not in "buif":
        raise RowError(f"has weights of {weights.dtype}, which are no numbers to weigh with")
    return checked_row(ids, None if weights is None else weights.astype(np.float32), where, vocab_size)


def write_array_record(path: Path, rows: Iterable[TokenRow], fingerprint: str | None = None) -> int:
    """Write rows as `record_row` reads them, and which tokenizer made them if it is known; returns their number."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    if fingerprint:
        writer.write(MADE_BY + fingerprint.encode())
    count = 0
    for ids, weights, _ in rows:
        stream = io.BytesIO()
        np.save(stream, np.asarray(ids, np.int32), allow_pickle=False)
        if weights is not None:
            np.save(stream, np.asarray(weights, np.float32), allow_pickle=False)
        writer.write(stream.getvalue())
        count += 1
    writer.close()
    return count
