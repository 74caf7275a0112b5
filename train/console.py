"""What a person sees while something long runs: a bar with rate and time left, or plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(highlight=False, soft_wrap=True)
if not console.is_terminal:
    console.width = 170  # tables in files and pipes keep their lines


def human(number: float) -> str:
    """1234567 -> 1.23M."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}E"


def clock(seconds: float) -> str:
    """m:ss or h:mm:ss."""
    minutes, seconds = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Bar:
    """A progress bar on a terminal; elsewhere a line at most every `quiet_seconds`."""

    def __init__(self, what: str, total: int, unit: str = "step", quiet_seconds: float = 10.0):
        self.what, self.total, self.unit, self.quiet = what, total, unit, quiet_seconds
        self.done, self.start, self.last = 0, time.monotonic(), time.monotonic()
        self._bar = None

    def __enter__(self):
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("gone,"),
                TimeRemainingColumn(),
                TextColumn("left"),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task(self.what, total=self.total, rate="")
            self._bar.start()
        return self

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What comes once is neither in the rate nor in the time left."""
        begun = time.monotonic()
        yield
        self.start += time.monotonic() - begun

    def advance(self, count: int = 1) -> None:
        self.done += count
        now = time.monotonic()
        rate = self.done / max(now - self.start, 1e-9)
        if self._bar:
            self._bar.update(self._task, advance=count, rate=f"{rate:.3g} {self.unit}/s")
        elif now - self.last > self.quiet and self.done < self.total:
            self.last = now
            console.print(
                f"{self.what}: {self.done}/{self.total}, {rate:.3g} {self.unit}/s, {clock((self.total - self.done) / rate)} left"
            )

    def reach(self, done: int, total: int) -> None:
        """`done` of `total` are there: for work whose size is known only once it runs."""
        self.total = total
        if self._bar:
            self._bar.update(self._task, total=total)
        self.advance(done - self.done)

    def __exit__(self, *exc):
        if self._bar:
            self._bar.stop()
