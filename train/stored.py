"""Parameters of a checkpoint read from disk a piece at a time: what lets a checkpoint be exported that memory cannot hold.

Orbax keeps arrays as Zarr 3 in one OCDBT store per checkpoint; TensorStore opens them without reading. A piece is one index
of the leading axes along which the array is cut on disk (train/checkpoint.py:storage_options); of an array that is not cut, the
whole.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore

from configs.schema import ConfigError

WORDS = 1 << 22
"""Whose fingerprint is taken at a time."""


def _piece(store: tensorstore.TensorStore, index: tuple[int, ...]) -> np.ndarray:
    """`array[index]`, one chunk of it after another: TensorStore would hold all of them packed as well."""
    store = store[index] if index else store
    if not store.shape:  # it has no chunks then
        return store.read().result()
    out, cut = np.empty(store.shape, store.dtype.numpy_dtype), store.chunk_layout.read_chunk.shape
    for start in itertools.product(*(range(0, size, n) for size, n in zip(store.shape, cut))):
        part = tuple(slice(at, min(at + n, size)) for at, n, size in zip(start, cut, store.shape))
        out[part] = store[part].read().result()
    return out


class StoredParams:
    """A WeightSource (quant/source.py) over the directory of one checkpoint; `shapes` are those of the parameters."""

    def __init__(self, directory: Path, shapes: Mapping[str, tuple[int, ...]]):
        self._directory = directory
        self._stores = {path: self._open(directory, path, shape) for path, shape in shapes.items()}
        self._kept: dict[str, tuple[tuple[slice, ...], np.ndarray]] = {}

    @staticmethod
    def _open(directory: Path, path: str, shape: tuple[int, ...]) -> tensorstore.TensorStore:
        files = {"driver": "file", "path": f"{directory / 'state'}/"}
        kvstore = {"driver": "ocdbt", "base": files, "path": f"params/{path}/"}
        # What is missing would be read as zeros, and training deletes checkpoints that grow old.
        spec = {"driver": "zarr3", "kvstore": kvstore, "fill_missing_data_reads": False}
        store = tensorstore.open(spec, open=True, read=True).result()
        if tuple(store.shape) != tuple(shape):
            raise ValueError(f"{path} has shape {tuple(store.shape)} there, not {tuple(shape)}")
        return store

    def read(self, path: str, index: tuple[int, ...]) -> np.ndarray:
        """`array[index]`. The piece around it is kept until another one of the same array is needed, if it holds more.
        ConfigError for a checkpoint that went away since it was opened."""
        try:
            return self._read(path, index)
        except (ValueError, OSError) as error:
            reason = str(error).partition(" [")[0][:80]
            raise ConfigError(
                f"{self._directory} went away or was damaged while it was read ({reason}); a run that is being trained keeps "
                "its newest train.keep checkpoints: take one that stays, as RUN@STEP"
            ) from error

    def _read(self, path: str, index: tuple[int, ...]) -> np.ndarray:
        store, cut = self._stores[path], self._chunk(path)
        around = tuple(slice(i // n * n, min(i // n * n + n, size)) for i, n, size in zip(index, cut, store.shape))
        if all(s.stop - s.start == 1 for s in around):
            return _piece(store, index)
        if path not in self._kept or self._kept[path][0] != around:
            self._kept.pop(path, None)
            self._kept[path] = around, store[around].read().result()
        return self._kept[path][1][tuple(i - s.start for i, s in zip(index, around))]

    def _chunk(self, path: str) -> tuple[int, ...]:
        return tuple(self._stores[path].chunk_layout.read_chunk.shape)

    def fingerprint(self, path: str, of: Callable[[jax.Array, int], jax.Array]) -> int:
        """Of the whole array, from the fingerprints `of(piece, place of its first word)` of its pieces."""
        store, cut = self._stores[path], self._chunk(path)
        lead = next((axis for axis, n in enumerate(cut) if n > 1), len(cut))
        size, total, piecewise = math.prod(store.shape[lead:]), 0, jax.jit(of)
        for number, index in enumerate(itertools.product(*(range(n) for n in store.shape[:lead]))):
            words = _piece(store, index).reshape(-1)
            for at in range(0, len(words), WORDS):
                total += int(piecewise(jnp.asarray(words[at : at + WORDS]), np.uint32((number * size + at) % 2**32)))
        return total % 2**32
