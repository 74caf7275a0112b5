"""Reading a trace: kinds of kernels, parts of a step, time with nothing running."""

import pytest

from bench import trace

EVENTS = [
    ("attention_of_keys_mosaic_gpu_kernel", 0.0, 4.0),
    ("experts_rows_mosaic_gpu_kernel", 4.0, 6.0),
    ("nvjet_sm90_tst_128x160_64x5", 5.0, 7.0),  # beside the one before
    ("loop_convert_fusion_12", 8.0, 9.0),
    ("loop_convert_fusion_3_1", 9.0, 9.5),
    ("on_grid", 9.5, 9.8),
    ("rows_to_slots", 9.8, 10.0),
]


def test_kinds_of_kernels():
    """Those that differ in numbers at their ends are one, the longest first."""
    rows = trace.kernels(EVENTS)
    assert [(row["kernel"], row["calls"], row["ms"]) for row in rows][:2] == [
        ("attention_of_keys_mosaic_gpu_kernel", 1, 4.0),
        ("experts_rows_mosaic_gpu_kernel", 1, 2.0),
    ]
    assert ("loop_convert_fusion", 2, 1.5) in [(row["kernel"], row["calls"], row["ms"]) for row in rows]


def test_parts():
    facts = trace.summary(EVENTS)
    assert facts["span_ms"] == 10 and facts["busy_ms"] == 9
    assert list(facts["parts_ms"].values()) == [4.0, 2.0, 0.3, 0.2, 2.0, 0.0, 1.5]


@pytest.mark.parametrize("folder, word", [("nothing", "no *.xplane.pb"), (".", "no *.xplane.pb")])
def test_no_trace(tmp_path, monkeypatch, capsys, folder, word):
    """One sentence, not a traceback."""
    monkeypatch.setattr("sys.argv", ["bench.trace", str(tmp_path / folder)])
    with pytest.raises(SystemExit):
        trace.main()
    assert word in capsys.readouterr().err
