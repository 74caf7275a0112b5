"""Which pieces of which documents stand in which row: a pure function of (lengths, seed, epoch).

A row has S places. A place is one prediction, a (token, target) pair, so a document of n tokens fills n - 1 of them.
Rows are packed over windows of a shuffled order (data/packing.py). Shuffling sorts by a hash that is written out below, so no
library version can change the order of a run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.packing import pack

WINDOW = 8192
"""Pieces packed together: enough that text leaves well under 0.5 % padding, few enough to stay shuffled."""
LONG = 16
"""A document of this many rows is cut at a random phase."""


def mix64(x: np.ndarray) -> np.ndarray:
    """A bijective scrambler of 64-bit words (the finaliser of SplitMix64, Steele, Lea and Flood 2014)."""
    x = x.astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draws(count: int, *key: int) -> np.ndarray:
    """[count] uint64 words that depend on the key and on their index only."""
    state = np.zeros(1, np.uint64)
    for part in key:
        state = mix64(state + np.uint64(part % 2**64) + np.uint64(0x9E3779B97F4A7C15))
    return mix64(state + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def shuffled(count: int, *key: int) -> np.ndarray:
    """[count] int64, a permutation that depends on the key only."""
    return np.argsort(draws(count, *key), kind="stable")


@dataclass(frozen=True)
class Pieces:
    """Parallel arrays: piece i is the predictions start[i] .. start[i] + count[i] of document doc[i]."""

    doc: np.ndarray
    start: np.ndarray
    count: np.ndarray


def cut_pieces(counts: np.ndarray, seq_len: int, *key: int) -> Pieces:
    """Cut documents of `counts` predictions into pieces of at most seq_len, each prediction in exactly one piece.

    The first piece of a long document has a length drawn from the key, so that every epoch cuts at other places.
    Shorter documents are cut into full pieces and a rest: two odd pieces of each would fit each other badly.
    """
    counts = np.asarray(counts, np.int64)
    drawn = (draws(len(counts), *key) % np.uint64(seq_len)).astype(np.int64) + 1
    first = np.where(counts >= LONG * seq_len, drawn, np.minimum(counts, seq_len))
    number = 1 + -(-(counts - first) // seq_len)
    doc = np.repeat(np.arange(len(counts)), number)
    ordinal = np.arange(len(doc)) - np.repeat(np.cumsum(number) - number, number)
    start = np.where(ordinal == 0, 0, first[doc] + (ordinal - 1) * seq_len)
    end = np.minimum(first[doc] + ordinal * seq_len, counts[doc])
    return Pieces(doc, start, end - start)


def pack_epoch(counts: np.ndarray, seq_len: int, *key: int) -> tuple[Pieces, list[list[int]]]:
    """The pieces of one epoch and its rows (lists of piece indices), shuffled by the key (seed, ..., epoch)."""
    pieces = cut_pieces(counts, seq_len, *key, 1)
    order = shuffled(len(pieces.doc), *key, 2)
    rows: list[list[int]] = []
    for at in range(0, len(order), WINDOW):
        window = order[at : at + WINDOW]
        packed = pack(pieces.count[window], seq_len)
        for row in shuffled(len(packed), *key, 3, at):
            rows.append([int(window[i]) for i in packed[row]])
    return pieces, rows
