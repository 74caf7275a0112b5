"""Products whose result is symmetric: every implementation against float64, and what it multiplies."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from optim import symmetric_tpu
from optim.symmetric import BLOCKS, IMPLEMENTATIONS, implementation


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that small matrices have several; the interpreter takes any size."""
    monkeypatch.setattr(symmetric_tpu, "LANES", 8)
    monkeypatch.setattr(symmetric_tpu, "LARGEST_TILE", 24)
    monkeypatch.setattr(symmetric_tpu, "LARGEST_STEP", 16)


HERE = ("full", "rows", "tpu")
"""The entry for Hopper GPUs takes other sizes: tests/optim/test_symmetric_gpu.py."""


def multiply(name, x, y):
    """Kernels for chips that are not there run in Pallas' interpreter."""
    with pltpu.force_tpu_interpret_mode() if name == "tpu" else nullcontext():
        return np.asarray(jax.jit(IMPLEMENTATIONS[name].multiply)(x, y), np.float64)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 2e-6), (jnp.bfloat16, 4e-3)])  # one rounding of the result
@pytest.mark.parametrize("shape", [(48, 48), (1, 2, 16, 8)])  # four tiles of three parts; one tile
@pytest.mark.parametrize("name", HERE)
def test_gram_matrix(name, shape, dtype, tolerance):
    """x x^T, with any number of batch axes."""
    x = jax.random.normal(jax.random.key(0), shape).astype(dtype)
    out = multiply(name, x, x)
    x64 = np.asarray(x, np.float64)
    want = x64 @ np.swapaxes(x64, -1, -2)
    assert np.abs(out - want).max() <= tolerance * np.abs(want).max()


@pytest.mark.parametrize("name", HERE)
def test_commuting_matrices(name):
    """The product of two polynomials of one symmetric matrix. Blocks above the diagonal are mirror images to the bit;
    those on it are computed in full and differ by rounding, as the product in the other order would."""
    a = jax.random.normal(jax.random.key(1), (48, 48)) / 8
    p = a @ a.T
    q = 2 * p - p @ p
    out, want = multiply(name, p, q), np.asarray(p, np.float64) @ np.asarray(q, np.float64)
    assert np.abs(out - want).max() <= 1e-5 * np.abs(want).max()  # p and q commute up to float32
    if name != "full":
        width = {"rows": 48 // BLOCKS, "tpu": 8}[name]
        under = np.arange(48)[:, None] // width > np.arange(48) // width
        np.testing.assert_array_equal(out[under], out.T[under])


@pytest.mark.parametrize("m, k", [(24, 24), (72, 48)])
def test_schedule_visits_every_tile_once(m, k):
    """In runs over k for tiles on and under the diagonal; the mirror image follows at once and fetches nothing."""
    tiles, steps = m // 24, k // 24
    table = symmetric_tpu._schedule(tiles, steps)
    i, j, step, row, column = table
    runs = [tuple(pair) for n, pair in enumerate(zip(row, column)) if n == 0 or pair != (row[n - 1], column[n - 1])]
    assert sorted(runs) == sorted(np.ndindex(tiles, tiles))
    multiplied = row == i
    assert np.all(column[multiplied] == j[multiplied]) and np.all(j <= i)
    assert np.count_nonzero(multiplied) == steps * tiles * (tiles + 1) // 2
    for n in np.flatnonzero(~multiplied):
        assert (row[n], column[n]) == (column[n - 1], row[n - 1]) and np.array_equal(table[:3, n], table[:3, n - 1])


def test_shares(monkeypatch):
    """Of the full product, at the tiles that are compiled: nearly a half for Kimi K2's matrices."""
    monkeypatch.undo()
    tpu, rows = IMPLEMENTATIONS["tpu"].share, IMPLEMENTATIONS["rows"].share
    assert [tpu(m) for m in (1024, 2048)] == [0.625, 0.5625] and tpu(7168) == pytest.approx(0.518, abs=1e-3)
    assert rows(2048) == 0.625
    assert [implementation(p, 2048, 7168) for p in ("cpu", "tpu", "gpu", "hopper")] == ["full", "tpu", "rows", "hopper"]
    assert implementation("tpu", 512, 7168) == "full" and implementation("gpu", 1100, 7168) == "full"


def test_which_sizes_are_halved_on_a_tpu(monkeypatch):
    """Not those that only tiles of 128 divide, which are fetched more often than halving saves, nor those whose schedule is
    larger than a core's scalar memory."""
    monkeypatch.undo()
    halved = [
        (m, k) for m, k in ((2048, 7168), (7168, 18432), (5120, 12288), (1408, 2048)) if implementation("tpu", m, k) == "tpu"
    ]
    assert len(halved) == 4
    for m, k in halved:
        tile, step = symmetric_tpu._tile(m, symmetric_tpu.LARGEST_TILE), symmetric_tpu._tile(k, symmetric_tpu.LARGEST_STEP)
        assert symmetric_tpu._schedule(m // tile, k // step).size <= 5 * symmetric_tpu.MOST_STEPS
    assert {implementation("tpu", m, k) for m, k in ((2176, 11264), (2944, 11264), (6784, 18432), (65536, 131072))} == {"full"}
