"""metrics.jsonl, the source of truth of a run: a line per step and per evaluation, appended as it ends."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

PEAK_TFLOPS = {
    "A100": 312.0,
    "H100": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H200": 989.0,
    "H200 NVL": 835.0,
    "B200": 2250.0,
    "GB200": 2500.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
    "TPU7x": 1153.5,
}
"""Dense bf16 peak per jax device (a tpu7x chip is two devices), vendors' figures; model FLOPs utilisation is defined
against these (docs/performance.md)."""


def peak_flops(device_kind: str) -> float | None:
    """FLOP/s of one device, None where no peak is published (CPUs). The longest name that fits decides."""
    matches = [kind for kind in PEAK_TFLOPS if kind in device_kind]
    return PEAK_TFLOPS[max(matches, key=len)] * 1e12 if matches else None


def plain(value: Any) -> Any:
    """JSON values of metrics: scalars as numbers (6 significant digits), arrays as lists, non-finite ones as text."""
    array = np.asarray(value)
    if array.ndim:
        return [plain(x) for x in array]
    number = array.item()
    return float(f"{number:.6g}") if isinstance(number, float) and math.isfinite(number) else finite(number)


def finite(value: Any) -> Any:
    """The same with text for what JSON has no word for, inf and nan, in lists and dicts."""
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def number(value: Any) -> Any:
    """What `plain` wrote, with numbers where it wrote text."""
    if isinstance(value, list):
        return [number(x) for x in value]
    return float(value) if value in ("nan", "inf", "-inf") else value


class MetricsFile:
    """Appends rows; every row is flushed, so a killed run keeps all but the step it was in."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a")  # noqa: SIM115  (held open for the run, closed by close)
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            self._file.write("\n")  # a kill cut the last line in half

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        row = {"kind": kind, "step": step, **{k: v if isinstance(v, str) else plain(v) for k, v in values.items()}}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
