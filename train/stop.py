"""Ctrl-C and SIGTERM: finish the step, save, leave. A second signal leaves at once.

Of several processes any may get the signal: jax listens for SIGTERM and names one step after which all of them stop.
"""

from __future__ import annotations

import os
import signal

EXIT_DONE = 0
EXIT_FAILED = 1
"""A device or the program failed; so also whatever Python reports with a traceback."""
EXIT_USAGE = 2
"""A wrong command or config, where nothing was changed, or a file that cannot be read or written."""
EXIT_STOPPED = 75
"""Stopped by a signal after saving: the same command goes on. (EX_TEMPFAIL; schedulers may requeue on it.)"""
EXIT_INTERRUPTED = 130
"""Ctrl-C where there was nothing to save, or while an export was written, SIGTERM then too: shells' number for it."""
EXIT_LOST = 76
"""One of several processes ended without being asked; the others were ended too. The same command goes on from the newest
checkpoint."""


class StopSignal:
    """Within the `with` block, `requested` names the signal that came, if one did; `after(step)` asks once per step."""

    def __init__(self):
        self.requested: str | None = None

    def after(self, step: int) -> bool:
        """Whether to stop after this step; of several processes the same answer in all."""
        from train import processes  # it imports jax, which must not happen before its settings are made

        if processes.stop_here(step):
            self.requested = "SIGTERM"
        return self.requested is not None

    def _note(self, number, _frame):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name

    def __enter__(self):
        from train import processes

        handlers = (
            {signal.SIGINT: lambda *_: os.kill(os.getpid(), signal.SIGTERM)}
            if processes.several()
            else {signal.SIGINT: self._note, signal.SIGTERM: self._note}
        )
        self._old = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, *exc):
        for number, handler in self._old.items():
            signal.signal(number, handler)
