"""Reading the user's files. Every refusal names the file (and line or record) and what to do.

What a file holds is told by its ending, capitals or not: `.npy` and `.array_record` token ids, `.jsonl` and `.ndjson` rows,
those of CONVERT nothing that is read, anything else text. Rows and text may be gzipped, with `.gz` behind that ending. A
row is a conversation if it has `messages` or `conversations`, else text in data.text_field, else token `ids`.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from configs.schema import ConfigError, DataConfig
from data.arrays import Part, TokenRow, Unreadable, checked_row, numbered_records, read_npy, record_row
from data.chat import Account, Talk, refuse
from data.messages import RowError, conversation
from data.tokenizer import Tokenizer

Item = str | Talk | TokenRow | Part
"""A document: text, a conversation, or token ids; or all documents of an array."""

ROWS = (".jsonl", ".ndjson")
ARRAYS = (".npy", ".array_record")
CONVERT = {
    ".json": "is JSON, but rows are read one a line; write them into a .jsonl file, those of an array with "
    "jq -c '.[]' FILE.json > FILE.jsonl",
    **dict.fromkeys(
        (".parquet", ".arrow", ".feather", ".orc"),
        "is a table of a kind that is not read; write its rows into a .jsonl file, with pandas "
        "to_json('FILE.jsonl', orient='records', lines=True)",
    ),
    **dict.fromkeys((".zst", ".xz", ".bz2", ".lz4"), "is packed in a way that is not read; unpack it, or pack it with gzip"),
    **dict.fromkeys((".tar", ".tgz", ".zip", ".7z"), "is an archive; unpack it and name the folder"),
}
"""Endings of files that would be read as something that they are not, and what to do with them."""
BOM = b"\xef\xbb\xbf"
HEAD = 1 << 16
"""Bytes in which something binary shows, before all of it is read."""


class Contents(NamedTuple):
    """Of a file. `items` are read as they are taken; `cut` maps their number (for a Part, that of its documents) to the index
    of the first one that is held out."""

    items: Iterable[Item]
    cut: Callable[[int], int]


def read_source(given: str, cfg: DataConfig, tokenizer: Tokenizer, account: Account) -> Iterator[Contents]:
    """The files of a path. Of a text the last share of bytes is held out, of a file of rows the last rows.

    What of a folder is neither text nor rows nor arrays is written to `account`. ConfigError for a missing path, a file that
    is none of these, a folder without any, an empty file, and (unless data.bad_rows says drop, when they are written to
    `account`) rows that cannot be used.
    """
    passed_over: list[str] = []

    def pass_over(path: Path, why: object) -> None:
        passed_over.append(f"{path} {why}")
        account.reject(passed_over[-1])
        account.skipped_files += 1

    read = 0
    for path, why_not in files_of(given):
        if why_not:
            pass_over(path, why_not)
            continue
        try:
            file = read_file(path, cfg, tokenizer, account)
        except Unreadable as error:
            if path == Path(given):
                raise ConfigError(f"data.paths: {path} {error}") from None
            pass_over(path, error)
            continue
        read += 1
        account.files += 1
        yield file
    if not read:
        raise ConfigError(
            f"data.paths: the folder {given} holds no file that can be read" + (f"; {passed_over[0]}" if passed_over else "")
        )


def files_of(given: str) -> list[tuple[Path, str]]:
    """The file itself, or all files below a folder in sorted order but hidden and empty ones; and what there is passed over,
    with the reason: links to folders, which may lead in a circle, and run directories, which grow while they are trained."""
    root, found = Path(given), []
    if not given:
        raise ConfigError("data.paths: a path is empty; name a file or a folder, the working directory as .")
    if root.is_file():
        if root.stat().st_size == 0:
            raise ConfigError(f"data.paths: {root} is empty")
        return [(root, "")]
    if not root.is_dir():
        raise ConfigError(f"data.paths: no file or folder {root}")
    if _is_run(root):
        raise ConfigError(f"data.paths: {root} is a run directory, which holds what training wrote; name the data in it")

    def unlisted(error: OSError) -> None:
        found.append((Path(error.filename), f"cannot be listed: {error.strerror}"))

    for folder, names, files in os.walk(root, onerror=unlisted):
        below = [Path(folder, name) for name in names if not name.startswith(".")]
        reasons = {path: LINK if path.is_symlink() else RUN if _is_run(path) else "" for path in below}
        names[:] = [path.name for path in below if not reasons[path]]
        found += [(path, why) for path, why in reasons.items() if why]
        for path in (Path(folder, name) for name in files if not name.startswith(".")):
            if path.is_file() and path.stat().st_size:
                found.append((path, ""))
            elif path.is_symlink() and not path.exists():
                found.append((path, "is a link to nothing"))
    return sorted(found)


LINK = "is a link to a folder, which is not followed; name in data.paths what it points to"
RUN = "is a run directory"


def _is_run(folder: Path) -> bool:
    """False for a folder that cannot be looked into."""
    return os.path.isfile(folder / "config.json") and (
        os.path.isdir(folder / "checkpoints") or os.path.isfile(folder / "metrics.jsonl")
    )


def read_file(path: Path, cfg: DataConfig, tokenizer: Tokenizer, account: Account) -> Contents:
    """Unreadable if the file is not what its ending says."""
    packed = path.suffix.lower() == ".gz"
    ending = (path.with_suffix("") if packed else path).suffix.lower()
    if ending in CONVERT:
        raise Unreadable(CONVERT[ending])
    if ending in ARRAYS and packed:
        raise Unreadable("is gzipped; unpack it, token arrays are read in place")
    if ending not in ARRAYS + ROWS:
        with opened(path, packed) as file:
            _no_zeros(file.read(HEAD))
            file.seek(0)
            train, heldout = cut_text(file.read().removeprefix(BOM), cfg.validation_fraction)
        return Contents(train + heldout, lambda count: len(train))
    if ending == ".npy":
        items: Iterable[Item] = [read_npy(path, tokenizer.vocab_size, tokenizer.bos_id)]
    elif ending == ".array_record":
        items = usable(
            numbered_records(path, tokenizer.fingerprint(), cfg.tokenizer),
            lambda record, where: record_row(record, where, tokenizer.vocab_size),
            cfg,
            account,
        )
    else:
        items = usable(numbered_lines(path, packed), lambda line, where: row_item(line, where, cfg, tokenizer), cfg, account)
    return Contents(items, lambda count: heldout_start(count, cfg.validation_fraction))


def usable(
    rows: Iterable[tuple[str, bytes]], read: Callable[[bytes, str], Item], cfg: DataConfig, account: Account
) -> Iterator[Item]:
    """What `read` makes of (where, row), empty texts left out; rows that cannot be read go the way of data.bad_rows."""
    for where, row in rows:
        try:
            item = read(row, where)
        except (RowError, Unreadable) as error:
            refuse(f"{where} {error}", cfg.bad_rows, "bad_rows", account)
        except RecursionError:
            refuse(f"{where} is nested too deeply", cfg.bad_rows, "bad_rows", account)
        else:
            if item != "":
                yield item


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
    _no_zeros(raw)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unreadable(f"is not UTF-8 text (byte {first + error.start}); convert it first") from None


def _no_zeros(raw: bytes) -> None:
    if b"\0" in raw:
        raise Unreadable("holds zero bytes, so it is binary or UTF-16; convert it to UTF-8 if it is text")


def numbered_lines(path: Path, packed: bool) -> Iterator[tuple[str, bytes]]:
    """(where, line) of a file of rows; blank lines are passed over. ConfigError if there are no others."""
    found = False
    with opened(path, packed) as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(BOM) if number == 1 else line
            if line.strip():
                found = True
                yield f"{path} line {number}", line
    if not found:
        raise ConfigError(f"data.paths: {path} holds no rows")


def json_object(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise RowError(f"is not JSON: {error.msg} at column {error.colno}") from None
    except ValueError:  # Python reads no longer integers
        raise RowError(f"holds a number of more than {sys.get_int_max_str_digits():,} digits") from None
    except RecursionError:
        raise RowError("is nested too deeply") from None
    if not isinstance(row, dict):
        raise RowError(f"is not a JSON object but {type(row).__name__}")
    return row


def row_item(line: bytes, where: str, cfg: DataConfig, tokenizer: Tokenizer) -> Item:
    """What a line holds. RowError or Unreadable if it cannot be used."""
    row, text_field = json_object(decoded(line)), cfg.text_field
    if row.get("messages") is not None or row.get("conversations") is not None:  # tables of several kinds of rows have nulls
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
        with np.errstate(over="ignore"):  # what is too large is refused with its row
            weights = None if row.get("weights") is None else np.array(row["weights"], np.float32)
    except (ValueError, TypeError, OverflowError):
        raise RowError("has ids or weights that are no list of numbers") from None
    return checked_row(ids, weights, where, tokenizer.vocab_size)


def heldout_start(count: int, share: float) -> int:
    """Index of the first held-out item; at least one is held out if any share is asked for and one remains."""
    if share == 0 or count < 2:
        return count
    kept = count * (1 - share)
    # 5 * (1 - 0.8) is less than 1 in floating point. Only the first item is given back so: other splits stay what they were.
    return min(count - 1, max(int(kept), int(kept + 1e-9 >= 1)))


def cut_text(raw: bytes, share: float) -> tuple[list[str], list[str]]:
    """A text without the last `share` of its UTF-8 bytes, and those; never cut inside a character, empty parts left out."""
    cut = heldout_start(len(raw), share)
    while cut < len(raw) and raw[cut] & 0xC0 == 0x80:
        cut += 1
    train, heldout = decoded(raw[:cut]), decoded(raw[cut:], cut)
    return [train] if train else [], [heldout] if heldout else []
