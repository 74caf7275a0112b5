"""Muon's half products compiled for a Hopper GPU that is not here. Needs the extra plan-gpu."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from optim import symmetric_gpu
from optim.form import choose_form
from optim.newton_schulz import coefficients
from tests.plan.test_kernels_compile import array, compiled, kernels

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("jax_plugins"), reason="needs the extra plan-gpu"),
]


@pytest.mark.parametrize("batch, m, n", [(64, 1408, 2048), (2, 2048, 7168)])
def test_half_product(batch, m, n):
    """One kernel that states its FLOPs, near half of the full product's, and no temporary array."""
    x = array((batch, m, n), jnp.float16)
    program = compiled("h200-1", lambda x: symmetric_gpu.symmetric(x, x), x)
    assert kernels(program) == [round(2 * batch * m * m * n * symmetric_gpu.share(m))]
    assert program.memory_analysis().temp_size_in_bytes < 16384


def test_newton_schulz():
    """Kimi K2's experts in the Gram form: two Gram matrices, five squares, nine other small products."""
    form = choose_form(2048, 7168, coefficients("keller", 5), "hopper")
    assert form.product == "hopper" and form.dtype == "float16"
    program = compiled("h200-1", jax.jit(form), array((1, 2048, 7168), jnp.bfloat16))
    assert len(kernels(program)) == 16
