"""The bookkeeping of the study of steps to a loss; its runs are bench/steps_to_loss.py's own."""

import json

import pytest

from bench.steps_to_loss import EVERY, SEEDS, Study, best_power, interval, steps_to


def test_steps_are_read_between_evaluations():
    curve = [3.0, 2.0, 2.2, 1.0]
    assert steps_to(curve, 3.5) == EVERY and steps_to(curve, 2.5) == 1.5 * EVERY and steps_to(curve, 1.0) == 4 * EVERY
    assert steps_to(curve, 0.5) != steps_to(curve, 0.5)  # not a number


def test_interval():
    """Three values 1, 2, 3: standard deviation 1, half width t / sqrt(3)."""
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))


def test_a_sweep_ends_with_worse_neighbours_and_three_seeds(tmp_path):
    """Loss is lowest at power 4; a run that diverged is worst; whatever is asked for is written, until nothing is."""
    study, asked = Study("text", tmp_path), []
    while (todo := study.missing("muon", "none")) is not None:
        power, seeds = todo
        asked.append(power)
        loss = float("nan") if power == 5 else 1 + abs(power - 4)
        for seed in seeds:
            (tmp_path / f"muon-none-{power}-{seed}.json").write_text(json.dumps([loss] * 8))
    done = study.curves("muon", "none")
    assert best_power(done) == 4 and set(asked) == {2, 3, 4, 5}
    assert {power for power, seed in done if seed == SEEDS[-1]} == {3, 4, 5}
