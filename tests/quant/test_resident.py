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
from model.decode.generate import Program, extend
from model.grouped_matmul import grouped_matmul
from model.transformer import param_specs
from quant import grid
from quant.coverage import group_axis
from quant.export import export_model
from quant.packed_gather import gather_on_grid
from quant.resident import Int4Weight, bits_per_weight, to_int4
from quant.source import InMemory
from tests.model.networks import forward_logits
from tests.quant.small_model import INT4, MODEL, PLAIN, random_weights
from train.weights import load_weights

SPECS = param_specs(MODEL)
PARAMS = {path: jnp.asarray(w) for path, w in random_weights(SPECS).items()}
GATE_UP, DOWN = "moe.mlp.experts_gate_up", "moe.mlp.experts_down"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    out = tmp_path_factory.mktemp("int4") / "export"
    export_model(InMemory(jax.device_get(PARAMS)), SPECS, MODEL, INT4, out)
    return out


@pytest.fixture(scope="module")
def both(directory):
    return load_weights(f"{directory}:bf16", "float32"), load_weights(f"{directory}:int4", "float32")


def test_experts_stay_as_the_file_has_them(both):
    dense, packed = both
    for path, spec in SPECS.items():
        assert isinstance(packed.params[path], Int4Weight) == spec.on_grid
        np.testing.assert_array_equal(packed.params[path].astype(jnp.float32), dense.params[path])
    np.testing.assert_array_equal(packed.params[DOWN].codes, to_int4(PARAMS[DOWN], -2, 32).codes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_equal_those_of_the_unpacked_weights(both, dtype):
    """The products get the same operands: bit for bit in float32 and in bfloat16, where unpacking rounds nothing."""
    rows = np.random.default_rng(0).integers(0, MODEL.vocab_size, (3, 11))
    dense, packed = (forward_logits(MODEL, weights.params, rows, "cpu", dtype) for weights in both)
    np.testing.assert_array_equal(dense, packed)


def test_decoding_and_reading_prompts_give_the_same_tokens(both):
    prompts = {0: [1, 2, 3], 1: [4, 5, 6, 7, 8], 2: [9]}
    dense, packed = (weights.decoder(3).reply(prompts, 12) for weights in both)
    assert dense == packed and all(packed.values())


def test_compiled_buffers_hold_four_and_a_half_bits_per_weight(both):
    """Of the program that decodes: its argument buffers with the experts, less those without them."""
    _, weights = both
    program = Program(MODEL, "float32", "cpu", greedy=True)
    cache = jax.ShapeDtypeStruct((3, 1, 16, 40), jnp.float32)
    one = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    step = jax.jit(extend, static_argnames="program")
    used = step.lower(weights.params, one, cache, one, program).compile().memory_analysis().argument_size_in_bytes
    other = sum(w.nbytes for path, w in weights.params.items() if not SPECS[path].on_grid) + 4 * (3 * 16 * 40) + 8
    assert (used - other) * 8 / sum(s.size for s in SPECS.values() if s.on_grid) == bits_per_weight(32) == 4.5


@pytest.mark.parametrize("name", ["reference", "batched", "scanned"])
def test_every_grouped_product_takes_them(name):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(24, 64)), jnp.float32)
    block_expert = jnp.array([0, 0, 2])
    packed = to_int4(PARAMS[GATE_UP][0], -3, 32).reshape(4, 64, -1)
    product = jax.jit(grouped_matmul, static_argnums=3)
    np.testing.assert_array_equal(
        product(x, packed, block_expert, name), product(x, packed.astype(jnp.float32), block_expert, name)
    )
    with pytest.raises(ValueError, match="groups lie along axis 1"):
        packed.reshape(4, 32, -1)


def test_what_cannot_be_held_at_four_bits_says_so(tmp_path):
    export_model(InMemory(jax.device_get(PARAMS)), SPECS, MODEL, PLAIN, tmp_path / "plain")
    with pytest.raises(ConfigError, match="not INT4"):
        load_weights(f"{tmp_path / 'plain'}:int4", "float32")
    with pytest.raises(ConfigError, match="no masters"):
        load_weights(f"{tmp_path / 'plain'}:gptq", "float32")


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
        return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=P(), check_vma=False)).lower(shard).compile()

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

    summed = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"), check_vma=False))(w, mine)
    np.testing.assert_array_equal(summed, parts.sum(0))
