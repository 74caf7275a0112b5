"""Safetensors files, one tensor at a time: a writer that knows all shapes beforehand, a reader that trusts nothing.

The format: eight bytes with the header's length, a JSON header {name: {dtype, shape, data_offsets}}, then the values,
little-endian, without gaps. The library of that name builds a file from tensors that are all in memory; here a tensor
is written, hashed and forgotten, so that memory does not grow with the checkpoint.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from configs.schema import ConfigError

DTYPES = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
"""Names of the format to numpy dtypes."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}


class DamagedFile(ConfigError):
    """A file that is not what its header, or the index, says; the message names it."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: dtype as the format names it, shape, and its bytes' place counted from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


class Writer:
    """Writes one file whose tensors are announced in `table` {name: (numpy dtype, shape)} and then come in any order.

    Wider dtypes lie first, so that every tensor starts at a multiple of its item size.
    """

    def __init__(self, path: Path, table: dict[str, tuple[np.dtype, tuple[int, ...]]]):
        self.path, self._missing = path, dict(table)
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for name, (dtype, shape) in sorted(table.items(), key=lambda item: -item[1][0].itemsize):
            size = math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._offsets = {name: 8 + len(text) + header[name]["data_offsets"][0] for name in table}
        self._file = open(path, "wb")  # noqa: SIM115 -- closed by __exit__
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, array: np.ndarray) -> memoryview:
        """Put one announced tensor in its place; returns its bytes."""
        dtype, shape = self._missing.pop(name)
        if array.dtype != dtype or array.shape != shape:
            raise ValueError(f"{name} was announced as {dtype} {shape}, not {array.dtype} {array.shape}")
        data = memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        self._file.seek(self._offsets[name])
        self._file.write(data)
        return data

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._file.close()
        if error is None and self._missing:
            raise ValueError(f"{self.path.name} is incomplete: {next(iter(self._missing))} was announced, not written")


def _entry(path: Path, name: str, row: dict, values_start: int) -> Entry:
    """One checked row of a header."""
    try:
        dtype, shape, (start, end) = row["dtype"], tuple(row["shape"]), row["data_offsets"]
        counts = (*shape, start, end)
    except (KeyError, TypeError, ValueError):
        raise DamagedFile(f"{path.name}: the header's row of {name} is unreadable; the file was damaged") from None
    if not all(type(n) is int and n >= 0 for n in counts):  # true is an int in Python and no size in JSON
        raise DamagedFile(f"{path.name}: the header's row of {name} holds no sizes; the file was damaged")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise DamagedFile(f"{path.name}: {name} has dtype {dtype}, which is not read here")
    if end - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise DamagedFile(f"{path.name}: {name} holds {end - start} bytes, not those of {dtype} {list(shape)}")
    return Entry(dtype, shape, values_start + start, end - start)


def _is_metadata(content: object) -> bool:
    """What the library of the format accepts there: texts under names, or nothing."""
    return content is None or isinstance(content, dict) and all(isinstance(value, str) for value in content.values())


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file; raises DamagedFile where header and file disagree."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise DamagedFile(f"{path.name} is cut off inside its header: {size} bytes; copy the file again")
        try:
            header = json.loads(file.read(length).decode())
        except (ValueError, RecursionError):
            header = None
    metadata = header.pop("__metadata__", None) if isinstance(header, dict) else None
    if not isinstance(header, dict) or not _is_metadata(metadata):
        raise DamagedFile(f"{path.name} has an unreadable header; it is no safetensors file, or was damaged")
    entries = {name: _entry(path, name, row, 8 + length) for name, row in header.items()}
    need = max((e.start + e.size for e in entries.values()), default=8 + length)
    lost = [name for name, e in sorted(entries.items(), key=lambda item: item[1].start) if e.start + e.size > size]
    if lost:
        raise DamagedFile(
            f"{path.name} is cut off: it has {size} bytes, its header announces {need}, and {lost[0]} is the "
            "first tensor that is not whole; copy the file again"
        )
    end, before = 8 + length, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)):
        if entry.start != end:
            raise DamagedFile(
                f"{path.name}: {name} starts at byte {entry.start}, but {before} ends at {end}; other readers "
                "refuse a file with shared or unused bytes, so write or copy it again"
            )
        end, before = entry.start + entry.size, name
    if size != need:
        raise DamagedFile(f"{path.name} has {size} bytes, but its header announces {need}; copy the file again")
    return entries


class Checkpoint:
    """All tensors of a directory of safetensors files, found through their headers; nothing is read before `read`."""

    def __init__(self, directory: str | Path, problems: list[str] | None = None):
        """Raises DamagedFile for the first damaged file, or collects the messages in `problems` and goes on."""
        self.directory = Path(directory)
        self.tensors: dict[str, Entry] = {}
        self.files: dict[str, str] = {}
        collected: list[str] = [] if problems is None else problems
        if not self.directory.is_dir():
            raise DamagedFile(f"{self.directory} is not a directory")
        paths = sorted(self.directory.glob("*.safetensors"))
        if not paths:
            raise DamagedFile(f"{self.directory} holds no .safetensors file")
        for path in paths:
            try:
                header = read_header(path)
            except (DamagedFile, OSError) as error:  # OSError: a link without its file, a disk that fails
                collected.append(str(error))
                continue
            for name, entry in header.items():
                if name in self.files:
                    collected.append(f"{name} is stored twice, in {self.files[name]} and in {path.name}; remove one")
                self.tensors[name], self.files[name] = entry, path.name
        if problems is None and collected:
            raise DamagedFile(collected[0])

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def raw(self, name: str) -> bytes:
        """The bytes of one tensor as they lie in the file."""
        if name not in self.tensors:
            raise DamagedFile(f"{self.directory.name} has no tensor {name}; the checkpoint is incomplete")
        entry = self.tensors[name]
        with open(self.directory / self.files[name], "rb") as file:
            file.seek(entry.start)
            return file.read(entry.size)

    def read(self, name: str) -> np.ndarray:
        """One tensor, read from disk now."""
        data = self.raw(name)
        return np.frombuffer(data, DTYPES[self.tensors[name].dtype]).reshape(self.shape(name))
