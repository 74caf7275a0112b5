"""Learning rates at the points that define each schedule."""

import dataclasses

import jax
import numpy as np
import pytest

from configs.schema import MOST_STEPS, ConfigError, OptimConfig, QuantConfig, TrainConfig
from optim.schedules import MOONLIGHT_SECOND_PEAK, learning_rate
from quant.served import grid_share

BASE = OptimConfig(lr=2.0, warmup_steps=10, decay_fraction=0.3, final_lr_ratio=0.1)


def curve(name, total=100, **changes):
    rate = learning_rate(dataclasses.replace(BASE, schedule=name, **changes), total)
    return np.asarray(jax.vmap(rate)(np.arange(total)))


@pytest.mark.parametrize("name", ["wsd", "cosine", "moonlight", "constant"])
def test_warmup_is_linear_and_reaches_the_peak(name):
    np.testing.assert_allclose(curve(name)[:10], 2.0 * np.arange(1, 11) / 10, rtol=1e-6)


def test_wsd():
    """Kimi K2: flat, then a cosine over the last 30 % down to a tenth."""
    rate = curve("wsd")
    np.testing.assert_allclose(rate[9:70], 2.0, rtol=1e-6)
    assert np.all(np.diff(rate[69:]) < 0)
    np.testing.assert_allclose(rate[[84, 99]], [1.1, 0.2], rtol=1e-5)


def test_cosine():
    rate = curve("cosine")
    np.testing.assert_allclose(rate[[9, 54, 99]], [2.0, 1.1, 0.2], rtol=1e-5)


def test_moonlight_has_three_stages():
    rate = curve("moonlight", 1000)
    np.testing.assert_allclose(rate[699], 0.2, rtol=1e-5)
    assert np.all(np.diff(rate[9:700]) < 0) and np.all(np.diff(rate[699:720]) > 0)
    assert rate[700:].max() <= 2.0 * MOONLIGHT_SECOND_PEAK + 1e-6 and rate[700:].max() > 1.9 * MOONLIGHT_SECOND_PEAK
    assert np.all(np.diff(rate[735:]) < 0) and rate[-1] == 0


def test_constant_and_short_runs():
    np.testing.assert_allclose(curve("constant")[10:], 2.0, rtol=1e-6)
    for name in ("wsd", "cosine", "moonlight", "constant"):
        for total in (1, 2, 5):
            rate = curve(name, total)
            assert np.isfinite(rate).all() and (rate >= 0).all() and (rate <= 2.0).all()
    np.testing.assert_allclose(curve("wsd", decay_fraction=0.0)[10:], 2.0, rtol=1e-6)
    np.testing.assert_allclose(curve("constant", warmup_steps=0), 2.0)


def test_the_most_steps_there_can_be():
    """All arithmetic on them holds; with one more it would not, and the setting is refused."""
    for name in ("wsd", "cosine", "moonlight", "constant"):
        for warmup in (0, MOST_STEPS):
            rate = learning_rate(dataclasses.replace(BASE, schedule=name, warmup_steps=warmup), MOST_STEPS)
            assert np.isfinite([rate(step) for step in (0, MOST_STEPS - 1)]).all()
    for start, ramp in ((0, MOST_STEPS), (MOST_STEPS, 0)):
        assert 0 <= grid_share(QuantConfig(start_step=start, ramp_steps=ramp), MOST_STEPS - 1) <= 1
    for wrong in (
        lambda: TrainConfig(steps=MOST_STEPS + 1),
        lambda: OptimConfig(warmup_steps=MOST_STEPS + 1),
        lambda: QuantConfig(start_step=MOST_STEPS, ramp_steps=1),
    ):
        with pytest.raises(ConfigError, match=f"must be at most {MOST_STEPS}"):
            wrong()
