"""The Hopper kernels in Pallas' interpreter, threads, barriers and copies included; it reports data races. It runs where
jax has one (0.12). What it cannot show: TMA as jax lowers it and products that go on for a while (tests/plan/test_ptx.py),
that ptxas accepts the code (tests/plan/test_kernels_compile.py), and the chip (tests/gpu)."""

import importlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import hopper
from model import dispatch, grouped_matmul
from model.in_stack import InStack
from model.kernels import gather_gpu, grouped_matmul_decode, grouped_matmul_gpu, grouped_matmul_row
from quant.resident import Int4Weight, to_int4
from tests.model.interpret_gpu import PRESENT, interpreted, sabotaged

needs_interpreter = pytest.mark.skipif(not PRESENT, reason="this jax has no GPU interpreter")
BLOCK_EXPERT, E = [0, 0, 2, 4], 4
"""Experts 1 and 3 have no rows, the last block is nobody's."""


def inputs(block, *shapes):
    """Random bfloat16 of these last axes, a row for every row of the blocks, or (E, ...) as they are."""
    owned = jnp.repeat(jnp.array(BLOCK_EXPERT), block)[:, None] < E
    keys = jax.random.split(jax.random.key(0), len(shapes))
    draws = [jax.random.normal(k, s if len(s) > 1 else (len(owned), *s), jnp.bfloat16) for k, s in zip(keys, shapes, strict=True)]
    return [draw if len(s) > 1 else jnp.where(owned, draw, 0) for draw, s in zip(draws, shapes, strict=True)]


@needs_interpreter
@pytest.mark.parametrize("block, transposed, I, O", [(64, False, 128, 192), (128, True, 192, 320)])
def test_rows(block, transposed, I, O, monkeypatch):
    """Two cores share the tiles; 192 and 320 columns hang over the last tile's edge; three steps on a ring of a few buffers."""
    x, w = inputs(block, (I,), (E, O, I) if transposed else (E, I, O))
    expert = jnp.array(BLOCK_EXPERT)
    with interpreted(monkeypatch, out_of_bounds_reads="uninitialized"):
        mine = grouped_matmul_gpu.rows(x, w, expert, transposed, cores=2)
    x64, w64 = np.asarray(x, np.float64).reshape(4, block, I), np.asarray(w, np.float64)
    w64 = np.concatenate([w64, np.zeros((1, *w.shape[1:]))])[BLOCK_EXPERT]
    want = np.einsum("bmi,boi->bmo" if transposed else "bmi,bio->bmo", x64, w64).reshape(-1, O)
    assert mine.dtype == x.dtype
    assert np.abs(np.asarray(mine, np.float64) - want).max() <= 4e-3 * np.abs(want).max()  # one rounding to bfloat16


@needs_interpreter
def test_a_buffer_handed_back_too_early_is_a_race(monkeypatch):
    """Before it is multiplied: the detector is told what WGMMA reads."""
    monkeypatch.setattr(
        grouped_matmul_gpu,
        "hopper",
        sabotaged(
            hopper,
            (
                "tiles.multiply(acc, warpgroup, *(buffer",
                "release(step)\n                    tiles.multiply(acc, warpgroup, *(buffer",
            ),
            ("                        release(step - 1)", "                        pass"),
            ("                    release(steps - 1)", "                    pass"),
        ),
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match="RACE DETECTED"):
        test_rows(128, True, 192, 320, monkeypatch)


@needs_interpreter
def test_weights(monkeypatch):
    """Sums over an expert's blocks; zeros, not what memory held, for experts without rows."""
    D, F, block = 192, 320, 64
    x, y = inputs(block, (D,), (F,))
    with interpreted(monkeypatch, out_of_bounds_reads="uninitialized"):
        mine = np.asarray(grouped_matmul_gpu.weights(x, y, jnp.array(BLOCK_EXPERT), E, jnp.float32, cores=2), np.float64)
    x64, y64 = (np.asarray(a, np.float64).reshape(4, block, -1) for a in (x, y))
    want = np.zeros((E + 1, D, F))
    np.add.at(want, BLOCK_EXPERT, np.einsum("bmd,bmf->bdf", x64, y64))
    assert np.abs(mine - want[:E]).max() <= 1e-6 * np.abs(want).max() and not mine[[1, 3]].any()


@pytest.mark.parametrize("D", [512, 192, 64])
def test_rows_to_slots(D):
    """Every row where it belongs, zeros in padding, in Triton's interpreter: the same as XLA's gather."""
    to = dispatch.plan(jax.random.randint(jax.random.key(0), (50, 3), 0, 9), 8, 16)
    x = jax.random.normal(jax.random.key(1), (50, D), jnp.bfloat16)
    assert gather_gpu.takes(x, 4096) and not gather_gpu.takes(x.astype(jnp.float32), 4096) and not gather_gpu.takes(x, 4095)
    np.testing.assert_array_equal(gather_gpu.rows(x, to.token_of, interpret=True), dispatch.to_slots(x, to))


@pytest.mark.parametrize("block", grouped_matmul_decode.BLOCKS)
def test_decoding(block):
    """A few rows per expert, in Triton's interpreter: near float64, with four-bit weights too, whose sum is of parts of the
    contraction. They are unpacked bit for bit: rows that are one at one place and zero elsewhere give them back."""
    I, O = 448, 256
    x, w = inputs(block, (I,), (E, I, O))
    packed, expert = to_int4(w, -2, 32), jnp.array(BLOCK_EXPERT)
    whole = packed.astype(jnp.bfloat16)
    assert grouped_matmul_decode.takes(x.dtype, block, whole) and grouped_matmul_decode.takes(x.dtype, block, packed)
    w64 = np.concatenate([np.asarray(whole, np.float64), np.zeros((1, I, O))])[BLOCK_EXPERT]
    want = np.einsum("bmi,bio->bmo", np.asarray(x, np.float64).reshape(4, block, I), w64).reshape(-1, O)
    for w in (whole, packed):
        mine = np.asarray(grouped_matmul_decode.rows(x, w, expert, interpret=True), np.float64)
        assert np.abs(mine - want).max() <= 4e-3 * np.abs(want).max()
    place = np.arange(len(x)) * 37 % I
    back = grouped_matmul_decode.rows(jax.nn.one_hot(place, I, dtype=jnp.bfloat16), packed, expert, interpret=True)
    np.testing.assert_array_equal(back, w64[np.arange(len(x)) // block, place])


@pytest.mark.parametrize(
    "block, I, O, dtype, axis, taken",
    [
        (16, 2048, 2816, jnp.bfloat16, None, True),
        (32, 1408, 2048, jnp.bfloat16, -2, True),
        (8, 128, 128, jnp.bfloat16, None, False),
        (16, 128, 192, jnp.bfloat16, None, False),
        (16, 128, 128, jnp.float32, None, False),
        (16, 128, 128, jnp.bfloat16, -1, False),
    ],
)
def test_what_the_decoding_kernel_takes(block, I, O, dtype, axis, taken):
    w = (
        jax.ShapeDtypeStruct((2, I, O), dtype)
        if axis is None
        else Int4Weight(jax.ShapeDtypeStruct((2, I, O), jnp.int4), None, axis, 32)
    )
    assert grouped_matmul_decode.takes(dtype, block, w) == taken


@pytest.mark.parametrize("kernel, block", [(grouped_matmul_decode, 16), (grouped_matmul_row, 1)])
def test_four_codes_are_an_element(kernel, block):
    """Triton counts elements in signed 32 bits up to 4 GiB: of all of DeepSeek-V3's gates and ups in a layer, 3.8 GB, there
    would be too many if an element were a byte."""
    w = Int4Weight(
        jax.ShapeDtypeStruct((256, 7168, 4096), jnp.int4), jax.ShapeDtypeStruct((256, 224, 4096), jnp.bfloat16), -2, 32
    )
    x, experts = jax.ShapeDtypeStruct((4 * block, 7168), jnp.bfloat16), jax.ShapeDtypeStruct((4,), jnp.int32)
    (call,) = (e for e in jax.make_jaxpr(kernel.rows)(x, w, experts).eqns if e.primitive.name == "pallas_call")
    assert max(v.aval.size for v in call.invars) < 2**31 < w.codes.size // 2


@pytest.mark.parametrize("kernel, block", [(grouped_matmul_decode, 16), (grouped_matmul_row, 1)])
@pytest.mark.parametrize("on_grid", [False, True])
def test_a_layer_in_its_stack(kernel, block, on_grid):
    """The same as the layer by itself, in Triton's interpreter, and nobody's rows nobody's."""
    I, O, expert = 128, 256, jnp.array(BLOCK_EXPERT)
    (x,) = inputs(block, (I,))
    stack = to_int4(jax.random.normal(jax.random.key(1), (3, E, I, O)), -2, 32)
    stack = stack if on_grid else stack.astype(jnp.bfloat16)
    for layer in range(3):
        mine = InStack(stack, jnp.int32(layer))
        assert mine.shape == (E, I, O) and len(mine) == E
        np.testing.assert_array_equal(
            kernel.rows(x, *mine.among_all(expert), interpret=True), kernel.rows(x, mine.cut(), expert, interpret=True)
        )


@pytest.mark.parametrize("group", [8, 16, 32, 64, None])
def test_experts_of_a_row(group):
    """Every row by its expert's weights in Triton's interpreter, whatever their order, whole or of four bits; zeros for a row of
    nobody; rows that are one at one place and zero elsewhere give the weights back, bit for bit."""
    I, O, expert = 192, 256, jnp.array([3, 0, 4, 0, 1])
    x, w = inputs(1, (I,), (E, I, O))
    x = jnp.concatenate([x, x[:1]])
    packed = to_int4(w, -2, group or 32)
    w = packed if group else packed.astype(jnp.bfloat16)
    assert grouped_matmul_row.takes(x.dtype, w) and not grouped_matmul_row.takes(jnp.float32, w)
    w64 = np.concatenate([np.asarray(packed.astype(jnp.bfloat16), np.float64), np.zeros((1, I, O))])[np.asarray(expert)]
    mine = np.asarray(grouped_matmul_row.rows(x, w, expert, interpret=True), np.float64)
    want = np.einsum("pi,pio->po", np.asarray(x, np.float64), w64)
    assert np.abs(mine - want).max() <= 4e-3 * np.abs(want).max() and not mine[2].any()
    place = np.arange(len(x)) * 37 % I
    back = grouped_matmul_row.rows(jax.nn.one_hot(place, I, dtype=jnp.bfloat16), w, expert, interpret=True)
    np.testing.assert_array_equal(back, w64[np.arange(len(x)), place])
    # Sums of weights that are not rounded would differ from these by half a step of the result; another order does hardly ever.
    whole = np.asarray(grouped_matmul_row.rows(x, packed.astype(jnp.bfloat16), expert, interpret=True), np.float64)
    assert (mine != whole).mean() <= 0.02


@pytest.mark.parametrize("platform, cores", [("gpu", 114), ("cpu", hopper.CORES)])
def test_as_many_blocks_as_the_gpu_has_cores(platform, cores, monkeypatch):
    monkeypatch.setattr(hopper, "get_default_device", lambda: types.SimpleNamespace(platform=platform, core_count=114))
    assert hopper.cores_here() == cores


@pytest.mark.parametrize(
    "width, tile", [(2048, 256), (2816, 256), (4096, 256), (7168, 256), (1408, 256), (176, 192), (128, 128), (64, 64), (320, 192)]
)
def test_tiles_hang_over_little(width, tile):
    assert grouped_matmul_gpu.tile_width(width) == tile


@pytest.mark.parametrize(
    "dtype, block, widths, taken",
    [
        (jnp.bfloat16, 64, (128, 1408), True),
        (jnp.float16, 128, (7168, 4096), True),
        (jnp.bfloat16, 8, (128, 128), False),
        (jnp.float32, 64, (128, 128), False),
        (jnp.bfloat16, 64, (128, 72), False),
        (jnp.bfloat16, 128, (64, 64), True),
        (jnp.bfloat16, 64, (64, 1408), False),
        (jnp.bfloat16, 64, (1408, 64), False),
    ],
)
def test_what_the_kernels_take(dtype, block, widths, taken):
    """The rest is batched: test_three_products walks the registry with blocks of 8."""
    assert grouped_matmul_gpu.takes(dtype, block, *widths) == taken


def test_a_jax_without_mosaic_gpu_takes_the_plain_path(monkeypatch):
    assert grouped_matmul.implementation("hopper") == "hopper"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "jax.experimental.pallas.mosaic_gpu", None)
        patch.delattr("jax.experimental.pallas.mosaic_gpu")
        importlib.reload(hopper)
        importlib.reload(grouped_matmul_gpu)
        assert hopper.plgpu is None and grouped_matmul.implementation("hopper") == "batched"
    importlib.reload(hopper)
    importlib.reload(grouped_matmul_gpu)
    assert grouped_matmul.implementation("hopper") == "hopper"
