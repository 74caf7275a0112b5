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


NAMES = pytest.mark.parametrize("name", ["v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])


def three_kernels(name: str, D: int, F: int, dtype: str = "bfloat16") -> jax.stages.Compiled:
    """Forward, gradient of the rows and gradient of the weights are compiled, as three kernels, and no product is the compiler's
    own (lax.ragged_dot's gradient of the weights is one over all experts there, up to jax 0.10)."""
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
    return compiled


@NAMES
@pytest.mark.parametrize("D, F", [(2048, 2816), (2048, 7168), (7168, 4096)])
def test_all_three_products_are_kernels(name, D, F):
    """At Moonlight's and K2's widths; beside what is returned no array is as large as the weights: nothing is gathered,
    copied or transposed."""
    assert three_kernels(name, D, F).memory_analysis().temp_size_in_bytes < 0.1 * E * D * F * 2


@NAMES
@pytest.mark.parametrize(
    "D, F, dtype",
    [
        (2880, 5760, "bfloat16"),
        (16384, 2112, "bfloat16"),
        (2176, 1408, "bfloat16"),
        (1408, 2048, "float32"),
        (6400, 4864, "float32"),
    ],
)
def test_there_is_room_for_tiles(name, D, F, dtype):
    """Of widths that lanes do not divide, or only in tiles of 128, of long contractions, and of three parts of float32."""
    three_kernels(name, D, F, dtype)
