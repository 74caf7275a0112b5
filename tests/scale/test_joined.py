"""Gate and up as one axis, whichever axis of them is stored in parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs.param_spec import HFTensor, Matrix, ParamSpec
from configs.sharding import AXES
from model.call import Call
from model.shards import Shards
from quant.served import Serving


@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize("shape, split", [((4, 32, 2, 32), 0), ((3, 64, 2, 32), 1), ((3, 32, 2, 32), 3)])
def test_joined_is_the_same_array(shape, split, settled):
    """Values and gradients, where experts, inputs or hidden units are what is gathered; of the last, gate and up apart."""
    axes, matrix = ("experts", "embed", "gate_up", "expert_hidden"), Matrix(("embed",), ("expert_hidden",))
    spec = ParamSpec(shape, axes, 0.02, "muon", (HFTensor("w"),), matrix, on_grid=True)
    mesh = jax.make_mesh((2,), ("fsdp",), devices=jax.devices()[:2])
    shards = Shards(tuple((axis, 2 if axis == "fsdp" else 1) for axis in AXES))
    stored = P(*[names or None for names in shards.stored(spec)])
    assert shards.stored(spec)[split] == ("fsdp",)
    rng = np.random.default_rng(0)
    w, g = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(2))

    def served(part, joined):
        ids = jnp.zeros((1, 1), jnp.int32)
        call = Call(ids, ids, jnp.float32(1), Serving("bfloat16", "int4", 32), "bfloat16", shards=shards, settled=settled)
        return call.weight(nnx.Param(part, spec=spec), joined)

    def both(part, joined):
        whole, back = jax.vjp(lambda part: served(part, joined), part)
        return whole, back(g.reshape(whole.shape).astype(whole.dtype))[0]

    def run(joined):
        over = jax.shard_map(
            lambda part: both(part, joined), mesh=mesh, in_specs=stored, out_specs=(P(), stored), check_vma=False
        )
        return jax.jit(over)(jax.device_put(w, NamedSharding(mesh, stored)))

    (whole, gradient), (joined, joined_gradient) = run(False), run(True)
    assert joined.shape == (*shape[:2], 64)
    np.testing.assert_array_equal(joined, whole.reshape(joined.shape))
    np.testing.assert_array_equal(joined_gradient, gradient)
