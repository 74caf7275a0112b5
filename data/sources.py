"""Reading the user's files. Every refusal names the file (and line or record) and what to do.

What a file holds is told by its ending, capitals or not: `.npy` and `.array_record` token ids, `.jsonl` and `.ndjson` rows,
those of CONVERT nothing that is read, anything else text. Rows and text may be gzipped, with `.gz` behind that ending. A
row is a conversation if it has `messages` or `conversations`, else text in data.text_field, else token `ids`.
"""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from configs.schema import ConfigError, DataConfig
from data.arrays import TokenRow, check_ids, check_weights, read_array_record, read_npy
from data.chat import Account, Talk, refuse
from data.messages import RowError, conversation
from data.tokenizer import Tokenizer

Item = str | Talk | TokenRow
"""A document: text, a conversation, or token ids."""

ROWS = (".jsonl", ".ndjson")
ARRAYS = (".npy", ".array_record")
CONVERT = {
    ".json": "is JSON, but rows are read one a line; write them into a .jsonl file, those of an array with "
             "jq -c '.[]' FILE.json > FILE.jsonl",
    **dict.fromkeys((".parquet", ".arrow", ".feather", ".orc"),
                    "is a table of a kind that is not read; write its rows into a .jsonl file, with pandas "
                    "to_json('FILE.jsonl', orient='records', lines=True)"),
    **dict.fromkeys((".zst", ".xz", ".bz2", ".lz4"), "is packed in a way that is not read; unpack it, or pack it with gzip"),
    **dict.fromkeys((".tar", ".tgz", ".zip", ".7z"), "is an archive; unpack it and name the folder"),
}
"""Endings of files that would be read as something that they are not, and what to do with them."""
BOM = b"\xef\xbb\xbf"


class Unreadable(ConfigError):
    """A file or a line that cannot be read as what its ending says, and why; in a folder such a file is passed over."""


@dataclass
class Source:
    """What one path holds."""

    name: str
    train: list[Item] = field(default_factory=list)
    heldout: list[Item] = field(default_factory=list)
    files: int = 0


def read_source(given: str, cfg: DataConfig, tokenizer: Tokenizer, account: Account) -> Source:
    """Read a file or a folder. Of a text the last share of bytes is held out, of a file of rows the last rows.

    Files of a folder that are neither text nor rows nor arrays are written to `account`. ConfigError for a missing path, a
    file that is none of these, a folder without any, an empty file, and (unless data.bad_rows says drop, when they are
    written to `account`) rows that cannot be used.
    """
    source = Source(given)
    passed_over: list[str] = []
    for path in files_of(given):
        try:
            train, heldout = read_file(path, cfg, tokenizer, account)
        except Unreadable as error:
            if path == Path(given):
                raise ConfigError(f"data.paths: {path} {error}") from None
            passed_over.append(f"{path} {error}")
            continue
        source.train += train
        source.heldout += heldout
        source.files += 1
    if not source.files:
        raise ConfigError(f"data.paths: the folder {given} holds no file that can be read"
                          + (f"; {passed_over[0]}" if passed_over else ""))
    for reason in passed_over:
        account.reject(reason)
    account.skipped_files += len(passed_over)
    if not source.train:
        raise ConfigError(f"data.paths: {given} holds nothing to train on")
    return source


def files_of(given: str) -> list[Path]:
    """The file itself, or all files below a folder in sorted order but hidden and empty ones."""
    root = Path(given)
    if root.is_file():
        if root.stat().st_size == 0:
            raise ConfigError(f"data.paths: {root} is empty")
        return [root]
    if not root.is_dir():
        raise ConfigError(f"data.paths: no file or folder {root}")
    shown = [path for path in sorted(root.rglob("*"))
             if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    return [path for path in shown if path.is_file() and path.stat().st_size]


def read_file(path: Path, cfg: DataConfig, tokenizer: Tokenizer, account: Account) -> tuple[list[Item], list[Item]]:
    """(train, held out). Unreadable if the file is not what its ending says."""
    packed = path.suffix.lower() == ".gz"
    ending = (path.with_suffix("") if packed else path).suffix.lower()
    if ending in CONVERT:
        raise Unreadable(CONVERT[ending])
    if ending in ARRAYS and packed:
        raise Unreadable("is gzipped; unpack it, token arrays are read in place")
    if ending not in ARRAYS + ROWS:
        with opened(path, packed) as file:
            return cut_text(file.read().removeprefix(BOM), cfg.validation_fraction)
    if ending == ".npy":
        items: list[Item] = read_npy(path, tokenizer.vocab_size, tokenizer.bos_id)
    elif ending == ".array_record":
        items = read_array_record(path, tokenizer.vocab_size)
    else:
        with opened(path, packed) as file:
            items = list(json_items(path, file, cfg, tokenizer, account))
    cut = heldout_start(len(items), cfg.validation_fraction)
    return items[:cut], items[cut:]


@contextmanager
def opened(path: Path, packed: bool) -> Iterator[IO[bytes]]:
    """The bytes of a file, unpacked. ConfigError for a gzip file that is damaged."""
    try:
        with (gzip.open if packed else open)(path, "rb") as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ConfigError(f"data.paths: {path} is no whole gzip file, copy or pack it anew: {error}") from None


def decoded(raw: bytes, first: int = 0) -> str:
    """Text of a file or a line, or of a part of it from byte `first` on."""
    if b"\0" in raw:
        raise Unreadable("holds zero bytes, so it is binary or UTF-16; convert it to UTF-8 if it is text")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unreadable(f"is not UTF-8 text (byte {first + error.start}); convert it first") from None


def json_items(path: Path, file: IO[bytes], cfg: DataConfig, tokenizer: Tokenizer, account: Account) -> Iterator[Item]:
    """The documents of a file of rows; blank lines and empty texts are passed over."""
    found = 0
    for number, line in enumerate(file, start=1):
        line = line.removeprefix(BOM) if number == 1 else line
        if not line.strip():
            continue
        found += 1
        where = f"{path} line {number}"
        try:
            item = row_item(json_object(decoded(line)), where, cfg.text_field, tokenizer)
        except (RowError, Unreadable) as error:
            refuse(f"{where} {error}", cfg.bad_rows, "bad_rows", account)
            continue
        if not isinstance(item, str) or item:
            yield item
    if not found:
        raise ConfigError(f"data.paths: {path} holds no rows")


def json_object(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise RowError(f"is not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise RowError("is nested too deeply") from None
    except ValueError:  # Python reads no longer integers
        raise RowError(f"holds a number of more than {sys.get_int_max_str_digits():,} digits") from None
    if not isinstance(row, dict):
        raise RowError(f"is not a JSON object but {type(row).__name__}")
    return row


def row_item(row: dict[str, Any], where: str, text_field: str, tokenizer: Tokenizer) -> Item:
    if "messages" in row or "conversations" in row:
        return Talk(where, conversation(row))
    if text_field in row:
        text = row[text_field]
        if not isinstance(text, str):
            raise RowError(f"has no text in field {text_field!r} but {type(text).__name__}")
        return text
    if "ids" in row:
        return token_row(row, where, tokenizer)
    raise RowError(f"has no field {text_field!r}; it has {', '.join(row)}: choose one with data.text_field")


def token_row(row: dict[str, Any], where: str, tokenizer: Tokenizer) -> TokenRow:
    """`ids` and, optionally, `weights` of the same length."""
    try:
        ids = np.array(row["ids"])
        weights = None if row.get("weights") is None else np.array(row["weights"], np.float32)
    except (ValueError, TypeError, OverflowError):
        raise RowError("has ids or weights that are no list of numbers") from None
    check_ids(ids, tokenizer.vocab_size, where)
    if reason := check_weights(TokenRow(ids, weights)):
        raise RowError(reason)
    if weights is not None and not weights[1:].any():
        raise RowError("trains no token: all weights behind the first are 0")
    return TokenRow(ids, weights)


def heldout_start(count: int, share: float) -> int:
    """Index of the first held-out item; at least one is held out if any share is asked for and one remains."""
    if share == 0 or count < 2:
        return count
    return min(count - 1, int(count * (1 - share)))


def cut_text(raw: bytes, share: float) -> tuple[list[str], list[str]]:
    """A text without the last `share` of its UTF-8 bytes, and those; never cut inside a character, empty parts left out."""
    cut = heldout_start(len(raw), share)
    while cut < len(raw) and raw[cut] & 0xC0 == 0x80:
        cut += 1
    train, heldout = decoded(raw[:cut]), decoded(raw[cut:], cut)
    return [train] if train else [], [heldout] if heldout else []
