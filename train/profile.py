"""`--profile.steps FIRST:LAST`: a trace of those steps, which xprof and ui.perfetto.dev open."""

from __future__ import annotations

from pathlib import Path

import jax

from train import processes
from train.console import console


class Profile:
    """Starts before the first named step and stops when the last one has finished; steps outside the run trace nothing. Of
    several processes the first one traces."""

    def __init__(self, steps: tuple[int, int] | None, folder: Path):
        self.first, self.last = steps or (0, 0)
        self.folder = folder
        self.running = False

    def begins(self, step: int) -> bool:
        """Whether to start before this step."""
        return self.first <= step <= self.last and not self.running and processes.first()

    def start(self, step: int, state) -> None:
        self.first = step  # a run that goes on may be behind the first one asked for
        jax.block_until_ready(state)
        jax.profiler.start_trace(self.folder, create_perfetto_trace=True)
        self.running = True

    def ends(self, step: int, last: bool) -> bool:
        """Whether to stop after this step, which may be the run's last."""
        return self.running and (step == self.last or last)

    def stop(self, step: int, state) -> None:
        jax.block_until_ready(state)
        self.running = False
        try:
            jax.profiler.stop_trace()
        except (OSError, ValueError, RuntimeError) as error:  # a run is worth more than its picture
            console.print(f"[yellow]the trace of steps {self.first} to {step} was not written[/]: {error}")
            return
        console.print(f"traced steps {self.first} to {step} under {self.folder}; open them with xprof --logdir {self.folder}")
