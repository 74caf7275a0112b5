"""Kernels compiled, down to the GPU's own instructions, for a Hopper GPU that is not here. Needs the extra plan-gpu."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from model import experts
from model.kernels import gather_gpu, grouped_matmul_decode, grouped_matmul_gpu, grouped_matmul_row
from quant import grid_gpu
from quant.resident import Int4Weight
from train.plan.hlo import Program
from train.plan.roofline import KERNELS, STATED
from train.plan.topology import topology

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("jax_plugins"), reason="needs the extra plan-gpu"),
]
E = 4
BF16 = jnp.bfloat16


array = jax.ShapeDtypeStruct


def compiled(machine, function, *arrays, options=None):
    """The program of `function` on trees of abstract arrays, for the first GPU of a machine."""
    device = topology(machine).devices()[0]
    placed = jax.tree.map(lambda a: array(a.shape, a.dtype, sharding=SingleDeviceSharding(device)), arrays)
    with jax.default_device(device):  # Triton asks which device it is for, as in train/plan/aot.py
        return jax.jit(function).lower(*placed).compile(options)


def kernels(program):
    """FLOPs that each kernel in a program states."""
    found = [
        i
        for scope in Program(program.as_text()).computations.values()
        for i in scope.values()
        if i.kind == "custom-call" and any(f'custom_call_target="{target}"' in i.rest for target in KERNELS)
    ]
    return [int(STATED.search(i.op_name).group(1)) for i in found]


def weights(on_grid, *shape):
    return (
        Int4Weight(array(shape, jnp.int4), array((*shape[:-2], shape[-2] // 32, shape[-1]), BF16), -2, 32)
        if on_grid
        else array(shape, BF16)
    )


@pytest.mark.parametrize("block", grouped_matmul_gpu.BLOCKS)
@pytest.mark.parametrize("D, F", [(2048, 2816), (1408, 2048), (7168, 4096), (128, 192)])
def test_grouped_matmul(D, F, block):
    """Forward, gradient of the rows, gradient of the weights at Moonlight's, K2's and tiny widths: one kernel each, which
    states its FLOPs, and no temporary array worth the name: least of all one as large as gathered weights."""
    M = 6 * block
    x, y, w, blocks = array((M, D), BF16), array((M, F), BF16), array((E, D, F), BF16), array((6,), jnp.int32)
    for function, arrays in (
        (lambda x, w, b: grouped_matmul_gpu.rows(x, w, b, False), (x, w, blocks)),
        (lambda y, w, b: grouped_matmul_gpu.rows(y, w, b, True), (y, w, blocks)),
        (lambda x, y, b: grouped_matmul_gpu.weights(x, y, b, E, BF16), (x, y, blocks)),
        (lambda x, y, b: grouped_matmul_gpu.weights(x, y, b, E, jnp.float32), (x, y, blocks)),
    ):
        program = compiled("h200-1", function, *arrays)
        assert kernels(program) == [2 * M * D * F]
        assert program.memory_analysis().temp_size_in_bytes < 16384


@pytest.mark.parametrize("I, O", [(2048, 2816), (7168, 4096)])
@pytest.mark.parametrize("on_grid", [False, True])
def test_decoding(on_grid, I, O):
    """One kernel that reads the weights, or their codes and scales, as they lie: nothing is unpacked, copied or gathered, and
    only sums over parts of the contraction are temporary."""
    w = weights(on_grid, E, I, O)
    program = compiled("h200-1", grouped_matmul_decode.rows, array((8 * 16, I), BF16), w, array((8,), jnp.int32))
    assert kernels(program) == [2 * 8 * 16 * I * O]
    parts = -(-grouped_matmul_decode.PROGRAMS * grouped_matmul_decode.WIDTH // (8 * O)) if on_grid else 0
    assert program.memory_analysis().temp_size_in_bytes == 4 * parts * 8 * 16 * O


@pytest.mark.parametrize("I, O", [(2048, 2816), (7168, 4096)])
@pytest.mark.parametrize("on_grid", [False, True])
def test_experts_of_a_row(on_grid, I, O):
    """The same of single rows."""
    program = compiled("h200-1", grouped_matmul_row.rows, array((8, I), BF16), weights(on_grid, E, I, O), array((8,), jnp.int32))
    assert kernels(program) == [2 * 8 * I * O]
    parts = -(-grouped_matmul_row.PROGRAMS * grouped_matmul_row.WIDTH // (8 * O))
    assert program.memory_analysis().temp_size_in_bytes == 4 * parts * 8 * O


@pytest.mark.parametrize("dtype", [jnp.float32, BF16])
@pytest.mark.parametrize("shape, axis", [((64, 2048, 2, 1408), -3), ((4, 96, 64), -2)])
def test_on_the_grid(shape, axis, dtype):
    """One kernel, which states the bytes that it moves, and nothing beside it."""
    program = compiled("h200-1", lambda w: grid_gpu.on_grid(w, axis, 32), array(shape, dtype))
    assert kernels(program) == [0]
    assert program.memory_analysis().temp_size_in_bytes == 0


@pytest.mark.parametrize("D", [2048, 7168, 192])
def test_rows_to_slots(D):
    """One kernel, which states the bytes that it moves."""
    program = compiled("h200-1", gather_gpu.rows, array((4096, D), BF16), array((30720,), jnp.int32))
    assert kernels(program) == [0]
    assert program.memory_analysis().temp_size_in_bytes == 0


def launches(program):
    """Operations that a program has a kernel for."""
    whole = Program(program.as_text())
    return [
        i.name
        for i in whole.computations[whole.entry].values()
        if i.kind in ("fusion", "custom-call", "copy", "sort", "scatter", "while")
    ]


@pytest.mark.parametrize("tokens, most, matrices", [(1, 6, 1), (4, 5, 1), (16, 20, 3)])
@pytest.mark.parametrize("on_grid", [False, True])
def test_experts_of_a_decoding_step(on_grid, tokens, most, matrices):
    """The experts of a layer: a kernel for each of the two products, few others, which sort and count nothing if all rows are
    blocks of their own, and less temporary memory than a single expert's down projection takes, or all three of them."""
    D, F, K = 2048, 1408, 6
    program = compiled(
        "h200-1",
        lambda x, chosen, gates, w: experts.apply(x, chosen, gates, w, "hopper"),
        array((tokens, D), BF16),
        array((tokens, K), jnp.int32),
        array((tokens, K), jnp.float32),
        [weights(on_grid, 16, D, 2 * F), weights(on_grid, 16, F, D)],
    )
    assert len(kernels(program)) == 2
    assert len(launches(program)) <= most
    assert program.memory_analysis().temp_size_in_bytes < 2 * D * F * matrices
