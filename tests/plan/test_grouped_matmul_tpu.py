"""The grouped matmul compiled for TPUs that are not here. Needs the extra plan-tpu; without it these are skipped."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from model.grouped_matmul import grouped_matmul
from train.plan.hlo import Program
from train.plan.topology import topology

pytestmark = [pytest.mark.slow, pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra plan-tpu")]

E, BLOCK = 4, 512
PRODUCTS = {"convolution", "dot"}


@pytest.mark.parametrize("name", ["v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
@pytest.mark.parametrize(
    "D, F, dtype",
    [
        (2048, 2816, "bfloat16"),
        (2048, 7168, "bfloat16"),
        (7168, 4096, "bfloat16"),
        (2880, 5760, "bfloat16"),
        (16384, 2112, "bfloat16"),
        (1408, 2048, "float32"),
        (6400, 4864, "float32"),
    ],
)
def test_all_three_products_are_kernels(name, D, F, dtype):
    """Forward, gradient of the rows and gradient of the weights at Moonlight's and K2's widths, at some that lanes do not
    divide and some whose tiles hardly fit: three kernels, no product
    of the compiler's own (lax.ragged_dot's gradient of the weights is one over all experts there, up to jax 0.10), and
    beside what is returned no array as large as the weights: nothing is gathered, copied or transposed."""
    device = topology(name).devices()[0]
    M = 6 * BLOCK
    shapes = ((M, D), dtype), ((E, D, F), dtype), ((6,), jnp.int32), ((M, F), dtype)
    x, w, blocks, y = (jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device)) for shape, dtype in shapes)

    def all_three(x, w, blocks, y):
        out, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, blocks, "tpu"), x, w)
        return out, *pull(y)

    compiled = jax.jit(all_three).lower(x, w, blocks, y).compile()
    instructions = [i for scope in Program(compiled.as_text()).computations.values() for i in scope.values()]
    kernels = [i for i in instructions if i.kind == "custom-call" and "tpu_custom_call" in i.rest]
    assert len(kernels) == 3 and not [i for i in instructions if i.kind in PRODUCTS]
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * E * D * F * 2
