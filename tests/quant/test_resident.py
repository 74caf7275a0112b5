"""Four bits in memory and on the wire, with the numbers of the dense weights."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs.schema import ConfigError
from quant import grid
from quant.coverage import group_axis
from quant.packed_gather import gather_on_grid
from quant.resident import bits_per_weight, int4_rows, resident, to_int4
from tests.quant.small_model import INT4, MODEL, PLAIN, random_weights, specs_of

SPECS = specs_of(MODEL)
PARAMS = {path: jnp.asarray(w) for path, w in random_weights(SPECS).items()}
GATE_UP, DOWN = "moe.mlp.experts_gate_up", "moe.mlp.experts_down"


def test_resident_weights_are_the_exported_ones():
    packed = resident(PARAMS, SPECS, INT4)
    for path, spec in SPECS.items():
        want = grid.on_grid(PARAMS[path], group_axis(spec), 32) if spec.on_grid else PARAMS[path]
        np.testing.assert_array_equal(packed[path].astype(jnp.float32), want)
    served = {**PARAMS, DOWN: grid.on_grid(PARAMS[DOWN], -2, 32)}
    np.testing.assert_array_equal(resident(served, SPECS, INT4)[DOWN].codes, packed[DOWN].codes)
    with pytest.raises(ConfigError, match="not trained"):
        resident(PARAMS, SPECS, PLAIN)


def test_compiled_buffers_hold_four_and_a_half_bits_per_weight():
    w = to_int4(jnp.zeros((8, 256, 512)), -2, 32)
    compiled = (
        jax.jit(lambda w, x, e: int4_rows(x, w, e)).lower(w, jnp.zeros((32, 256)), jnp.zeros(4, jnp.int32)).compile()
    )
    other = 32 * 256 * 4 + 4 * 4
    assert (compiled.memory_analysis().argument_size_in_bytes - other) * 8 / w.codes.size == bits_per_weight(32) == 4.5


def test_grouped_product_equals_the_dense_one_bit_for_bit():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(24, 64)), jnp.float32)
    block_expert = jnp.array([0, 0, 2])
    dense = grid.on_grid(PARAMS[GATE_UP][0], -3, 32).reshape(4, 64, -1)
    want = jax.jit(lambda x, w: jnp.einsum("nbd,ndf->nbf", x.reshape(3, 8, 64), w[block_expert]).reshape(24, -1))(
        x, dense
    )
    packed = to_int4(PARAMS[GATE_UP][0], -3, 32).reshape(4, 64, -1)
    np.testing.assert_array_equal(jax.jit(int4_rows)(x, packed, block_expert), want)
    with pytest.raises(ValueError, match="groups lie along axis 1"):
        packed.reshape(4, 32, -1)


def test_layers_can_be_scanned():
    w = to_int4(PARAMS[DOWN], -2, 32)
    _, layers = jax.jit(lambda w: jax.lax.scan(lambda c, layer: (c, layer.astype(jnp.float32)), 0, w))(w)
    np.testing.assert_array_equal(layers, grid.on_grid(PARAMS[DOWN], -2, 32))


def gathered_bytes(compiled) -> int:
    """Result bytes of every all-gather in a compiled program."""
    sizes = {"u8": 1, "s8": 1, "u16": 2, "bf16": 2, "f32": 4, "s4": 0.5}
    total = 0
    for line in compiled.as_text().splitlines():
        match = re.search(r"= (.*?) all-gather(?:-start)?\(", line)
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", match[1]) if match else []:
            total += int(np.prod([int(n) for n in shape.split(",") if n])) * sizes[dtype]
    return total


def over_fsdp(dim):
    return partial(jax.lax.all_gather, axis_name="fsdp", axis=dim, tiled=True)


@pytest.mark.parametrize("path, dim", [(GATE_UP, 0), (GATE_UP, 3), (DOWN, 0), (DOWN, 2)])
def test_packed_gather(path, dim):
    """Dim 0 splits experts, the last one outputs; both leave groups whole. Values exact, bytes at most 0.30 of bf16."""
    mesh = jax.make_mesh((4,), ("fsdp",), devices=jax.devices()[:4])
    spec = P(*[None] * dim, "fsdp")
    w, axis = jax.device_put(PARAMS[path][0], NamedSharding(mesh, spec)), group_axis(SPECS[path])

    def over(shard, function):
        return (
            jax.jit(jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=P(), check_vma=False))
            .lower(shard)
            .compile()
        )

    packed = over(w, lambda shard: gather_on_grid(shard, axis, 32, "float32", over_fsdp(dim)))
    np.testing.assert_array_equal(packed(w), grid.on_grid(PARAMS[path][0], axis, 32))
    assert gathered_bytes(packed) <= 0.30 * 2 * w.size
    assert gathered_bytes(packed) == w.size * bits_per_weight(32) / 8


def test_packed_gather_sums_gradients_over_the_shards():
    mesh = jax.make_mesh((4,), ("fsdp",), devices=jax.devices()[:4])
    parts = np.random.default_rng(0).integers(-4, 5, (4, *PARAMS[DOWN][0].shape)).astype(np.float32)
    w, mine = jax.device_put((PARAMS[DOWN][0], parts), NamedSharding(mesh, P("fsdp")))

    def gradient(shard, part):
        return jax.grad(lambda s: jnp.sum(gather_on_grid(s, -2, 32, "float32", over_fsdp(0)) * part[0]))(shard)

    summed = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"), check_vma=False))(
        w, mine
    )
    np.testing.assert_array_equal(summed, parts.sum(0))
