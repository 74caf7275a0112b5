"""The iteration against float64 SVD, its bands, and the inputs that break others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.schema import ConfigError
from optim.gram import gram_flops, gram_newton_schulz, guarded, segments_for
from optim.newton_schulz import coefficients, newton_schulz, singular_value_band, standard_flops

SETS = [("keller", 5), ("quintic", 5), ("polar_express", 5), ("polar_express", 6), ("deepseek_v4", 10)]

BANDS = {  # of the exact map, for values of at least 1e-2 and 1e-3 after the division by the Frobenius norm
    ("keller", 5): ((0.6818, 1.1344), (0.4705, 1.2024)),
    ("quintic", 5): ((0.9777, 1.0318), (0.4749, 1.1451)),
    ("polar_express", 5): ((0.8702, 1.1236), (0.8461, 1.1236)),
    ("polar_express", 6): ((0.9982, 1.0012), (0.9955, 1.0012)),
    ("deepseek_v4", 10): ((1.0000, 1.0006), (1.0000, 1.0006)),
}


def with_spectrum(values, m, n, seed=0):
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.normal(size=(k, len(values))))[0] for k in (m, n))
    return (u * values) @ v.T, u @ v.T


def spectra(m=48, n=64):
    """Matrices that other implementations trip over, as one float32 batch [9, m, n]. The plateaus (half at
    3 %, three quarters at 0.1 %) are what drives the Gram form out of its band first; `plateaus` has more of them."""
    square = np.zeros((m, n))
    square[:, :m] = np.random.default_rng(1).normal(size=(m, m))
    k = np.arange(1.0, m + 1)
    plateaus = np.where(k <= m // 2, 1, 3e-2), np.where(k <= m // 4, 1, 1e-3)
    made = [with_spectrum(s, m, n)[0] for s in (np.geomspace(1, 1e-4, m), k**-1.5, 1 / k, np.eye(m)[0], k**-3.0, *plateaus)]
    return jnp.asarray(np.stack([square, *made, np.zeros((m, n))]), jnp.float32)


@pytest.mark.parametrize("name,steps", SETS)
def test_scalar_bands(name, steps):
    """The exact interval arithmetic agrees with the published ranges and with a dense scan of the polynomial."""
    coeffs = coefficients(name, steps)
    for low, expected in zip((1e-2, 1e-3), BANDS[name, steps]):
        band = singular_value_band(coeffs, low)
        assert band == pytest.approx(expected, abs=1.1e-4)  # the expectation is written with four digits
        x = np.geomspace(low, 1, 20001)
        for a, b, c in coeffs:
            x = a * x + b * x**3 + c * x**5
        assert band[0] - 1e-9 <= x.min() and x.max() <= band[1] + 1e-9
        assert x.min() - band[0] < 1e-5 and band[1] - x.max() < 1e-5  # and the band is not too wide


@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (24, 96)])
@pytest.mark.parametrize("name,steps", SETS)
def test_against_svd(name, steps, shape):
    """Every singular value lands where the scalar polynomial sends it, with the singular vectors of the input."""
    coeffs = coefficients(name, steps)
    values = np.geomspace(1, 0.06, min(shape))  # over the Frobenius norm: from 0.26 down to at least 1e-2
    x, polar = with_spectrum(values, *shape)
    out = np.asarray(newton_schulz(jnp.asarray(x, jnp.float32), coeffs), np.float64)
    singular = np.linalg.svd(out, compute_uv=False)
    low, high = singular_value_band(coeffs, values.min() / np.linalg.norm(values))
    slack = 2e-4  # float32 rounding, amplified by the slope at small values (up to 1e3)
    assert low - slack < singular.min() and singular.max() < high + slack
    cosine = np.sum(out * polar) / np.linalg.norm(out) / np.linalg.norm(polar)
    assert cosine >= 2 * np.sqrt(low * high) / (low + high) - slack  # Kantorovich: no spectrum in the band does worse


@pytest.mark.parametrize("name,steps", SETS)
def test_bfloat16_stays_near_the_band(name, steps):
    """Operands in bfloat16, sums in float32, as on an accelerator."""
    coeffs = coefficients(name, steps)
    out = np.asarray(newton_schulz(spectra(), coeffs, jnp.bfloat16), np.float64)
    assert np.isfinite(out).all()
    singular = np.linalg.svd(out, compute_uv=False)
    assert singular.max() <= singular_value_band(coeffs, 0.0)[1] * 1.03  # bfloat16 rounds to 0.4 %, a few times over


@pytest.mark.parametrize("form", ["plain", "gram"])
def test_scale_and_zero(form):
    """1e-30 to 1e30 give the same direction; a zero matrix among others stays exactly zero and disturbs no one."""
    coeffs = coefficients("quintic", 5)
    run = jax.jit(lambda x: newton_schulz(x, coeffs) if form == "plain" else gram_newton_schulz(x, coeffs, (2, 3), jnp.float32))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 16, 48)), jnp.float32).at[1].set(0)
    base = run(x)
    assert not base[1].any()
    for scale in (1e-30, 1e-12, 1e12, 1e30):
        np.testing.assert_allclose(run(x * jnp.float32(scale)), base, atol=1e-5)  # float32, slope 493 at zero
    rows = run(x * jnp.asarray([1e-25, 1.0, 1e25], jnp.float32)[:, None, None])
    np.testing.assert_allclose(rows, base, atol=1e-5)


def test_wrong_counts_are_refused():
    with pytest.raises(ConfigError, match="defines exactly 10 steps"):
        coefficients("deepseek_v4", 5)
    with pytest.raises(ConfigError, match="defines exactly 5 steps"):
        coefficients("quintic", 6)
    with pytest.raises(ConfigError, match="at least 1"):
        coefficients("keller", 0)
    with pytest.raises(ConfigError, match="choose one of"):
        coefficients("kelle", 5)


def plateaus(m=160, n=336):
    """Some values at 1 and the rest at another height, in matrices wide enough for the Gram form to pay: [63, m, n]."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(k, m)))[0] for k in (m, n))
    made = (np.where(np.arange(m) < high, 1, 10**low) for high in (1, 4, 14, 40, 75, 120, 150) for low in LOWS)
    return jnp.asarray(np.stack([(u * values) @ v.T for values in made]), jnp.float32)


LOWS = (0, -0.2, -0.43, -0.7, -1, -1.31, -1.7, -2.2, -3)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name,steps", SETS)
@pytest.mark.parametrize("spectra", [spectra, plateaus])
def test_gram_keeps_the_band(spectra, name, steps, dtype):
    """With the restarts of each format no spectrum leaves the band of the plain iteration in the same format."""
    coeffs = coefficients(name, steps)
    segments = segments_for(coeffs, dtype)
    assert sum(segments) == steps
    plain, gram = jax.jit(
        lambda x: (newton_schulz(x, coeffs, jnp.dtype(dtype)), gram_newton_schulz(x, coeffs, segments, jnp.dtype(dtype)))
    )(spectra())
    largest = [np.linalg.svd(np.asarray(y, np.float64), compute_uv=False).max() for y in (plain, gram)]
    # float16 lets the geometric spectrum grow by up to 1 % more than the plain form, the others stay below that
    assert largest[1] <= 1.02 * max(largest[0], singular_value_band(coeffs, 0.0)[1])
    if dtype == "float32":
        full = jax.random.normal(jax.random.key(0), (2, 16, 64))
        np.testing.assert_allclose(
            gram_newton_schulz(full, coeffs, segments, jnp.float32), newton_schulz(full, coeffs), atol=2e-5
        )  # rounding only: both are the same polynomial


def test_gram_without_restarts_explodes_and_the_guard_catches_it():
    """What the restarts are for; a guarded computation that explodes returns the plain result instead."""
    coeffs = coefficients("deepseek_v4", 10)
    x = spectra()
    out = np.asarray(gram_newton_schulz(x, coeffs, (10,), jnp.bfloat16), np.float64)
    assert not (np.isfinite(out).all() and np.abs(out).max() < 2)
    safe = jax.jit(lambda x: guarded(x, coeffs, (10,), jnp.bfloat16, jnp.float32))(x)
    assert np.linalg.svd(safe, compute_uv=False).max() <= 1.0021  # the set's band and float32 rounding


def test_flops():
    """K2's expert: 80 units of m^3 plain, 56 with one restart, 64 with two (research figures)."""
    unit = 2048**3
    assert standard_flops(2048, 7168, 5) == 80 * unit
    assert gram_flops(2048, 7168, (2, 3)) == 56 * unit
    assert gram_flops(2048, 7168, (2, 2, 1)) == 64 * unit
