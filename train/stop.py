"""Ctrl-C and SIGTERM: finish the step, save, leave. A second signal leaves at once."""

from __future__ import annotations

import signal

EXIT_DONE = 0
EXIT_USAGE = 2
"""A wrong command, config or file; nothing was changed."""
EXIT_STOPPED = 75
"""Stopped by a signal after saving: the same command goes on. (EX_TEMPFAIL; schedulers may requeue on it.)"""


class StopSignal:
    """Within the `with` block, `requested` names the signal that came, if one did."""

    def __init__(self):
        self.requested: str | None = None

    def _note(self, number, _frame):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name

    def __enter__(self):
        self._old = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc):
        for number, handler in self._old.items():
            signal.signal(number, handler)
