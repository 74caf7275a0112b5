"""Side-by-side timing: candidates take turns, the best of several rounds counts, and results name their machine."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

RESULTS = Path(__file__).parent / "results"


SPAN = 0.01
"""Seconds that a timing on an accelerator lasts at least: sending a program and waiting for it takes up to a hundredth of
that, often longer than the program itself. No more, because results of calls in a row may have to lie side by side."""


def parser(doc: str) -> argparse.ArgumentParser:
    """Of a benchmark's command line, which at least knows --help and refuses what it does not know before it measures."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def in_turns(candidates: dict[str, Callable[[], Any]], rounds: int = 5) -> dict[str, dict[str, float]]:
    """Best wall and CPU milliseconds of each compiled call. CPU time counts all threads: it is the measure to trust on
    a machine that others use at the same time. On a CPU a timing is of one call, on an accelerator the mean of as many as
    last SPAN."""
    best = {name: {"wall_ms": float("inf"), "cpu_ms": float("inf")} for name in candidates}
    calls = {name: _calls(call) for name, call in candidates.items()}
    for _ in range(rounds):
        for name, call in candidates.items():
            wall, cpu = _seconds(call, calls[name])
            best[name] = {
                "wall_ms": round(min(best[name]["wall_ms"], wall * 1e3), 3),
                "cpu_ms": round(min(best[name]["cpu_ms"], cpu * 1e3), 3),
            }
    return best


def _seconds(call: Callable[[], Any], calls: int) -> tuple[float, float]:
    """Wall and CPU seconds of one of `calls` that are sent in a row and waited for together."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls - 1):
        call()
    jax.block_until_ready(call())
    return (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls


def _calls(call: Callable[[], Any]) -> int:
    """In one timing. The first call here compiles."""
    jax.block_until_ready(call())
    calls = 1
    while jax.default_backend() != "cpu" and calls * _seconds(call, calls)[0] < SPAN:
        calls *= 2
    return calls


def product_flops(size: int, dtype) -> float:
    """FLOPs per second of a square product, the best of five: the limit of this device's matrix units."""
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(lambda x: x @ x)
    return 2 * size**3 / (in_turns({"product": lambda: product(x)})["product"]["wall_ms"] * 1e-3)


UNITS = {"amx_bf16": "AMX-BF16", "avx512_bf16": "AVX512-BF16", "avx512f": "AVX-512", "avx2": "AVX2"}
"""A processor's flags, the fastest first, and what is said of them."""


def cpu() -> str:
    """Name and vector units: processors of one name may differ by them, and ten times in what they multiply."""
    info = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in info.splitlines())}
    flags = facts.get("flags", "").split()
    return ", ".join(filter(None, (facts.get("model name", platform.processor()), *[UNITS[f] for f in UNITS if f in flags][:1])))


def machine() -> dict[str, Any]:
    """Date, hardware and versions."""
    device = jax.devices()[0]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": device.device_kind if device.platform != "cpu" else cpu(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
    }


def write(name: str, rows: list[dict[str, Any]], question: tuple[str, ...] = ()) -> Path:
    """bench/results/NAME-PLATFORM-jaxVERSION.json. With the fields that make a row's `question`, rows that answer another
    one stay in the file, so that long benchmarks can be run in parts; every row then names its machine and date."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{jax.default_backend()}-jax{jax.__version__}.json"
    if question:

        def of(row: dict[str, Any]) -> list:
            return [row.get(field) for field in question]

        asked = [of(row) for row in rows]
        before = json.loads(path.read_text())["rows"] if path.exists() else []
        rows = [row for row in before if of(row) not in asked] + [row | {"machine": machine()} for row in rows]
    path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    return path
