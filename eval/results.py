"""Results of evaluations as files of a run directory: written whole or not at all, and read as far as they are whole."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.metrics import finite


def write_result(path: Path, result: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(json.dumps(finite(result)) + "\n")
    os.replace(temporary, path)


def read_result(path: Path) -> dict[str, Any] | None:
    """None if there is none, or if a kill cut it in half (versions before `write_result`)."""
    rows = read_rows(path)
    return rows[-1] if rows else None


def append_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One line each, behind the lines that are there; a line that a kill cut in half stays alone."""
    there = path.read_bytes() if path.exists() else b""
    lines = "".join(json.dumps(finite(row)) + "\n" for row in rows)
    with open(path, "a") as file:
        file.write(lines if there.endswith(b"\n") or not there else "\n" + lines)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
