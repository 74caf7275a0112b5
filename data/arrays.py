"""Pre-tokenised data: `.npy` arrays, and ArrayRecord files whose records are `.npy` arrays.

    file.npy, 1-D integers    documents one after the other, each beginning with [BOS]; read through a memory map
    file.npy, 2-D integers    one document a row
    file.array_record         a record is a 1-D integer array, optionally followed by a float array of loss weights,
                              each as numpy.save writes it
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from configs.schema import ConfigError


class TokenRow(NamedTuple):
    """A document as token ids; `weights` None trains all of it."""

    ids: np.ndarray
    weights: np.ndarray | None


def check_ids(ids: np.ndarray, vocab_size: int, where: str) -> None:
    """ConfigError unless these are ids of the vocabulary."""
    if not np.issubdtype(ids.dtype, np.integer):
        raise ConfigError(f"{where} holds {ids.dtype}, not integer token ids")
    if ids.size == 0:
        raise ConfigError(f"{where} is empty")
    lo, hi = int(ids.min()), int(ids.max())
    if lo < 0 or hi >= vocab_size:
        raise ConfigError(f"{where} holds token id {lo if lo < 0 else hi}, outside the vocabulary of {vocab_size}; "
                          f"was it made with another tokenizer?")


def check_weights(row: TokenRow) -> str | None:
    """Why ids and weights do not belong together, or None."""
    if row.ids.ndim != 1 or row.weights is not None and row.weights.shape != row.ids.shape:
        return "needs a 1-D array of ids and weights of the same length"
    if row.weights is not None and not (np.isfinite(row.weights) & (row.weights >= 0)).all():
        return "has a weight that is negative or not finite"
    return None


def read_npy(path: Path, vocab_size: int, bos_id: int) -> list[TokenRow]:
    """Documents of a .npy file, as views of the memory-mapped array."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{path} is not a readable .npy array: {error}") from None
    check_ids(array, vocab_size, str(path))
    if array.ndim == 2:
        return [TokenRow(row, None) for row in array]
    if array.ndim != 1:
        raise ConfigError(f"{path} has {array.ndim} dimensions; token ids need 1 or 2")
    cuts = np.flatnonzero(array == bos_id)
    return [TokenRow(part, None) for part in np.split(array, cuts[cuts > 0])]


def read_array_record(path: Path, vocab_size: int) -> list[TokenRow]:
    """All records of an ArrayRecord file."""
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(str(path))
        records = reader.read_all() if reader.num_records() else []
        reader.close()
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"{path} is not a readable ArrayRecord file: {error}") from None
    if not records:
        raise ConfigError(f"{path} holds no records")
    rows = []
    for number, record in enumerate(records):
        stream = io.BytesIO(record)
        try:
            ids = np.load(stream, allow_pickle=False)
            weights = np.load(stream, allow_pickle=False) if stream.tell() < len(record) else None
        except (ValueError, EOFError) as error:
            raise ConfigError(f"{path} record {number} is not an array as numpy.save writes it: {error}") from None
        check_ids(ids, vocab_size, f"{path} record {number}")
        rows.append(TokenRow(ids, weights))
        if reason := check_weights(rows[-1]):
            raise ConfigError(f"{path} record {number} {reason}")
    return rows


def write_array_record(path: Path, rows: Iterable[TokenRow]) -> int:
    """Write rows for `read_array_record`; returns their number."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    count = 0
    for ids, weights in rows:
        stream = io.BytesIO()
        np.save(stream, np.asarray(ids, np.int32), allow_pickle=False)
        if weights is not None:
            np.save(stream, np.asarray(weights, np.float32), allow_pickle=False)
        writer.write(stream.getvalue())
        count += 1
    writer.close()
    return count
