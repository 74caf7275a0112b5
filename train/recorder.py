"""What is measured while a run trains, and when it is written down."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from train import processes
from train.console import console, human
from train.counts import train_flops_per_token
from train.metrics import MetricsFile, peak_flops
from train.run_dir import RunDir
from train.session import Session
from train.state import TrainState


class Recorder:
    """Writes a step's metrics while the next one already computes, and prints a line every log_every steps."""

    def __init__(
        self, session: Session, run: RunDir, first_step: int, started: float, compiling: Callable[[], float], history: str = ""
    ):
        self.session = session
        self.first_step, self.started, self.compiling = first_step, started, compiling
        self.history, self.skipped = history, 0
        self.tokens = self.seconds = 0.0  # since the last printed line: the clock of a single short step is the host's
        self.file = MetricsFile(run.metrics) if processes.first() else None
        cfg = self.session.cfg
        peak = peak_flops(jax.devices()[0].device_kind)
        self.peak = peak * jax.device_count() if peak else None
        self.flops_per_token = train_flops_per_token(cfg.model, self.session.specs, cfg.train.seq_len)
        self.pending: tuple[int, dict[str, Any]] | None = None
        self.clock = time.perf_counter()

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What is done between two steps is the time of neither: the one before is finished first."""
        self._settle()
        yield
        self.clock = time.perf_counter()

    def record(self, step: int, metrics: dict[str, Any]) -> None:
        """A step was started; the one before it is finished, written and forgotten."""
        self._write()
        self.pending = (step, metrics)

    def catch_up(self) -> None:
        """Write the step that was just started, before something is saved that holds it."""
        self._write()

    def measure_optimizer(self, time_update: Callable[[TrainState], float], state: TrainState) -> None:
        """Time the update by itself."""
        with self.apart():
            self.pending[1]["optimizer_seconds"] = time_update(state)

    def report(self, extra: dict[str, Any]) -> None:
        """Write and print the step that was just started, with measurements that are not taken every step."""
        with self.apart():
            step, metrics = self.pending
            self.pending = (step, {**metrics, **processes.host_values(extra, self.session.mesh)})
            self._print(step, self._write(reported=True))

    def _settle(self) -> None:
        """Wait for the pending step and note how long it took."""
        if self.pending and "seconds" not in self.pending[1]:
            jax.block_until_ready(self.pending[1]["loss"])
            now = time.perf_counter()
            self.pending[1]["seconds"] = now - self.clock
            self.clock = now

    def _write(self, reported: bool = False) -> dict[str, Any]:
        if self.pending is None:
            return {}
        self._settle()
        step, metrics = self.pending
        self.pending = None
        values = processes.host_values(metrics, self.session.mesh)
        # Chained over all steps: two runs with equal hashes saw equal data.
        self.history = hashlib.sha256(f"{self.history}{values.pop('data_print')}".encode()).hexdigest()[:16]
        rate = float(values["tokens"]) / values["seconds"]
        self.tokens, self.seconds = self.tokens + float(values["tokens"]), self.seconds + values["seconds"]
        row = {
            "loss": values.pop("loss"),
            "tokens_per_second": rate,
            "mfu": rate * self.flops_per_token / self.peak if self.peak else "n/a",
            "data_hash": self.history,
            **values,
        }
        if step == self.first_step:
            row["seconds_to_first_step"] = time.monotonic() - self.started
            row["compile_seconds"] = self.compiling()
        if not reported:
            row.pop("expert_load")  # large; kept where a line is printed
        if self.file:
            self.file.write("step", step, row)
        return row

    def _print(self, step: int, row: dict[str, Any]) -> None:
        first, rate = "", self.tokens / self.seconds if self.seconds else row["tokens_per_second"]
        self.tokens = self.seconds = 0.0
        grid = f"  grid error {float(row['grid_error']):.3f}" if "grid_error" in row else ""
        if "seconds_to_first_step" in row:
            first = f"  (first step after {row['seconds_to_first_step']:.0f} s, {row['compile_seconds']:.0f} of them compiling)"
        console.print(
            f"step {step:>5}/{self.session.cfg.train.steps}  loss {float(row['loss']):.4f}  "
            f"{human(rate)} tok/s  load max/mean "
            f"{float(np.max(row['load_max_over_mean'])):.2f}  max logit {float(row['max_logit']):.1f}{grid}{first}"
        )
        if int(row["skipped_steps"]) > self.skipped:
            self.skipped = int(row["skipped_steps"])
            console.print(
                f"note: {self.skipped} step(s) of this run changed nothing, because their loss or gradient was not finite",
                style="yellow",
            )

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        """Write and print a held-out loss."""
        if self.file:
            self.file.write("eval", step, values)
        console.print(
            "  held out: " + "  ".join(f"{k.removeprefix('held_out_').replace('_', ' ')} {v:.4f}" for k, v in values.items())
        )

    def close(self) -> None:
        self._write()
        if self.file:
            self.file.close()
