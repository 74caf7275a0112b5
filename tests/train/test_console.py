"""Progress of long work."""

import pytest

from train import console


@pytest.fixture
def seconds(monkeypatch):
    """A clock that stands still until it is moved: now = seconds[0]."""
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_lines_where_there_is_no_terminal(seconds, capsys):
    """At most one in ten seconds; what comes once, such as compiling, is neither in the rate nor in the time left."""
    with console.Bar("training", 100) as bar:
        with bar.apart():
            seconds[0] += 300
        for _ in range(30):
            seconds[0] += 1
            bar.advance()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[-1] == "training: 23/100, 1 step/s, 1:17 left"
