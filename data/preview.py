"""What the model will see: facts about the data, and rows with the trained tokens in colour."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from data.pipeline import Batch, Data
from data.tokenizer import Tokenizer

TRAINED, CONTEXT = "bold green", "dim"
SPECIAL = {True: "bold magenta", False: "magenta dim"}

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""All but tab and line feed; a terminal obeys them."""


def visible(text: str) -> str:
    """Control characters as escapes."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def pieces(batch: Batch, row: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, weights) of each document piece of a row; the first token of a piece is never predicted."""
    for segment in range(1, int(batch["segments"][row].max(initial=0)) + 1):
        here = batch["segments"][row] == segment
        ids = np.concatenate([batch["tokens"][row][here][:1], batch["targets"][row][here]])
        yield ids, np.concatenate([[0.0], batch["weights"][row][here]])


def coloured(ids: np.ndarray, weights: np.ndarray, tokenizer: Tokenizer) -> Text:
    """A document: trained text green, context dim, special tokens magenta, weights other than 0 and 1 written out, control
    characters as escapes."""
    text = Text()
    kinds = [(int(i) in tokenizer.names, float(w)) for i, w in zip(ids, weights)]
    for (special, weight), run in groupby(zip(kinds, ids), key=lambda pair: pair[0]):
        style = SPECIAL[weight > 0] if special else TRAINED if weight > 0 else CONTEXT
        text.append(visible(tokenizer.decode([i for _, i in run])), style)
        if weight not in (0.0, 1.0):
            text.append(f"\u00d7{weight:g}", "yellow")
    return text


def facts(data: Data) -> Table:
    """Everything `Data.describe` knows, one line each; a table of its own for mixed sources."""
    table = Table(title="data", show_header=False)
    described = data.describe()
    sources = described.pop("sources", [])
    for name, value in described.items():
        table.add_row(name.replace("_", " "), written(value))
    for number, source in enumerate(sources, start=1):
        table.add_section()
        for name, value in source.items():
            table.add_row(f"source {number}: {name.replace('_', ' ')}", written(value))
    return table


def written(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2%}" if 0 <= value < 1 else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def row_view(data: Data, batch: Batch, row: int) -> RenderableType:
    """One row: its documents one below the other, and how full and how much trained it is."""
    parts: list[RenderableType] = []
    for number, (ids, weights) in enumerate(pieces(batch, row), start=1):
        parts += [
            Text(f"document {number}: {len(ids)} tokens, {np.count_nonzero(weights)} trained", "cyan"),
            coloured(ids, weights, data.tokenizer),
        ]
    filled, trained = np.mean(batch["segments"][row] > 0), np.mean(batch["weights"][row] > 0)
    return Panel(Group(*parts), title=f"row {row}: {filled:.0%} filled, {trained:.0%} trained", title_align="left")


def show(data: Data, console: Console, rows: int = 2, step: int = 0) -> None:
    """Print the facts, what was left out and why, and the first rows of a step."""
    console.print(facts(data))
    for title, lines in (("left out", data.account.rejected), ("remarks", data.account.remarks)):
        for line in lines[:10]:
            console.print(Text(f"{title}: {line}", "yellow"))
        if len(lines) > 10:
            console.print(Text(f"{title}: and {len(lines) - 10} more", "yellow"))
    batch = data.batch(step, rows=slice(0, rows))
    for row in range(len(batch["tokens"])):
        console.print(row_view(data, batch, row), soft_wrap=False)  # what is wider than the terminal goes on in the next line
