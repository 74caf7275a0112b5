"""The PTX that Triton makes of our kernels, carried out by tests/plan/ptx. Needs the extra plan-gpu."""

import importlib.util
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from model.kernels import gather_gpu, grouped_matmul_decode, grouped_matmul_row
from quant import grid, grid_gpu
from quant.resident import Int4Weight
from tests.plan import ptx
from tests.plan.test_kernels_compile import array, compiled

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("jax_plugins"), reason="needs the extra plan-gpu"),
]

BF16 = ml_dtypes.bfloat16
E, NOBODY = 3, 3


def carried_out(folder, name, function, abstract, given, result, blocks):
    """What the kernel writes into an array like `result`, every element once, and to nothing else."""
    kernel = ptx.record_triton(
        lambda options: compiled("h200-1", function, *abstract, options=options), folder, name, len(given) + 1
    )
    arrays = [np.array(a) for a in (*given, result)]
    *untouched, times = ptx.run(kernel, arrays, itertools.product(*map(range, blocks)), 0, False)
    assert (times == 1).all() and not any(count.any() for count in untouched)
    return arrays[-1]


def weights(rng, I, O, group):
    """(as the kernel's function is given them, as the kernel is, in float64): on the grid, or whole without a group."""
    if group is None:
        whole = rng.standard_normal((E, I, O)).astype(BF16)
        return array(whole.shape, jnp.bfloat16), [whole], whole.astype(np.float64)
    codes = rng.integers(-8, 8, (E, I, O))
    scales = np.exp2(rng.uniform(-9, -3, (E, I // group, O))).astype(BF16)
    packed = ((codes[..., ::2] & 15) | (codes[..., 1::2] & 15) << 4).astype(np.uint8)
    w = Int4Weight(array(codes.shape, jnp.int4), array(scales.shape, jnp.bfloat16), -2, group)
    return w, [packed, scales], (codes.astype(BF16) * np.repeat(scales, group, 1)).astype(np.float64)


@pytest.mark.parametrize("group, I", [(32, 160), (16, 96), (64, 128), (None, 112)])
def test_experts_of_a_row(group, I, monkeypatch, tmp_path):
    """Near float64, zeros for a row of nobody; a row that is one at one place and zero elsewhere gives the weights back, bit for
    bit. Parts of the contraction are not all of one length."""
    O, cuts, expert, rng = 256, 3, np.array([2, NOBODY, 0], np.int32), np.random.default_rng(0)
    tiles = O // grouped_matmul_row.WIDTH
    monkeypatch.setattr(grouped_matmul_row, "PROGRAMS", cuts * len(expert) * tiles)
    monkeypatch.setattr(grouped_matmul_row, "LEAST", grouped_matmul_row.STEP)
    w, given, w64 = weights(rng, I, O, group)
    x = np.concatenate([rng.standard_normal((2, I)), np.eye(1, I, I // 2 + 5)]).astype(BF16)
    parts = carried_out(
        tmp_path,
        "experts_of_a_row",
        grouped_matmul_row.rows,
        (array(x.shape, jnp.bfloat16), w, array(expert.shape, jnp.int32)),
        [expert, x, *given],
        np.full((cuts, len(expert), O), np.nan, np.float32),
        (len(expert), tiles, cuts),
    )
    mine, want = parts.astype(np.float64).sum(0), x[0].astype(np.float64) @ w64[2]
    assert np.abs(mine[0] - want).max() <= 1e-6 * np.abs(want).max()  # float32 sums of some 50 products
    assert not mine[1].any()
    np.testing.assert_array_equal(mine[2], w64[0, I // 2 + 5])


@pytest.mark.parametrize("group, block", [(32, 16), (16, 32), (None, 16)])
def test_decoding(group, block, monkeypatch, tmp_path):
    """Blocks of a few rows: the same, where copies to shared memory come when they are waited for."""
    I, O, expert, rng = 256, 256, np.array([1, 2, NOBODY], np.int32), np.random.default_rng(0)
    tiles, cuts = O // grouped_matmul_decode.WIDTH, 2 if group else 1
    monkeypatch.setattr(grouped_matmul_decode, "PROGRAMS", cuts * len(expert) * tiles)
    w, given, w64 = weights(rng, I, O, group)
    place = np.arange(block) * 37 % I
    x = np.concatenate([rng.standard_normal((block, I)), np.eye(I)[place], np.zeros((block, I))]).astype(BF16)
    parts = carried_out(
        tmp_path,
        "experts_decoding",
        grouped_matmul_decode.rows,
        (array(x.shape, jnp.bfloat16), w, array(expert.shape, jnp.int32)),
        [expert, x, *given],
        np.full((cuts, len(x), O), np.nan, np.float32 if cuts > 1 else BF16),
        (len(expert), tiles, cuts),
    )
    mine, want = parts.astype(np.float64).sum(0), x[:block].astype(np.float64) @ w64[1]
    assert np.abs(mine[:block] - want).max() <= (1e-6 if group else 4e-3) * np.abs(want).max()  # float32, or one rounding
    np.testing.assert_array_equal(mine[block : 2 * block], w64[2, place])
    assert not mine[2 * block :].any()


def test_rows_to_slots(tmp_path):
    x, index = np.random.default_rng(0).standard_normal((40, 192)).astype(BF16), np.arange(32, dtype=np.int32) * 7 % 45
    mine = carried_out(
        tmp_path,
        "rows_to_slots",
        gather_gpu.rows,
        (array(x.shape, jnp.bfloat16), array(index.shape, jnp.int32)),
        [index, x],
        np.full((32, 192), np.nan, BF16),
        (6, 1, 1),
    )
    np.testing.assert_array_equal(mine, np.concatenate([x, np.zeros((5, 192), BF16)])[index])


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_on_grid(dtype, stacked, tmp_path):
    """The numbers of quant/grid.py, also of groups of zeros, of tiny and huge numbers, and with an entry that is none; or of a
    layer of a stack whose other layers hold no numbers."""
    w = np.random.default_rng(0).standard_normal((4, 32, 64))
    w *= np.exp2(np.linspace(-118, 126, 64))
    w[0, :, 3], w[1, 7, 5], w[2, 9, 11] = 0, np.nan, -np.inf
    w[3] = np.linspace(-7.5, 7.5, 32)[:, None]  # many ties
    w = w.astype(dtype)
    given = [np.stack([w * np.nan, w, w * np.nan]), np.ones(1, np.int32)] if stacked else [w]
    mine = carried_out(
        tmp_path,
        "on_grid",
        lambda w, *layer: grid_gpu.on_grid(w, -2, 32, 7, *(n[0] for n in layer)),
        tuple(array(a.shape, jnp.dtype(a.dtype)) for a in given),
        given,
        np.full(w.shape, np.nan, BF16),
        (4, 1, 1),
    )
    with jax.default_device(jax.devices("cpu")[0]):
        want = np.asarray(grid.on_grid(jnp.asarray(w), -2, 32), np.float32)
    mine = mine.astype(np.float32)
    np.testing.assert_array_equal(np.isfinite(mine), np.isfinite(want))  # of an infinite group one is NaN, another infinite
    np.testing.assert_array_equal(mine[np.isfinite(want)], want[np.isfinite(want)])
    assert not np.isfinite(want[1, :, 5]).any() and not np.isfinite(want[2, :, 11]).any()
