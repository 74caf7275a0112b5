"""Where the time of a traced step goes on a GPU, kernel by kernel: `python -m bench.trace FOLDER [--write NAME --on MACHINE]`.

FOLDER is what `launch.py train --profile.steps` wrote (RUN/profile); its newest trace is read. Kernels that differ only in a
number at their end are one row; ours bear the names of their bodies. Times are those of the kernels themselves: what they add up
to, next to the time from the first to the last, tells how much the device waited.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import jax

from bench import measure
from configs.schema import ConfigError

PARTS = (
    ("attention", r"^attention_"),
    ("experts and half products", r"^(experts|half_product)"),
    ("the grid", r"^on_grid"),
    ("rows to their slots", r"^rows_to_slots"),
    ("other products, by cuBLAS", r"nvjet|gemm|cutlass|cublas|splitK"),
    ("copies", r"^mem(cpy|set)"),
    ("everything else, fused by XLA", r""),
)
"""The first pattern that is found in a kernel's name says which part of the step it belongs to."""

Event = tuple[str, float, float]
"""Name, beginning and end in milliseconds."""


def events(file: Path) -> list[Event]:
    """Of all streams of the first GPU."""
    try:
        planes = [plane for plane in jax.profiler.ProfileData.from_file(str(file)).planes if "GPU:0" in plane.name]
    except RuntimeError as error:
        raise ConfigError(f"{file} is damaged ({error}); trace the steps again") from None
    found = [
        (event.name, event.start_ns / 1e6, (event.start_ns + event.duration_ns) / 1e6)
        for line in (line for plane in planes for line in plane.lines)
        if line.name.startswith("Stream")
        for event in line.events
    ]
    if not found:
        raise ConfigError(f"{file} holds no kernels of a GPU; xprof opens the traces of other devices")
    return found


def kernels(of: Iterable[Event]) -> list[dict]:
    """One row for each kind of kernel, the longest first."""
    found: dict[str, list[float]] = defaultdict(list)
    for name, begin, end in of:
        found[re.sub(r"(_\d+)+$", "", name)].append(end - begin)
    rows = [{"kernel": name, "part": part(name), "calls": len(ms), "ms": round(sum(ms), 2)} for name, ms in found.items()]
    return sorted(rows, key=lambda row: -row["ms"])


def part(kernel: str) -> str:
    """Of PARTS."""
    return next(name for name, pattern in PARTS if re.search(pattern, kernel, re.IGNORECASE))


def summary(of: list[Event]) -> dict:
    """Milliseconds of each part, of the whole span, and of the span in which at least one kernel ran."""
    busy, until = 0.0, float("-inf")
    for _, begin, end in sorted(of, key=lambda event: event[1]):
        busy += max(end - max(begin, until), 0.0)
        until = max(until, end)
    totals = dict.fromkeys((name for name, _ in PARTS), 0.0)
    for row in kernels(of):
        totals[row["part"]] += row["ms"]
    span = max(end for _, _, end in of) - min(begin for _, begin, _ in of)
    return {"span_ms": round(span, 2), "busy_ms": round(busy, 2), "parts_ms": {k: round(v, 1) for k, v in totals.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--top", type=int, default=25, help="kernels to print")
    parser.add_argument("--write", default="", help="write bench/results/trace-NAME.json")
    parser.add_argument("--on", default="", help="date, device and versions of the trace, where it was made elsewhere")
    args = parser.parse_args()
    files = sorted(args.folder.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    if not files:
        parser.error(f"there is no *.xplane.pb under {args.folder}; launch.py train --profile.steps FIRST:LAST writes one")
    try:
        traced = events(files[-1])
    except ConfigError as error:
        parser.error(str(error))
    facts, rows = summary(traced), kernels(traced)
    for row in rows[: args.top]:
        print(
            f"{row['ms']:10.1f} ms {row['ms'] / facts['span_ms']:6.1%} {row['calls']:7} x {row['kernel'][:60]:60} {row['part']}"
        )
    print(f"{facts['span_ms']:.1f} ms from the first kernel to the last, {facts['busy_ms']:.1f} of them with one running:")
    for name, ms in facts["parts_ms"].items():
        print(f"{ms:10.1f} ms {ms / facts['span_ms']:6.1%} {name}")
    if args.write:
        path = measure.RESULTS / f"trace-{args.write}.json"
        found = {"machine": args.on or measure.machine(), **facts, "kernels": rows[: args.top]}
        path.write_text(json.dumps(found, indent=1) + "\n")
        print(f"wrote {path.name}")


if __name__ == "__main__":
    main()
