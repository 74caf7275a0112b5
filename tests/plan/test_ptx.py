"""The Hopper kernels' own PTX, carried out by tests/plan/ptx against float64. Needs the extra plan-gpu."""

import importlib.util

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kernels import hopper
from model.kernels import attention_gpu, grouped_matmul_gpu
from model.kernels.attention_chunked import MASKED
from model.kernels.attention_gpu import gradients
from model.kernels.intervals import Intervals
from optim import symmetric_gpu
from tests.plan import ptx
from tests.plan.test_kernels_compile import array, compiled

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("jax_plugins"), reason="needs the extra plan-gpu"),
]

BF16 = ml_dtypes.bfloat16
BLOCK_EXPERT, E = [0, 0, 2, 4], 4
"""Experts 1 and 3 have no rows, the last block is nobody's."""
CORES = 2


def abstract(arrays):
    return [array(a.shape, a.dtype) for a in arrays]


def normal(*shapes, dtype=BF16, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def nan(shape, dtype):
    return np.full(shape, np.nan, dtype)


def close(mine, want, tolerance):
    """Of the largest entry. `not >` would let NaN pass."""
    assert np.abs(mine.astype(np.float64) - want).max() <= tolerance * np.abs(want).max()


def carried_out(kernel, given, results, blocks=CORES, schedules=((1, True), (2, False))):
    """The results under each schedule (seed, whether products are late); every element is written once, nothing else is."""
    blocks = [(core, 0, 0) for core in range(blocks)] if isinstance(blocks, int) else blocks
    for seed, late in schedules:
        arrays = [np.array(a) for a in (*given, *results)]
        times = ptx.run(kernel, arrays, blocks, seed, late)
        for count, a in zip(times, arrays):
            assert (count == any(a is r for r in arrays[len(given) :])).all()
        yield arrays[len(given) :]


def recorded(monkeypatch, folder, function, given, results):
    return ptx.record(monkeypatch, lambda: compiled("h200-1", function, *abstract(given)), folder, len(given) + len(results))


def rows_problem(block, transposed, I, O, block_expert=BLOCK_EXPERT):
    """(function, given to it, given to the kernel, result, what it should be)."""
    expert = np.array(block_expert, np.int32)
    x, w = normal((len(expert) * block, I), (E, O, I) if transposed else (E, I, O))
    x[np.repeat(expert, block) == E] = 0
    w64 = np.concatenate([w.astype(np.float64), np.zeros((1, *w.shape[1:]))])[expert]
    want = np.einsum("bmi,boi->bmo" if transposed else "bmi,bio->bmo", x.astype(np.float64).reshape(len(expert), block, I), w64)
    return (
        lambda e, x, w: grouped_matmul_gpu.rows(x, w, e, transposed, cores=CORES),
        [expert, x, w],
        [nan((len(x), O), BF16)],
        want.reshape(-1, O),
    )


@pytest.mark.parametrize(
    "block, transposed, I, O", [(64, False, 128, 192), (64, True, 192, 320), (128, False, 320, 64), (128, True, 192, 320)]
)
def test_rows(block, transposed, I, O, monkeypatch, tmp_path):
    """Widths that hang over the last tile's edge, a block of nobody, and the same program with other experts."""
    function, given, result, want = rows_problem(block, transposed, I, O)
    kernel = recorded(monkeypatch, tmp_path, function, given, result)
    for (mine,) in carried_out(kernel, given, result):
        close(mine, want, 4e-3)  # one rounding to bfloat16
    for block_expert in ([4, 4, 4, 4], [3, 3, 3, 3]):
        _, given, result, want = rows_problem(block, transposed, I, O, block_expert)
        for (mine,) in carried_out(kernel, given, result, schedules=((3, True),)):
            close(mine, want, 4e-3)


@pytest.mark.parametrize("block, D, F, dtype", [(64, 192, 320, np.float32), (128, 64, 192, BF16)])
def test_weights(block, D, F, dtype, monkeypatch, tmp_path):
    """Zeros for experts without rows."""
    expert = np.array(BLOCK_EXPERT, np.int32)
    x, y = normal((4 * block, D), (4 * block, F))
    want = np.zeros((E + 1, D, F))
    np.add.at(want, expert, np.einsum("bmd,bmf->bdf", *(a.astype(np.float64).reshape(4, block, -1) for a in (x, y))))
    first = np.sum(expert < np.arange(E + 1)[:, None], axis=1, dtype=np.int32)
    result = [nan((E, D, F), dtype)]
    kernel = ptx.record(
        monkeypatch,
        lambda: compiled(
            "h200-1",
            lambda e, x, y: grouped_matmul_gpu.weights(x, y, e, E, jnp.dtype(dtype), cores=CORES),
            *abstract([expert, x, y]),
        ),
        tmp_path,
        4,
    )
    for (mine,) in carried_out(kernel, [first, x, y], result):
        close(mine, want[:E], 1e-6 if dtype == np.float32 else 4e-3)
        assert not mine[[1, 3]].any()


@pytest.mark.parametrize("batch, m, k, dtype", [(2, 192, 128, np.float16), (1, 320, 64, BF16)])
def test_symmetric(batch, m, k, dtype, monkeypatch, tmp_path):
    """x y^T on and under the diagonal, squares of 64 x 64, and its mirror image above."""
    x, y = normal((batch, m, k), (batch, m, k), dtype=dtype)
    rows, columns = (np.ascontiguousarray(table) for table in symmetric_gpu._schedule(m))
    kernel = ptx.record(
        monkeypatch,
        lambda: compiled("h200-1", lambda x, y: symmetric_gpu.symmetric(x, y, cores=CORES), *abstract([x, y])),
        tmp_path,
        5,
    )
    product = x.astype(np.float64) @ np.swapaxes(y.astype(np.float64), 1, 2)
    square = np.arange(m) // 64
    want = np.where(square[:, None] >= square, product, np.swapaxes(product, 1, 2))
    for (mine,) in carried_out(kernel, [rows, columns, x, y], [nan((batch, m, m), dtype)]):
        close(mine, want, 1e-3 if dtype == np.float16 else 4e-3)


def packed(B, S):
    """A short document, one that goes around every ring, a short one, padding."""
    segments = np.zeros((B, S), np.int32)
    for b in range(B):
        segments[b, : S - 5 - 3 * b] = np.repeat([1, 2, 3], [S // 8 - 7 * b, S - S // 8 - 40 + 7 * b, 35 - 3 * b])
    return segments


def defined(q, k, v, g, low, high, scale):
    """What the kernels should give, in float64: (output, log-sum-exp, largest logit), delta, dq, (dk, dv)."""
    q, k, v, g = (a.astype(np.float64) for a in (q, k, v, g))
    key = np.arange(k.shape[1])
    seen = ((key >= low[..., None]) & (key <= high[..., None]))[:, None]
    logits = np.where(seen, np.einsum("bshd,bthd->bhst", q, k) * scale, -np.inf)
    top = np.maximum(logits.max(-1), MASKED)
    p = np.exp(logits - top[..., None])
    total = np.maximum(p.sum(-1), 1e-30)
    p /= total[..., None]
    out = np.einsum("bhst,bthv->bshv", p, v)
    delta = np.einsum("bshv,bshv->bhs", g, out)
    ds = p * (np.einsum("bshv,bthv->bhst", g, v) - delta[..., None]) * scale
    return (
        (out, top + np.log(total), top),
        delta,
        np.einsum("bhst,bthd->bshd", ds, k),
        (np.einsum("bhst,bshd->bthd", ds, q), np.einsum("bhst,bshv->bthv", p, g)),
    )


@pytest.mark.parametrize("B, S, H, d, v", [(2, 256, 2, 64, 64), (1, 512, 1, 192, 128)])
@pytest.mark.parametrize("which", ["forward", "queries", "keys"])
def test_attention(which, B, S, H, d, v, monkeypatch, tmp_path):
    """Packed rows with padding, Kimi K2's scale."""
    scale = 0.1308609
    q, k, v, g = normal((B, S, H, d), (B, S, H, d), (B, S, H, v), (B, S, H, v))
    seen = Intervals.of(jnp.asarray(packed(B, S)), jnp.arange(S), S, S)
    low, high = np.asarray(seen.low), np.asarray(seen.high)
    g[high < low] = 0
    (out, lse, top), delta, dq, (dk, dv) = defined(q, k, v, g, low, high, scale)
    numbers = [lse.astype(np.float32), delta.astype(np.float32)]
    tile = attention_gpu.TILE
    if which == "forward":
        given, spans, want = [q, k, v], seen.keys_of_queries(tile, tile, S), (out, lse, top)
        results = [nan(out.shape, BF16), nan(lse.shape, np.float32), nan(lse.shape, np.float32)]
    elif which == "queries":
        given, spans, want = [q, k, v, g, *numbers], seen.keys_of_queries(tile, attention_gpu.ROWS, S), (dq,)
        results = [nan(q.shape, BF16)]
    else:
        given, spans, want = [q, k, v, g, *numbers], seen.queries_of_keys(attention_gpu.ROWS, tile, S), (dk, dv)
        results = [nan(k.shape, BF16), nan(v.shape, BF16)]
    function = {"forward": attention_gpu.forward, "queries": gradients.of_queries, "keys": gradients.of_keys}[which]
    kernel = ptx.record(
        monkeypatch,
        lambda: compiled(
            "h200-1", lambda low, high, *x: function(*x, Intervals(low, high), scale), *abstract([low, high, *given])
        ),
        tmp_path,
        len(given) + 3 + len(results),
    )
    blocks = [(t, h, b) for t in range(S // tile) for h in range(H) for b in range(B)]
    for mine in carried_out(kernel, [*given, low, high, np.asarray(spans, np.int32)], results, blocks):
        close(mine[0], want[0], 0.012)  # rounding of weights, of their gradients and of the result
        for x, y in zip(mine[1:], want[1:], strict=True):
            if which == "forward":
                np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)
            else:
                close(x, y, 0.012)


@pytest.mark.parametrize(
    "name, harmless",
    [
        ("wgmma_wait", lambda left: left == 1),  # a buffer is handed back while it is multiplied
        ("commit_smem", lambda: True),  # no fence between a result's way out and the copy engine
        ("wait_smem_to_gmem", lambda left, **_: left == 1),
    ],  # a result goes where the one before it still lies
    ids=["release in flight", "no fence", "no wait for stores"],
)
def test_it_notices(name, harmless, monkeypatch, tmp_path):
    """The emulation can fail: the frame with one thing left out gives wrong values or a hazard."""
    real = getattr(hopper.plgpu, name)
    monkeypatch.setattr(hopper.plgpu, name, lambda *x, **more: None if harmless(*x, **more) else real(*x, **more))
    function, given, result, want = rows_problem(128, True, 192, 320)
    kernel = recorded(monkeypatch, tmp_path, function, given, result)
    with pytest.raises((AssertionError, ptx.Hazard)):
        for (mine,) in carried_out(kernel, given, result):
            close(mine, want, 4e-3)


def test_why_a_width_of_64_is_not_taken(monkeypatch, tmp_path):
    """Two workers share 64 columns: the second, past the edge, writes into the first one's (`hopper.run`)."""
    function, given, result, want = rows_problem(64, False, 64, 64)
    assert not grouped_matmul_gpu.takes(jnp.bfloat16, 64, 64, 64)
    kernel = recorded(monkeypatch, tmp_path, function, given, result)
    with pytest.raises(AssertionError):
        for (mine,) in carried_out(kernel, given, result):
            close(mine, want, 4e-3)
