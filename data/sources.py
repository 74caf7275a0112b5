"""Reading the user's files. Every refusal names the file (and line or record) and what to do.

What a file holds is told by its ending: `.npy` and `.array_record` token ids, `.jsonl` rows, anything else text. A
JSONL row is a conversation if it has `messages` or `conversations`, else text in data.text_field, else token `ids`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from configs.schema import ConfigError, DataConfig
from data.arrays import TokenRow, check_ids, check_weights, read_array_record, read_npy
from data.chat import Account, Talk, refuse
from data.messages import RowError, conversation
from data.tokenizer import Tokenizer

Item = str | Talk | TokenRow
"""A document: text, a conversation, or token ids."""

ARRAYS = (".npy", ".array_record")


@dataclass
class Source:
    """What one path holds."""

    name: str
    train: list[Item] = field(default_factory=list)
    heldout: list[Item] = field(default_factory=list)
    files: int = 0
    skipped: list[str] = field(default_factory=list)
    """Files of a folder that hold no text, and why."""


def read_source(given: str, cfg: DataConfig, tokenizer: Tokenizer, account: Account) -> Source:
    """Read a file or a folder. Of a text the last share of bytes is held out, of a file of rows the last rows.

    ConfigError for a missing path, a folder without usable files, an empty file, and (unless data.bad_rows says drop,
    when they are written to `account`) rows that cannot be used.
    """
    source = Source(given)
    share = cfg.validation_fraction
    for path in files_of(given, source.skipped):
        if path.suffix == ".npy":
            items: list[Item] = read_npy(path, tokenizer.vocab_size, tokenizer.bos_id)
        elif path.suffix == ".array_record":
            items = read_array_record(path, tokenizer.vocab_size)
        elif path.suffix == ".jsonl":
            items = list(json_items(path, cfg, tokenizer, account))
        else:
            items = []
            train, held = cut_text(decode(path), share)
            source.train += [train] if train else []
            source.heldout += [held] if held else []
        cut = heldout_start(len(items), share)
        source.train += items[:cut]
        source.heldout += items[cut:]
        source.files += 1
    if not source.train:
        raise ConfigError(f"data.paths: {given} holds nothing to train on")
    return source


def files_of(given: str, skipped: list[str]) -> Iterator[Path]:
    """The file itself, or all usable files below a folder in sorted order; hidden ones are passed over."""
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
        reason = None if path.suffix in ARRAYS else not_text(path)
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


def json_items(path: Path, cfg: DataConfig, tokenizer: Tokenizer, account: Account) -> Iterator[Item]:
    """The documents of a JSONL file; blank lines and empty texts are passed over."""
    found = 0
    for number, line in enumerate(decode(path).split("\n"), start=1):
        if not line.strip():
            continue
        found += 1
        where = f"{path} line {number}"
        try:
            item = row_item(json_object(line), where, cfg.text_field, tokenizer)
        except RowError as error:
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
    except (ValueError, TypeError):
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


def cut_text(text: str, share: float) -> tuple[str, str]:
    """The text cut so that the last `share` of its UTF-8 bytes is held out, never inside a character."""
    raw = text.encode("utf-8")
    cut = heldout_start(len(raw), share)
    while cut < len(raw) and raw[cut] & 0xC0 == 0x80:
        cut += 1
    return raw[:cut].decode("utf-8"), raw[cut:].decode("utf-8")
