"""Which form runs where, and that every form agrees with the plain iteration in its number format."""

from contextlib import nullcontext
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from optim_table import experts_of_k2

from configs.schema import OptimConfig
from optim import symmetric_tpu
from optim.build import plan_of
from optim.form import choose_form
from optim.newton_schulz import coefficients, newton_schulz
from optim.plan import COLUMNS, plan_rows, total_flops
from train.plan.census import census

KELLER = coefficients("keller", 5)


def test_choices():
    """Square matrices stay plain; wide ones take the Gram form, in halves where they are large; never by halves on a CPU."""
    assert choose_form(7168, 8192, KELLER, "tpu").describe() == "gram 3+2 bfloat16, halves by tpu"
    assert choose_form(2048, 7168, KELLER, "gpu").describe() == "gram 3+2 float16, halves by rows"
    assert choose_form(2048, 7168, KELLER, "hopper").describe() == "gram 3+2 float16, halves by hopper"
    assert choose_form(7168, 2048, KELLER, "cpu").describe() == "gram 3+2 float32"
    assert choose_form(128, 128, KELLER, "cpu").describe() == "plain float32"
    assert choose_form(256, 128, KELLER, "cpu", "bfloat16").describe() == "gram 3+2 bfloat16", "as it multiplies faster"
    assert choose_form(2048, 7168, KELLER, "hopper", "float32").describe() == "gram 3+2 float16, halves by hopper"
    assert choose_form(192, 200, KELLER, "tpu").describe() == "plain bfloat16"
    assert choose_form(1100, 7168, KELLER, "tpu").product == "full", "tiles of the kernel are whole registers"


@pytest.mark.parametrize("platform, product", [("gpu", "rows"), ("tpu", "tpu"), ("cpu", "full")])
def test_forms_agree(platform, product, monkeypatch):
    """bfloat16 in and out; the result lies as near to the exact one as the plain bfloat16 iteration does."""
    monkeypatch.setattr(symmetric_tpu, "LANES", 8)  # one tile of two parts: every step costs the interpreter time
    coeffs = coefficients("keller", 3)
    form = replace(choose_form(32, 128, coeffs, platform, "bfloat16"), product=product)
    assert form.segments is not None
    x = jax.random.normal(jax.random.key(0), (3, 32, 128)).astype(jnp.bfloat16)
    exact = newton_schulz(x.astype(jnp.float32), coeffs)
    with pltpu.force_tpu_interpret_mode() if product == "tpu" else nullcontext():
        gram, plain = jax.jit(form)(x), newton_schulz(x, coeffs, jnp.bfloat16)
    assert gram.dtype == jnp.bfloat16
    error = lambda y: np.linalg.norm(np.asarray(y, np.float32) - exact) / np.linalg.norm(exact)  # noqa: E731
    # keller does not contract: bfloat16 moves singular values about within its band, 8 % of the norm in the plain form
    assert error(gram) <= 1.2 * error(plain)


def test_the_way_out_is_not_counted():
    """The plain iteration that a guard holds ready does not enter the FLOPs of a program: a healthy run never takes it."""
    form = choose_form(16, 64, coefficients("keller", 2), "tpu")
    text = jax.jit(form).lower(jnp.ones((2, 16, 64), jnp.bfloat16)).compile().as_text()
    assert "conditional" in text and census(text).flops == 2 * form.flops(16, 64)


@pytest.mark.parametrize("platform", ["gpu", "hopper", "tpu"])
def test_k2_experts_cost(platform):
    """The plan's FLOPs for Kimi K2's experts: 47.5 PFLOP plain (computed by hand), under 26 on GPUs and on TPUs."""
    specs = experts_of_k2()
    plan = plan_of(specs, OptimConfig(qk_clip_tau=None), platform)
    plain = 60 * 384 * 3 * 80 * 2048**3
    assert plain == pytest.approx(47.5e15, rel=1e-3)
    assert total_flops(plan) < 26e15
    assert len(plan_rows(plan, 2)[0]) == len(COLUMNS)
