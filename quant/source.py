"""Where weights come from, one block at a time: memory, a checkpoint, or an imported directory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np


class WeightSource(Protocol):
    """Stored arrays, read in blocks so that a caller never holds more than one expert."""

    def read(self, path: str, index: tuple[int, ...]) -> np.ndarray:
        """`array[index]` of the stored array at `path`, in its master dtype; `index` counts leading axes."""


class InMemory:
    """A WeightSource over a flat dict {path: array}; device arrays are fetched block by block."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self._arrays = arrays

    def read(self, path: str, index: tuple[int, ...]) -> np.ndarray:
        return np.asarray(self._arrays[path][index])


class LastBlock:
    """A WeightSource that remembers the block it read last: the halves of gate_up then cost one read."""

    def __init__(self, source: WeightSource):
        self._source, self._key, self._block = source, None, None

    def read(self, path: str, index: tuple[int, ...]) -> np.ndarray:
        if self._key != (path, index):
            self._block = None
            self._block, self._key = self._source.read(path, index), (path, index)
        return self._block
