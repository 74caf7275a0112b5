"""What stochastic rounding must give, whatever compiled it."""

import jax
import jax.numpy as jnp
import numpy as np

from optim import apply


def rounding_of_all_magnitudes(run):
    """What run(x, key) makes of numbers of all magnitudes is a whole number of steps of bfloat16, after a random part of one was
    added."""
    wide = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
    wide = wide[(np.abs(wide) > 2.0**-75) & (np.abs(wide) < 3.3e38)]
    key = jax.random.key(5)
    part = (np.asarray(apply._noise(wide.shape, key)) >> 16) / 2.0**16
    steps = 2.0 ** (np.frexp(wide.astype(np.float64))[1] - 8)
    np.testing.assert_array_equal(run(jnp.asarray(wide), key), np.floor(wide / steps + part) * steps)


def every_bfloat16_stays(run):
    """Bit for bit: zeros with their sign, subnormal numbers, infinities; of those that are no numbers, that they are none."""
    bits = np.arange(2**16, dtype=np.uint16)
    x = jax.lax.bitcast_convert_type(jnp.asarray(bits), jnp.bfloat16).astype(jnp.float32)
    out = np.asarray(jax.lax.bitcast_convert_type(run(x, jax.random.key(6)), jnp.uint16))
    number = ~np.isnan(as_float32(bits))
    np.testing.assert_array_equal(out[number], bits[number])
    assert np.isnan(as_float32(out[~number])).all()


def as_float32(bits):
    """The numbers that bfloat16 bits are."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
