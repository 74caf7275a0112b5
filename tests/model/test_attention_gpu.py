"""Attention for Hopper: which tiles it visits, and the kernels in Pallas' interpreter, which also reports data races. It
runs where jax has one (0.12). That the code compiles: tests/plan/test_attention_compile.py; what it then does:
tests/plan/test_ptx.py; on a device: tests/gpu."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import hopper
from model import attention
from model.kernels import attention_gpu
from model.kernels.attention_gpu import outputs
from model.kernels.intervals import Intervals
from tests.model.interpret_gpu import PRESENT, interpreted_attention, sabotaged
from tests.model.test_attention import inputs, packed


@pytest.mark.parametrize("kind", ["whole", "packed", "empty row"])
@pytest.mark.parametrize("at", [np.arange(240), np.r_[60:120, 180:240]], ids=["all", "two chunks"])
def test_intervals_are_what_is_visible(kind, at):
    """Every visible pair lies in a tile that is visited, and only tiles that are visible whole go without a mask."""
    segments, S, T = packed(2, 240, kind), 256, 256
    seen = Intervals.of(segments, jnp.asarray(at), S, T)
    visible = np.zeros((2, S, T), bool)
    visible[:, : len(at), :240] = attention.visible_BST(segments, jnp.asarray(at)) & (segments[:, at] > 0)[..., None]
    key = np.arange(T)
    np.testing.assert_array_equal((key >= np.asarray(seen.low)[..., None]) & (key <= np.asarray(seen.high)[..., None]), visible)
    for queries, keys, spans, axes in (
        (32, 16, seen.keys_of_queries(32, 16, T), (2, 4)),
        (16, 32, np.asarray(seen.queries_of_keys(16, 32, T)), (4, 2)),
    ):
        tiles = visible.reshape(2, S // queries, queries, T // keys, keys)
        some, every = tiles.any((2, 4)), tiles.all((2, 4))
        if axes == (4, 2):
            some, every = some.swapaxes(1, 2), every.swapaxes(1, 2)
        index = np.arange(some.shape[-1])
        first, inside, outside, end = (np.asarray(spans)[..., i, None] for i in range(4))
        assert (first <= inside).all() and (inside <= outside).all() and (outside <= end).all()
        assert not (some & ~((index >= first) & (index < end))).any(), "a visible tile is not visited"
        assert not (((index >= inside) & (index < outside)) & ~every).any(), "a tile needs a mask and has none"
        if kind == "whole" and len(at) == 240:
            assert (some == ((index >= first) & (index < end))).all(), "a tile is visited for nothing"
            assert (every == ((index >= inside) & (index < outside))).all()


def operands(B, S, H, d, v, seed=0):
    """bfloat16, and float32 of the same values."""
    args = [x.astype(jnp.bfloat16) for x in inputs(B, S, H, d, v, seed=seed)]
    return args, [x.astype(jnp.float32) for x in args]


def compare(run, args, exact, segments, at, scale):
    """`run` against the definition in float32: output, largest logit, gradients. Rounding of weights and of their
    gradients to bfloat16, and of each result: 2**-8 each, of the largest entry. Rows that see nothing are zero."""
    seen = (segments[:, at] > 0)[..., None, None]
    *args, g = args
    g = jnp.where(seen, g, 0)
    (out, top), pull = jax.vjp(lambda q, k, v: run(q, k, v, segments, at, scale), *args)
    mine = (out, *pull((g, jnp.zeros_like(top))))
    (want, want_top), pull = jax.vjp(lambda q, k, v: attention.reference(q, k, v, segments, at, scale), *exact[:3])
    want = (jnp.where(seen, want, 0), *pull((g.astype(jnp.float32), jnp.zeros_like(want_top))))
    for name, x, y in zip(("out", "dq", "dk", "dv"), mine, want, strict=True):
        assert x.dtype == jnp.bfloat16 and np.isfinite(np.asarray(x, np.float32)).all()
        assert np.abs(np.asarray(x, np.float32) - np.asarray(y)).max() <= 0.012 * np.abs(np.asarray(y)).max(), name
    np.testing.assert_allclose(top, want_top, rtol=2e-6)  # products of bfloat16 are exact in float32; only sums differ


@pytest.mark.skipif(not PRESENT, reason="this jax has no GPU interpreter")
@pytest.mark.parametrize(
    "S, H, d, v, kind, chunks",
    [
        pytest.param(300, 1, 64, 64, "whole", False, id="whole"),  # five tiles of queries pass through a ring of three
        pytest.param(200, 1, 64, 64, "packed", False, id="packed"),
        pytest.param(520, 2, 192, 128, "packed", False, id="192 128", marks=pytest.mark.slow),
        pytest.param(512, 1, 128, 64, "whole", True, id="two chunks", marks=pytest.mark.slow),
    ],
)
def test_interpreted(S, H, d, v, kind, chunks, monkeypatch):
    """The kernels as they are, warpgroups and barriers included, on small shapes; Kimi K2's scale, by which the logit of what
    is not seen is no round number: a fused multiply-add, which a GPU makes here and a CPU too, leaves its rounding."""
    args, exact = operands(1, S, H, d, v)
    segments, at = packed(1, S, kind), jnp.arange(S)
    if chunks:
        at = jnp.asarray(np.r_[S // 4 : S // 2, 3 * S // 4 : S])
        for x in (args, exact):
            x[0], x[3] = x[0][:, at], x[3][:, at]
    with interpreted_attention(monkeypatch):
        compare(attention_gpu.attend, args, exact, segments, at, 0.1308609)


@pytest.mark.skipif(not PRESENT, reason="this jax has no GPU interpreter")
@pytest.mark.parametrize(
    "product, release",
    [
        (
            "                s = frame.logits(own, k_ring.at[slot], take_turns)\n",
            "                plgpu.barrier_arrive(k_freed.at[slot])\n",
        ),
        (
            "                part = pl.run_scoped(values, plgpu.ACC((ROWS, dv), jnp.float32))\n",
            "                plgpu.barrier_arrive(v_freed.at[slot])\n",
        ),
    ],
    ids=["k", "v"],
)
def test_a_tile_handed_back_too_early_is_a_race(product, release, monkeypatch):
    """Before it is multiplied: the detector is told what WGMMA reads."""
    monkeypatch.setattr(attention_gpu, "forward", sabotaged(outputs, (product + release, release + product)).forward)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RACE DETECTED"):
        test_interpreted(300, 1, 64, 64, "whole", False, monkeypatch)


def test_what_the_kernels_do_not_take(monkeypatch):
    """float32, odd heads, and a jax without Mosaic GPU go through XLA, with a sentence that says why."""
    S = 160
    for d, v, dtype, why in (
        (64, 64, jnp.float32, "not float32"),
        (48, 32, jnp.bfloat16, "whole multiples of 64"),
        (256, 128, jnp.bfloat16, "up to 192 and 128"),
    ):
        q, k, value, _ = inputs(1, S, 1, d, v, dtype)
        with pytest.warns(UserWarning, match=why):
            out, _ = attention.causal(q, k, value, jnp.ones((1, S), jnp.int32), jnp.arange(S), 0.3, "hopper")
        assert out.shape == (1, S, 1, v)
    monkeypatch.setattr(hopper, "cuda_versions", SimpleNamespace(cuda_runtime_get_version=lambda: 12090))
    for package, refused in (("12.9.41", True), ("12.9.86", False)):
        monkeypatch.setattr(hopper, "version", lambda _, package=package: package)
        assert ("miscompile" in attention_gpu.refusal(*[jnp.zeros((1, S, 1, 64), jnp.bfloat16)] * 2)) == refused
    monkeypatch.setattr(attention_gpu, "plgpu", None)
    assert "no Mosaic GPU" in attention_gpu.refusal(*[jnp.zeros((1, S, 1, 64), jnp.bfloat16)] * 2)
