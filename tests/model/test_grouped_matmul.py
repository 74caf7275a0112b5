"""Dispatch: every (token, expert) pair has exactly one slot. Grouped products: every implementation against float64."""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from model import dispatch
from model import grouped_matmul as grouped_matmul_module
from model.grouped_matmul import IMPLEMENTATIONS, block_rows, grouped_matmul, implementation
from model.kernels import grouped_matmul_tpu

E, D, F = 6, 24, 40


def here(name):
    """Kernels for chips that are not there run in Pallas' interpreter."""
    return pltpu.force_tpu_interpret_mode() if name == "tpu" else nullcontext()


def chosen(kind, N=50, K=2, seed=0):
    """[N, K] distinct experts per token: spread, all on two experts (others empty), or skewed."""
    rng = np.random.default_rng(seed)
    if kind == "two":
        return np.tile([4, 1], (N, 1))
    p = np.ones(E) if kind == "spread" else 0.5 ** np.arange(E)
    return np.stack([rng.choice(E, K, replace=False, p=p / p.sum()) for _ in range(N)])


@pytest.mark.parametrize("kind", ["spread", "two", "skewed"])
@pytest.mark.parametrize("N, block", [(50, 8), (64, 16), (1, 8), (5, 1)])
def test_every_pair_has_one_slot_of_its_expert(kind, N, block):
    experts = chosen(kind, N)
    to = dispatch.plan(jnp.asarray(experts), E, block)
    slot_of, token_of = np.asarray(to.slot_of), np.asarray(to.token_of)
    assert len(np.unique(slot_of)) == experts.size, "two pairs share a slot"
    np.testing.assert_array_equal(token_of[slot_of], np.broadcast_to(np.arange(N)[:, None], slot_of.shape))
    np.testing.assert_array_equal(np.asarray(to.block_expert)[slot_of // block], experts)
    assert np.sum(token_of < N) == experts.size, "a padding slot holds a token"
    assert block == 1 or np.all(np.diff(np.asarray(to.block_expert)) >= 0)


@pytest.mark.parametrize("block, in_use", [(8, 2), (1, 3)])
def test_pairs_of_nobody_have_no_slot(block, in_use):
    """Free rows of a transport's buffer bring the expert E: they take no block from those that are in use."""
    experts = np.array([[4], [E], [1], [E], [4]])
    to = dispatch.plan(jnp.asarray(experts), E, block)
    M, slot_of = len(to.token_of), np.asarray(to.slot_of)[:, 0]
    assert slot_of[[1, 3]].min() >= M and np.asarray(to.token_of)[slot_of[[0, 2, 4]]].tolist() == [0, 2, 4]
    assert int(np.sum(np.asarray(to.block_expert) < E)) == in_use and int(np.sum(np.asarray(to.token_of) < 5)) == 3
    x = jax.random.normal(jax.random.key(0), (5, D))
    back = dispatch.from_slots(dispatch.to_slots(x, to), to)
    np.testing.assert_array_equal(back, x * np.array([1, 0, 1, 0, 1])[:, None])
    gates = jnp.arange(1.0, 6.0)[:, None]
    assert dispatch.gates_to_slots(gates, to)[slot_of[[0, 2, 4]]].tolist() == [1, 3, 5]
    assert float(jnp.sum(dispatch.gates_to_slots(gates, to))) == 9


@pytest.mark.parametrize("block", [8, 1])
def test_copies_and_sums_are_adjoint(block):
    """<to_slots(x), y> = <x, from_slots(y)>, and each is the other's gradient."""
    to = dispatch.plan(jnp.asarray(chosen("skewed")), E, block)
    x = jax.random.normal(jax.random.key(0), (50, D))
    y = jax.random.normal(jax.random.key(1), (len(to.token_of), D))
    assert jnp.vdot(dispatch.to_slots(x, to), y) == pytest.approx(float(jnp.vdot(x, dispatch.from_slots(y, to))), rel=1e-5)
    dx = jax.grad(lambda x: jnp.vdot(dispatch.to_slots(x, to), y))(x)
    np.testing.assert_array_equal(dx, dispatch.from_slots(y, to))
    dy = jax.grad(lambda y: jnp.vdot(x, dispatch.from_slots(y, to)))(y)
    np.testing.assert_array_equal(dy, dispatch.to_slots(x, to))


@pytest.mark.parametrize("kind", ["spread", "two"])
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-6), (jnp.bfloat16, 8e-3)])  # one rounding of the result
@pytest.mark.parametrize("name, block", [*((name, 8) for name in IMPLEMENTATIONS), ("batched", 1), ("hopper", 1)])
def test_three_products(name, block, dtype, tolerance, kind):
    """Forward, gradient of the rows, gradient of the weights (zero for experts without rows)."""
    experts = chosen(kind)
    experts[7, 1] = E if block == 1 else experts[7, 1]
    to = dispatch.plan(jnp.asarray(experts), E, block)
    keys = jax.random.split(jax.random.key(2), 3)
    tokens, w = jax.random.normal(keys[0], (50, D), dtype), jax.random.normal(keys[1], (E, D, F), dtype)
    x = dispatch.to_slots(tokens, to)
    g = jnp.where((to.token_of < 50)[:, None], jax.random.normal(keys[2], (len(x), F), dtype), 0)
    with here(name):
        out, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, to.block_expert, name), x, w)
        dx, dw = pull(g)

    x64, w64, g64 = (np.asarray(a, np.float64) for a in (x, w, g))
    of_row = np.repeat(np.asarray(to.block_expert), block)
    assert E in of_row, "this routing leaves no block over"
    w64, want_dw = np.concatenate([w64, np.zeros((1, D, F))]), np.zeros((E + 1, D, F))
    for row, e in enumerate(of_row):
        want_dw[e] += np.outer(x64[row], g64[row])
    for mine, want in (
        (out, np.einsum("md,mdf->mf", x64, w64[of_row])),
        (dx, np.einsum("mf,mdf->md", g64, w64[of_row])),
        (dw, want_dw[:E]),
    ):
        assert mine.dtype == dtype
        assert np.abs(np.asarray(mine, np.float64) - want).max() <= tolerance * np.abs(want).max()
    if kind == "two":
        assert not np.asarray(dw, np.float32)[[0, 2, 3, 5]].any()


@pytest.mark.parametrize("blocks, in_use", [(1, 1), (2, 1), (3, 3), (7, 0), (7, 5), (7, 7)])
def test_turns_of_several_blocks(monkeypatch, blocks, in_use):
    """Whole turns, a last one that lies over the one before, fewer blocks than a turn has, none in use: small integers, so
    every sum is exact."""
    monkeypatch.setattr(grouped_matmul_module, "BLOCKS_PER_TURN", 3)
    rng = np.random.default_rng(0)
    block_expert = np.full(blocks, E)
    block_expert[:in_use] = np.sort(rng.integers(0, E, in_use))
    x, g = (rng.integers(-4, 5, (blocks, 8, n)) * (block_expert < E)[:, None, None] for n in (D, F))
    w = rng.integers(-4, 5, (E, D, F))
    scanned = IMPLEMENTATIONS["scanned"]
    x32, g32, w32 = (jnp.asarray(a, jnp.float32) for a in (x.reshape(-1, D), g.reshape(-1, F), w))
    of_block = np.minimum(block_expert, E - 1)
    np.testing.assert_array_equal(scanned.rows(x32, w32, jnp.asarray(block_expert), False), (x @ w[of_block]).reshape(-1, F))
    np.testing.assert_array_equal(
        scanned.rows(g32, w32, jnp.asarray(block_expert), True), (g @ w[of_block].swapaxes(1, 2)).reshape(-1, D)
    )
    want = np.zeros((E, D, F))
    np.add.at(want, of_block, x.swapaxes(1, 2) @ g)
    np.testing.assert_array_equal(scanned.weights(x32, g32, jnp.asarray(block_expert), E, jnp.float32), want)


@pytest.mark.parametrize("block_expert", [[E, E], [1, 1, 3, E], [0, 0], [5], [0, 1, 2, 3, 4, 5], [2, 3, E, E]], ids=str)
def test_experts_without_rows_get_zeros_on_a_tpu(monkeypatch, block_expert):
    """First, last, between and all, in every tile: what nobody writes is NaN in the interpreter. Small integers: exact."""
    monkeypatch.setattr(grouped_matmul_tpu, "TILE_BYTES", 8 * 256 * 4 + 128 * 128 * 4)
    rng, experts = np.random.default_rng(0), np.asarray(block_expert)
    x, y = (rng.integers(-4, 5, (len(experts), 8, 256)) for _ in "xy")
    x32, y32 = (jnp.asarray(a.reshape(-1, 256), jnp.float32) for a in (x, y))
    want = np.zeros((E + 1, 256, 256))
    np.add.at(want, experts, x.swapaxes(1, 2) @ y)
    with here("tpu"):
        found = IMPLEMENTATIONS["tpu"].weights(x32, y32, jnp.asarray(experts), E, jnp.float32)
    np.testing.assert_array_equal(found, want[:E])


@pytest.mark.parametrize("room", [1 << 20, 1 << 17])
def test_tiles_that_hang_over_on_a_tpu(monkeypatch, room):
    """Widths that whole lanes do not divide, in tiles of 128; with little room blocks of rows are halved too. What lies over the
    edge is NaN in the interpreter. Small integers: exact."""
    monkeypatch.setattr(grouped_matmul_tpu, "INTENSITY", 64)
    monkeypatch.setattr(grouped_matmul_tpu, "TILE_BYTES", room)
    rng, experts, D, F, block = np.random.default_rng(0), np.array([0, 0, 3, E]), 320, 200, 64
    x, y = (rng.integers(-4, 5, (len(experts), block, n)) * (experts < E)[:, None, None] for n in (D, F))
    w = rng.integers(-4, 5, (E, D, F))
    x32, y32 = (jnp.asarray(a.reshape(-1, a.shape[-1]), jnp.float32) for a in (x, y))
    each = w[np.minimum(experts, E - 1)]
    want = np.zeros((E + 1, D, F))
    np.add.at(want, experts, x.swapaxes(1, 2) @ y)
    with here("tpu"):
        rows, weights = IMPLEMENTATIONS["tpu"].rows, IMPLEMENTATIONS["tpu"].weights
        w32, blocks = jnp.asarray(w, jnp.float32), jnp.asarray(experts)
        np.testing.assert_array_equal(rows(x32, w32, blocks, False), (x @ each).reshape(-1, F))
        np.testing.assert_array_equal(rows(y32, w32, blocks, True), (y @ each.swapaxes(1, 2)).reshape(-1, D))
        np.testing.assert_array_equal(weights(x32, y32, blocks, E, jnp.float32), want[:E])


@pytest.mark.parametrize(
    "width, tiles",
    [(2816, [128, 256, 1408, 2816]), (7168, [128, 256, 512, 896, 1024, 1792, 3584, 7168]), (96, [96]), (320, [128, 256, 320])],
)
def test_tiles_on_a_tpu(width, tiles):
    """Divisors, where there are good ones: nothing hangs over at the widths of this family."""
    assert grouped_matmul_tpu._tiles(width) == tiles
    assert len(grouped_matmul_tpu._tiles(2176)) == 17, "17 lanes' widths: in tiles of 128 rows would be read 17 times"


def test_weight_sums_stay_in_float32():
    """2,048 bfloat16 ones per entry: a bfloat16 running sum would stop at 256."""
    ones = jnp.ones((2048, 8), jnp.bfloat16)
    for name in IMPLEMENTATIONS:
        with here(name):
            total = IMPLEMENTATIONS[name].weights(ones, ones, jnp.zeros(256, jnp.int32), 1, jnp.float32)
        np.testing.assert_array_equal(total, np.full((1, 8, 8), 2048.0))


def test_a_gradient_without_a_kernel_is_said():
    """Of few rows per expert, on Hopper: blocks of 16, which only the forward product has a kernel for."""
    x, y = jnp.ones((32, 64), jnp.bfloat16), jnp.ones((32, 128), jnp.bfloat16)
    with pytest.warns(UserWarning, match="blocks of 64 rows .* not bfloat16, 64 x 128 and blocks of 16"):
        IMPLEMENTATIONS["hopper"].weights(x, y, jnp.array([0, 1]), 2, jnp.float32)


@pytest.mark.parametrize(
    "rows, experts, platform, block",
    [
        (1, 16, "cpu", 8),
        (256, 16, "cpu", 8),
        (16384, 64, "cpu", 64),
        (32768, 16, "cpu", 128),
        (32768, 16, "tpu", 512),
        (65536, 384, "hopper", 64),
        (98304, 64, "hopper", 128),
        (512, 384, "hopper", 16),
        (32, 384, "hopper", 1),
    ],
)
def test_block_rows(rows, experts, platform, block):
    assert block_rows(rows, experts, platform) == block


@pytest.mark.parametrize("rows, block", [(32, 1), (512, 16), (3072, 64), (98304, 128)])
def test_blocks_whose_gradients_have_kernels(rows, block):
    """Fewer than 64 rows per expert, as in short microbatches: in blocks of 64 their weights are read once for each expert; in
    blocks of 16 XLA would copy them for each block, or, with many, end the process."""
    assert block_rows(rows, 64, "hopper", trained=True) == block


def test_every_platform_has_an_implementation():
    assert {implementation(p) for p in ("cpu", "gpu", "hopper", "tpu")} <= set(IMPLEMENTATIONS)
