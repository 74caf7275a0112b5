"""Kernels compiled, down to the GPU's own instructions, for a Hopper GPU that is not here. Needs the extra plan-gpu."""

import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from model.kernels import grouped_matmul_gpu
from optim.hlo import Program
from train.roofline import STATED
from train.topology import topology

pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(not importlib.util.find_spec("jax_plugins"), reason="needs the extra plan-gpu")]
E = 4
BF16 = jnp.bfloat16


def compiled(machine, function, *shapes):
    """The program of `function` on (shape, dtype) arrays, for the first GPU of a machine."""
    device = topology(machine).devices()[0]
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device)) for shape, dtype in shapes]
    return jax.jit(function).lower(*arrays).compile()


def kernels(program):
    """The custom calls of Mosaic, and the FLOPs that each states."""
    found = [i for scope in Program(program.as_text()).computations.values() for i in scope.values()
             if i.kind == "custom-call" and re.search(r'custom_call_target="mosaic_gpu', i.rest)]
    return [int(STATED.search(i.op_name).group(1)) for i in found]


@pytest.mark.parametrize("block", grouped_matmul_gpu.BLOCKS)
@pytest.mark.parametrize("D, F", [(2048, 2816), (1408, 2048), (7168, 4096), (128, 64)])
def test_grouped_matmul(D, F, block):
    """Forward, gradient of the rows, gradient of the weights at Moonlight's, K2's and tiny widths: one kernel each, which
    states its FLOPs, and no temporary array worth the name: least of all one as large as gathered weights."""
    M = 6 * block
    x, y, blocks = ((M, D), BF16), ((M, F), BF16), ((6,), jnp.int32)
    for function, shapes in (
            (lambda x, w, b: grouped_matmul_gpu.rows(x, w, b, False), (x, ((E, D, F), BF16), blocks)),
            (lambda y, w, b: grouped_matmul_gpu.rows(y, w, b, True), (y, ((E, D, F), BF16), blocks)),
            (lambda x, y, b: grouped_matmul_gpu.weights(x, y, b, E, BF16), (x, y, blocks)),
            (lambda x, y, b: grouped_matmul_gpu.weights(x, y, b, E, jnp.float32), (x, y, blocks))):
        program = compiled("h200-1", function, *shapes)
        assert kernels(program) == [2 * M * D * F]
        assert program.memory_analysis().temp_size_in_bytes < 16384
