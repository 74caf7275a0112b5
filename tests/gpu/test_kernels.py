"""The Hopper kernels on a Hopper GPU, against float64. One command on such a machine: make test-gpu."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.platforms import platform_of
from model import cross_entropy, dispatch, token_loss
from model.grouped_matmul import IMPLEMENTATIONS, block_rows, grouped_matmul
from model.kernels import gather_gpu, grouped_matmul_decode, grouped_matmul_gpu
from quant import grid, grid_gpu
from quant.resident import to_int4
from tests.model.networks import step_by_step, wide

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(platform_of(jax.devices()[0]) != "hopper", reason="needs a Hopper GPU")]

LOADS = ("spread", "skewed", "two")


def routed(load: str, tokens: int, E: int, K: int, seed: int = 0):
    """[tokens, K] distinct experts: evenly spread, two thirds of all on a quarter of them, or all on two."""
    rng = np.random.default_rng(seed)
    if load == "two":
        return jnp.asarray(np.tile([E - 2, 1], (tokens, 1)))
    share = np.ones(E) if load == "spread" else np.where(np.arange(E) < E // 4, 6.0, 1.0)
    keys = np.log(share) + rng.gumbel(size=(tokens, E))
    return jnp.asarray(np.argsort(-keys, axis=1)[:, :K])


def against_float64(load: str, tokens: int, D: int, F: int, E: int, K: int):
    """Forward and both gradients of one random problem."""
    experts = routed(load, tokens, E, K)
    to = dispatch.plan(experts, E, block_rows(experts.size, E, "hopper"))
    assert grouped_matmul_gpu.takes(jnp.bfloat16, to.block, D, F)
    keys = jax.random.split(jax.random.key(1), 3)
    x = dispatch.to_slots(jax.random.normal(keys[0], (tokens, D), jnp.bfloat16), to)
    w = jax.random.normal(keys[1], (E, D, F), jnp.bfloat16)
    g = jnp.where((to.token_of < tokens)[:, None], jax.random.normal(keys[2], (len(x), F), jnp.bfloat16), 0)
    out, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, to.block_expert, "hopper"), x, w)
    dx, dw = pull(g)
    owner = np.asarray(to.block_expert)
    w64 = np.concatenate([np.asarray(w, np.float64), np.zeros((1, D, F))])
    x64, g64, out64, dx64 = (np.asarray(a, np.float64).reshape(len(owner), to.block, -1) for a in (x, g, out, dx))
    for block, e in enumerate(owner):
        close(out64[block], x64[block] @ w64[e])
        close(dx64[block], g64[block] @ w64[e].T)
    for e in range(E):
        close(np.asarray(dw[e], np.float64), np.einsum("bmd,bmf->df", x64[owner == e], g64[owner == e], optimize=True))


def close(mine, want):
    """To one rounding to bfloat16 of the largest entry; zero where all is zero."""
    assert np.abs(mine - want).max() <= 4e-3 * np.abs(want).max()


@pytest.mark.parametrize("rows", [1, 4, 20])
@pytest.mark.parametrize("packed", [False, True])
def test_a_network_decodes(packed, rows):
    """Step after step, kernels and all, the logits of XLA's own products, up to roundings to bfloat16."""
    cfg, params = wide(packed)
    mine, plain = (step_by_step(cfg, params, rows, platform) for platform in ("hopper", "gpu"))
    assert np.abs(mine - plain).max() <= 2e-2 * np.abs(plain).max()


@pytest.mark.parametrize("load", LOADS)  # "two" leaves experts without rows, all leave blocks of nobody
@pytest.mark.parametrize(
    "tokens, D, F, E, K",
    [
        (1024, 128, 256, 16, 4),  # blocks of 64, tiles wider than they need
        (2048, 192, 320, 8, 2),  # blocks of 128, both widths over the edge of a tile
        (2048, 1408, 2048, 8, 2),  # Moonlight's down projection
        (512, 7168, 1024, 4, 2),  # K2's contraction
    ],
)
def test_three_products(tokens, D, F, E, K, load):
    against_float64(load, tokens, D, F, E, K)


def test_float32_sums_of_weights():
    """The gradient of the weights in float32: 4,096 ones, where a bfloat16 sum would stop at 256."""
    ones = jnp.ones((4096, 64), jnp.bfloat16)
    total = grouped_matmul_gpu.weights(ones, ones, jnp.zeros(32, jnp.int32), 2, jnp.float32)
    np.testing.assert_array_equal(total, np.stack([np.full((64, 64), 4096.0), np.zeros((64, 64))]))


@pytest.mark.parametrize("load", LOADS)
def test_against_the_plain_entry(load):
    """A thousand blocks, so that every core has many tiles: the same as the batched entry to its rounding."""
    tokens, D, F, E, K = 16384, 256, 512, 64, 6
    experts = routed(load, tokens, E, K)[:, : 2 if load == "two" else K]
    to = dispatch.plan(experts, E, block_rows(experts.size, E, "hopper"))
    keys = jax.random.split(jax.random.key(1), 2)
    x = dispatch.to_slots(jax.random.normal(keys[0], (tokens, D), jnp.bfloat16), to)
    w = jax.random.normal(keys[1], (E, D, F), jnp.bfloat16)
    for _ in range(3):  # again with what the first run left in memory
        mine, plain = (
            np.asarray(IMPLEMENTATIONS[name].rows(x, w, to.block_expert, False), np.float32) for name in ("hopper", "batched")
        )
        assert np.abs(mine - plain).max() <= 8e-3 * np.abs(plain).max()


@pytest.mark.parametrize(
    "tokens, D, F, E, K", [(1, 2048, 2816, 64, 6), (4, 7168, 4096, 16, 8), (8, 7168, 4096, 16, 8), (300, 1408, 2048, 16, 2)]
)
def test_decoding(tokens, D, F, E, K):
    """A few rows per expert: near float64, with four-bit weights too, which are unpacked to what they give elsewhere, bit for
    bit: rows that are one at one place and zero elsewhere give them back."""
    experts = routed("spread", tokens, E, K)
    to = dispatch.plan(experts, E, block_rows(experts.size, E, "hopper"))
    assert to.block in (1, *grouped_matmul_decode.BLOCKS)
    keys = jax.random.split(jax.random.key(1), 2)
    x = dispatch.to_slots(jax.random.normal(keys[0], (tokens, D), jnp.bfloat16), to)
    packed = to_int4(jax.random.normal(keys[1], (E, D, F)), -2, 32)
    whole = packed.astype(jnp.bfloat16)
    rows = IMPLEMENTATIONS["hopper"].rows
    w64 = np.concatenate([np.asarray(whole, np.float64), np.zeros((1, D, F))])
    for w in (whole, packed):
        mine = np.asarray(rows(x, w, to.block_expert, False), np.float64)
        for block, e in enumerate(np.asarray(to.block_expert)):
            at = slice(block * to.block, (block + 1) * to.block)
            close(mine[at], np.asarray(x[at], np.float64) @ w64[e])
    place = np.arange(len(x)) * 37 % D
    back = np.asarray(rows(jax.nn.one_hot(place, D, dtype=jnp.bfloat16), packed, to.block_expert, False), np.float64)
    np.testing.assert_array_equal(back, w64[np.repeat(to.block_expert, to.block), place])


@pytest.mark.parametrize("D", [2048, 192, 64])
def test_rows_to_slots(D):
    """Every row where it belongs, zeros in padding: the same as XLA's gather."""
    to = dispatch.plan(routed("skewed", 1000, 16, 3), 16, 64)
    x = jax.random.normal(jax.random.key(0), (1000, D), jnp.bfloat16)
    np.testing.assert_array_equal(gather_gpu.rows(x, to.token_of), dispatch.to_slots(x, to))


@pytest.mark.parametrize("shape, axis", [((8, 2048, 2, 512), -3), ((8, 1408, 2048), -2), ((2, 96, 192), -2)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_on_the_grid(dtype, shape, axis):
    """The kernel finds the grid values of the definition, of groups of zeros, of masters that lie between two codes and
    of those that are no numbers too."""
    w = jax.random.normal(jax.random.key(0), shape, jnp.float32).at[0, :32].set(0).astype(dtype)
    assert grid_gpu.takes(shape, axis, 32)
    for masters in (w, (grid.on_grid(w, axis, 32) * 0.5).astype(dtype), w.at[0, 3].set(jnp.nan).at[1, :32].set(jnp.nan)):
        want = np.asarray(grid.on_grid(masters, axis, 32), np.float32)  # numpy takes no bfloat16 NaN for equal to another
        stack = jnp.stack([jnp.full_like(w, jnp.nan), masters])
        for mine in (grid_gpu.on_grid(masters, axis, 32), grid_gpu.on_grid(stack, axis, 32, layer=jnp.int32(1))):
            np.testing.assert_array_equal(np.asarray(mine, np.float32), want)


def test_a_stack_beyond_four_gigabytes():
    """The last layer of one, where offsets need more than 32 bits."""
    shape, last = (64, 2048, 2, 1408), jax.random.normal(jax.random.key(0), (64, 2048, 2, 1408), jnp.bfloat16)
    stack = jnp.zeros((7, *shape), jnp.bfloat16).at[6].set(last)
    assert stack.nbytes > 2**32
    mine = jax.jit(grid_gpu.on_grid, static_argnums=(1, 2, 3))(stack, -3, 32, 7, jnp.int32(6))
    np.testing.assert_array_equal(mine, jax.jit(grid.on_grid, static_argnums=(1, 2))(last, -3, 32).astype(jnp.bfloat16))


@pytest.mark.parametrize("N", [4096, 5000])
def test_the_loss_with_its_gradients(N, monkeypatch):
    """Several tiles, the last one not full, against the form that holds all logits, up to the rounding of their gradients."""
    monkeypatch.setattr(token_loss, "LOGITS", 2**23)
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, head = jax.random.normal(keys[0], (N, 512), jnp.bfloat16), 0.1 * jax.random.normal(keys[1], (512, 8192))
    targets, weights = jax.random.randint(keys[2], (N,), 0, 8192), jnp.full(N, 1 / N)
    factors = jnp.float32(1), jnp.float32(1e-4)

    def whole(hidden, head):
        nll, lse = cross_entropy.reference(hidden, head, targets)
        return jnp.sum(weights * (nll + factors[1] * lse**2))

    def mine(hidden, head):
        return token_loss.with_gradients(hidden, head, targets, weights, *factors)[0]

    (loss, grads), (want, want_grads) = (jax.jit(jax.value_and_grad(f, (0, 1)))(hidden, head) for f in (mine, whole))
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    for g, w in zip(grads, want_grads, strict=True):
        g, w = np.asarray(g, np.float32), np.asarray(w, np.float32)
        assert np.linalg.norm(g - w) <= 1e-2 * np.linalg.norm(w)


def test_jax_own_kernel_agrees():
    """jax ships an example of a ragged product for Hopper (experimental): a judge that is not ours."""
    example = pytest.importorskip("jax.experimental.pallas.ops.gpu.ragged_dot_mgpu")
    E, D, F, rows = 4, 512, 1024, 512
    x = jax.random.normal(jax.random.key(0), (E * rows, D), jnp.bfloat16)
    w = jax.random.normal(jax.random.key(1), (E, D, F), jnp.bfloat16)
    theirs = example.ragged_dot(
        x,
        w,
        group_sizes=jnp.full(E, rows, jnp.int32),
        block_m=128,
        block_n=128,
        block_k=64,
        max_concurrent_steps=4,
        grid_block_n=1,
    )
    mine = grouped_matmul_gpu.rows(x, w, jnp.repeat(jnp.arange(E), rows // 128), False)
    np.testing.assert_allclose(np.asarray(mine, np.float32), np.asarray(theirs, np.float32), rtol=1e-2, atol=1e-1)
