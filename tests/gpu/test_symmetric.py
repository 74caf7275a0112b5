"""Half products on a Hopper GPU. One command there: make test-gpu."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.platforms import platform_of
from optim import symmetric_gpu
from optim.form import choose_form
from optim.newton_schulz import coefficients, newton_schulz
from tests.optim.test_symmetric_gpu import lower_and_mirrored

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(platform_of(jax.devices()[0]) != "hopper", reason="needs a Hopper GPU")]


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float16, 1e-3), (jnp.bfloat16, 4e-3)])
@pytest.mark.parametrize("batch, m, k", [(3, 128, 64), (2, 192, 128), (1, 1088, 2048), (2, 1408, 2048), (1, 2048, 7168)])
def test_half_product(batch, m, k, dtype, tolerance):
    """Of operands that have nothing in common, so that each is known to be read for itself."""
    x, y = (jax.random.normal(key, (batch, m, k)).astype(dtype) for key in jax.random.split(jax.random.key(0)))
    want = lower_and_mirrored(x, y)
    for _ in range(3):  # again with what the first run left in memory
        out = np.asarray(symmetric_gpu.symmetric(x, y), np.float64)
        assert np.abs(out - want).max() <= tolerance * np.abs(want).max()
        under = np.arange(m)[:, None] // 64 > np.arange(m) // 64
        np.testing.assert_array_equal(out[:, under], np.swapaxes(out, -1, -2)[:, under])


def test_newton_schulz():
    """Kimi K2's expert shape: as near to float32 as the plain bfloat16 iteration is."""
    coeffs = coefficients("keller", 5)
    form = choose_form(2048, 7168, coeffs, "hopper")
    assert form.product == "hopper"
    x = jax.random.normal(jax.random.key(0), (1, 2048, 7168)).astype(jnp.bfloat16)
    exact = np.asarray(newton_schulz(x.astype(jnp.float32), coeffs))
    error = lambda y: np.linalg.norm(np.asarray(y, np.float32) - exact) / np.linalg.norm(exact)  # noqa: E731
    assert error(jax.jit(form)(x)) <= 1.2 * error(newton_schulz(x, coeffs, jnp.bfloat16))
