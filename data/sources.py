"""Reading the user's files: plain text, source code, JSONL. Every refusal names the file (and line) and what to do."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.schema import ConfigError


@dataclass
class Texts:
    """Documents for training and the held-out ones; `skipped` says what was passed over and why."""

    train: list[str] = field(default_factory=list)
    heldout: list[str] = field(default_factory=list)
    files: int = 0
    skipped: list[str] = field(default_factory=list)


def read_texts(paths: Sequence[str], text_field: str, heldout: float) -> Texts:
    """Read files and folders. Of a plain file the last `heldout` share of bytes is held out, of a JSONL file of rows.

    ConfigError for a missing path, a folder without usable files, an empty file, a row that is not a JSON object,
    and a row without the field.
    """
    texts = Texts()
    for given in paths:
        for path in files_of(given, texts.skipped):
            if path.suffix == ".jsonl":
                rows = [row_text(row, text_field, path, line) for line, row in json_rows(path)]
                cut = heldout_start(len(rows), heldout)
                train, held = rows[:cut], rows[cut:]
            else:
                train, held = ([part] for part in cut_text(decode(path), heldout))
            texts.files += 1
            texts.train += filter(None, train)
            texts.heldout += filter(None, held)
    if not texts.train:
        raise ConfigError(f"data.paths: {', '.join(map(str, paths))} holds no text to train on")
    return texts


def files_of(given: str, skipped: list[str]) -> Iterator[Path]:
    """The file itself, or all readable text files below a folder in sorted order; hidden ones are passed over."""
    root = Path(given)
    if root.is_file():
        if root.stat().st_size == 0:
            raise ConfigError(f"data.paths: {root} is empty")
        yield root
        return
    if not root.is_dir():
        raise ConfigError(f"data.paths: no file or folder {root}")
    found = 0
    for path in sorted(root.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if hidden or not path.is_file() or path.stat().st_size == 0:
            continue
        reason = not_text(path)
        if reason:
            skipped.append(f"{path}: {reason}")
            continue
        found += 1
        yield path
    if not found:
        raise ConfigError(f"data.paths: the folder {root} holds no text file")


def not_text(path: Path) -> str | None:
    """Why a file is no UTF-8 text, or None."""
    raw = path.read_bytes()
    if b"\0" in raw:
        return "binary"
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return "not UTF-8"
    return None


def decode(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"data.paths: {path} is not UTF-8 text (byte {error.start}); convert it first") from None


def json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every row that is not blank."""
    found = 0
    for number, line in enumerate(decode(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} line {number} is not JSON: {error.msg} at column {error.colno}") from None
        if not isinstance(row, dict):
            raise ConfigError(f"{path} line {number} is not a JSON object but {type(row).__name__}")
        found += 1
        yield number, row
    if not found:
        raise ConfigError(f"data.paths: {path} holds no rows")


def row_text(row: dict[str, Any], text_field: str, path: Path, line: int) -> str:
    if text_field not in row:
        raise ConfigError(f"{path} line {line} has no field {text_field!r}; it has {', '.join(row)}: "
                          f"choose one with data.text_field")
    text = row[text_field]
    if not isinstance(text, str):
        raise ConfigError(f"{path} line {line}: field {text_field!r} is {type(text).__name__}, not text")
    return text


def heldout_start(count: int, share: float) -> int:
    """Index of the first held-out item; at least one is held out if any share is asked for and one remains."""
    if share == 0 or count < 2:
        return count
    return min(count - 1, int(count * (1 - share)))


def cut_text(text: str, share: float) -> tuple[str, str]:
    """The text cut so that the last `share` of its UTF-8 bytes is held out, never inside a character."""
    raw = text.encode("utf-8")
    cut = heldout_start(len(raw), share)
    while cut < len(raw) and raw[cut] & 0xC0 == 0x80:
        cut += 1
    return raw[:cut].decode("utf-8"), raw[cut:].decode("utf-8")
