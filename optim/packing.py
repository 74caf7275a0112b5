"""Which groups of matrices travel in one exchange, and how many matrices of which group each device then owns.

An all-to-all hands every device the same number of bytes. Alone, 61 matrices over 128 devices would send 67 times zeros;
together with other groups, some devices receive a large matrix and others several small ones of about the same size.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass


@dataclass(frozen=True)
class Load:
    """Equal matrices to distribute: how many, and elements of each."""

    count: int
    elements: int

    def owners(self, capacity: int) -> int:
        """Devices needed if each takes at most `capacity` elements, which must hold one matrix."""
        return -(-self.count // (capacity // self.elements))


def capacity(loads: list[Load], devices: int) -> int | None:
    """Smallest number of elements per device with which the loads, each on devices of its own, fit; None if there are
    more loads than devices."""
    least = max(load.elements for load in loads)
    tries = sorted({n * load.elements for load in loads for n in range(1, load.count + 1) if n * load.elements >= least})
    return next((size for size in tries if sum(load.owners(size) for load in loads) <= devices), None)


def owners(loads: list[Load], devices: int) -> list[int]:
    """Devices for each load: as few elements per device as possible, then what is left to the fullest owners, whose
    matrices take longest."""
    size = capacity(loads, devices)
    out = [load.owners(size) for load in loads]
    while True:
        held = [-(-load.count // n) for load, n in zip(loads, out)]
        fullest = max(range(len(loads)), key=lambda i: held[i] * loads[i].elements * (held[i] > 1))
        if held[fullest] == 1:
            return out
        more = -(-loads[fullest].count // (held[fullest] - 1)) - out[fullest]
        if sum(out) + more > devices:
            return out
        out[fullest] += more


def share_exchanges(loads: list[Load], devices: int) -> list[list[int]]:
    """Indices of the loads of each exchange: merged pair by pair as long as that moves fewer elements per device."""
    exchanges = [[i] for i in range(len(loads))]

    def cost(indices: list[int]) -> float:
        size = capacity([loads[i] for i in indices], devices)
        return float("inf") if size is None else size

    while len(exchanges) > 1:
        saved, a, b = max(
            ((cost(a) + cost(b) - cost(a + b), a, b) for a, b in itertools.combinations(exchanges, 2)), key=lambda merge: merge[0]
        )
        if saved <= 0:
            break
        exchanges = [e for e in exchanges if e not in (a, b)] + [sorted(a + b)]
    return sorted(exchanges)
