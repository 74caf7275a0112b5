"""Stochastic rounding on a GPU, whose compiler has its own divisions. One command there: make test-gpu."""

import jax
import pytest

from configs.platforms import platform_of
from optim.apply import stochastic_round
from tests.optim.rounding import every_bfloat16_stays, rounding_of_all_magnitudes

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(platform_of(jax.devices()[0]) != "hopper", reason="needs a Hopper GPU")]


def test_all_magnitudes():
    rounding_of_all_magnitudes(jax.jit(stochastic_round))
    every_bfloat16_stays(jax.jit(stochastic_round))
