"""Half products on Hopper: the kernel in Pallas' interpreter, with its race detector (jax 0.12), and which tiles it takes.
That it compiles: tests/plan/test_symmetric_compile.py; what it then does: tests/plan/test_ptx.py; on a device:
tests/gpu/test_symmetric.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optim import symmetric_gpu
from optim.symmetric import implementation
from tests.model.interpret_gpu import PRESENT, interpreted


@pytest.mark.parametrize("m", [64, 128, 192, 1408, 2048, 7168])
def test_every_square_is_stored_once(m):
    """Of 64 x 64: those on and under the diagonal from the tile they lie in, the others as mirror images."""
    times = np.zeros((m // 64, m // 64), int)
    for i, j in symmetric_gpu._schedule(m).T:
        rows, columns = (
            np.arange(size // 64) + at * (size // 64) for at, size in ((i, symmetric_gpu.HEIGHT), (j, symmetric_gpu.WIDTH))
        )
        for r in rows[rows < m // 64]:
            for c in columns[columns <= r]:
                times[r, c] += 1
                times[c, r] += c < r
    assert (times == 1).all()


def test_shares():
    """Nearly a half of the full product for Kimi K2's matrices; what it does not take goes by block rows or in full."""
    assert symmetric_gpu.share(2048) == 0.5625 and symmetric_gpu.share(7168) == pytest.approx(0.518, abs=1e-3)
    assert [implementation("hopper", *sizes) for sizes in ((1408, 2048), (2048, 2049), (1030, 2048), (512, 2048))] == [
        "hopper",
        "rows",
        "full",
        "full",
    ]
    assert symmetric_gpu.takes(128, 64) and not symmetric_gpu.takes(64, 64)  # one square, over whose edge a tile would hang


def lower_and_mirrored(x, y):
    """x y^T in float64 on and under the diagonal, squares of 64 x 64, and the mirror image of what lies under it."""
    product = np.asarray(x, np.float64) @ np.swapaxes(np.asarray(y, np.float64), -1, -2)
    square = np.arange(x.shape[-2]) // 64
    return np.where(square[:, None] >= square, product, np.swapaxes(product, -1, -2))


@pytest.mark.skipif(not PRESENT, reason="this jax has no GPU interpreter")
@pytest.mark.parametrize(
    "batch, m, k, dtype, tolerance", [((2,), 192, 128, jnp.float16, 1e-3), ((), 320, 64, jnp.bfloat16, 4e-3)]
)
def test_interpreted(batch, m, k, dtype, tolerance, monkeypatch):
    """x y^T of two operands that have nothing in common, so that each is known to be read for itself: to one rounding of the
    result, tiles over the edge, two cores sharing them; mirrored to the bit."""
    x, y = (jax.random.normal(key, (*batch, m, k)).astype(dtype) for key in jax.random.split(jax.random.key(0)))
    with interpreted(monkeypatch, out_of_bounds_reads="uninitialized"):
        out = symmetric_gpu.symmetric(x, y, cores=2)
    assert out.dtype == dtype and out.shape == (*batch, m, m)
    want, out = lower_and_mirrored(x, y), np.asarray(out, np.float64)
    assert np.abs(out - want).max() <= tolerance * np.abs(want).max()
    under = np.arange(m)[:, None] // 64 > np.arange(m) // 64
    np.testing.assert_array_equal(out[..., under], np.swapaxes(out, -1, -2)[..., under])
