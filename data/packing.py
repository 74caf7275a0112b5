"""Filling rows of a fixed number of places with stretches that may not be cut.

Two ways, both a pure function of the lengths and of their order. `best_fit` is all that lengths of every size need. Where
a row holds only a few stretches and none is short, as with conversations, it runs out of fitting ones early;
`completed` then fills most rows to the last place.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Rows = list[list[int]]
"""For each row, indices into the lengths."""

ENOUGH = 0.005
"""Share of padding under which the second way is not tried."""
THIRDS = 8
"""Stretches that `completed` tries as a third one where one or two do not fill a row."""


def pack(counts: np.ndarray, capacity: int, max_rows: int | None = None) -> Rows:
    """Rows of `capacity` places, each of the counts (at most that long) in one. The better of the two ways.

    With `max_rows`, what fits no row is left out.
    """
    rows = best_fit(counts, capacity, max_rows)
    if padding(rows, counts, capacity) <= ENOUGH:
        return rows
    return min(rows, completed(counts, capacity, max_rows), key=lambda made: padding(made, counts, capacity))


def padding(rows: Rows, counts: np.ndarray, capacity: int) -> float:
    """Share of the places that stay empty."""
    return 1 - sum(int(counts[row].sum()) for row in rows) / (len(rows) * capacity) if rows else 0.0


def least_padding(counts: np.ndarray, capacity: int) -> float:
    """A bound that no way of packing can beat (Martello and Toth 1990, L2): for every length k up to half a row, stretches
    longer than capacity - k stand alone if what is shorter than k is set aside, others longer than half a row have a row
    each, and what is left of those rows takes in the rest at best."""
    number = np.bincount(counts, minlength=capacity + 1)
    many, much = np.cumsum(number), np.cumsum(number * np.arange(capacity + 1))  # of length c and less
    half = capacity // 2
    k = np.arange(1, half + 2)
    alone = many[-1] - many[capacity - k]
    large, of_large = many[capacity - k] - many[half], much[capacity - k] - much[half]
    small = much[half] - much[k - 1]
    beyond = np.maximum(0, small - (large * capacity - of_large))
    rows = max(int(np.max(alone + large + -(-beyond // capacity))), -(-int(much[-1]) // capacity))
    return 1 - int(much[-1]) / (rows * capacity)


def best_fit(counts: np.ndarray, capacity: int, max_rows: int | None = None) -> Rows:
    """Longest first, each into the row whose free space it leaves smallest.

    Rows with r free places hang on list r; one big integer has bit r set where that list is not empty, so the fullest
    row that still fits is found by counting trailing zeros.
    """
    rows: Rows = []
    by_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    open_spaces = 0
    for index in np.argsort(-counts, kind="stable"):
        count = int(counts[index])
        fitting = open_spaces >> count
        if fitting:
            space = count + ((fitting & -fitting).bit_length() - 1)
            row = by_space[space].pop()
            if not by_space[space]:
                open_spaces &= ~(1 << space)
        elif max_rows is None or len(rows) < max_rows:
            space, row = capacity, len(rows)
            rows.append([])
        else:
            continue
        rows[row].append(int(index))
        if space > count:
            by_space[space - count].append(row)
            open_spaces |= 1 << (space - count)
    return rows


class _Shelf:
    """Stretches by length. Bit c of `lengths` is set where one of length c is left, bit (capacity - c) of `mirrored`, and bit c
    of `doubles` where two are: pairs of a given sum are then one AND of two big integers."""

    def __init__(self, counts: Sequence[int], capacity: int):
        self.counts, self.capacity = counts, capacity
        self.by_length: list[list[int]] = [[] for _ in range(capacity + 1)]
        self.lengths = self.mirrored = self.doubles = 0
        for index in reversed(range(len(counts))):
            self.put_back(index)

    def put_back(self, index: int) -> None:
        self.by_length[self.counts[index]].append(index)
        self._mark(self.counts[index])

    def take(self, length: int) -> int:
        """The first stretch of that length in the given order."""
        index = self.by_length[length].pop()
        self._mark(length)
        return index

    def _mark(self, length: int) -> None:
        number, bit = len(self.by_length[length]), 1 << length
        self.lengths = self.lengths | bit if number else self.lengths & ~bit
        self.doubles = self.doubles | bit if number > 1 else self.doubles & ~bit
        mirrored = 1 << (self.capacity - length)
        self.mirrored = self.mirrored | mirrored if number else self.mirrored & ~mirrored

    def longest(self, space: int) -> int:
        """The greatest length that fits, or 0."""
        return max(0, (self.lengths & ((1 << (space + 1)) - 1)).bit_length() - 1)

    def shortest(self) -> int:
        return (self.lengths & -self.lengths).bit_length() - 1

    def pair(self, total: int) -> int:
        """The longer length of a pair with this sum, or 0."""
        found = self.lengths & (self.mirrored >> (self.capacity - total)) & ((1 << total) - 1)
        if total % 2 == 0 and not self.doubles >> (total // 2) & 1:
            found &= ~(1 << (total // 2))
        return max(0, found.bit_length() - 1)

    def fullest(self, space: int) -> list[int]:
        """The one or two lengths that leave least of a space."""
        one = self.longest(space)
        if not one or space < 2 * self.shortest():
            return [one] if one else []
        for total in range(space, one, -1):
            if longer := self.pair(total):
                return [longer, total - longer]
        return [one]


def completed(counts: np.ndarray, capacity: int, max_rows: int | None = None) -> Rows:
    """Rows begun in the given order, and finished by the one, two or three stretches that leave least.

    In order, not longest first: what is left then stays a fair sample of all lengths almost to the end, so that something
    fits nearly every gap. A row is finished when less than about three mean stretches are missing.
    """
    given = np.asarray(counts).tolist()
    shelf, taken, rows, first = _Shelf(given, capacity), [False] * len(given), [], 0
    begun = capacity - 3 * sum(given) / max(1, len(given))

    def following(space: int) -> list[int]:
        """The next few in order that fit."""
        found = []
        for index in range(first, len(given)):
            if not taken[index] and given[index] <= space:
                found.append(index)
                if len(found) == THIRDS:
                    break
        return found

    while shelf.lengths and (max_rows is None or len(rows) < max_rows):
        while taken[first]:
            first += 1
        row: list[int] = []
        space = capacity
        while shelf.longest(space):
            if not row or capacity - space < begun:
                lengths = [given[following(space)[0]]]
            else:
                lengths = _finish(shelf, space, [given[i] for i in following(space)])
            for length in lengths:
                row.append(shelf.take(length))
                taken[row[-1]] = True
            space -= sum(lengths)
        rows.append(row)
    return rows


def _finish(shelf: _Shelf, space: int, thirds: Sequence[int]) -> list[int]:
    """The lengths that leave least of a space: one, two, or one of `thirds` and one or two."""
    best = shelf.fullest(space)
    if space < 3 * shelf.shortest():
        return best
    for third in thirds:
        if sum(best) == space:
            break
        index = shelf.take(third)
        best = max(best, [third, *shelf.fullest(space - third)], key=sum)
        shelf.put_back(index)
    return best
