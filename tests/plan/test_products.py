"""Expert products and transports as chips run them, read from programs compiled for chips that are not here. Needs the
extras plan-tpu and plan-gpu; without them these are skipped."""

import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs.schema import ConfigError, MeshConfig
from model import transport
from model.grouped_matmul import grouped_matmul, implementation
from model.shards import shards_of
from tests.plan.test_plans import small
from tests.scale.networks import with_
from train.compat import compile_for_devices
from train.mesh import check_mesh, make_mesh, platform
from train.plan.hlo import Program
from train.plan.interconnect import Interconnect
from train.plan.roofline import Roofline
from train.plan.topology import topology

needs_tpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra plan-tpu")
needs_gpu = pytest.mark.skipif(
    not any(importlib.util.find_spec(f"jax_plugins.xla_cuda{n}") for n in (12, 13) if importlib.util.find_spec("jax_plugins")),
    reason="needs the extra plan-gpu",
)
TPUS = [pytest.param(name, marks=needs_tpu) for name in ("v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")]
GPUS = [pytest.param(name, marks=needs_gpu) for name in ("h100:1x4", "b200:1x4")]


def compiled_for(machine: str, mesh_axes: dict[str, int], function, in_specs, shapes, folder):
    """The program of `function`, one device's part of it, and the wires of its machine."""
    found = topology(machine)
    devices = found.devices()
    mesh = make_mesh(MeshConfig(**{"data": 0} | mesh_axes), devices)
    function = partial(function, shards=shards_of(mesh), platform=platform(mesh))
    args = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for (shape, dtype), spec in zip(shapes, in_specs, strict=True)
    ]
    run = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=P(), check_vma=False))
    with jax.default_device(devices[0]):
        text = compile_for_devices(run.lower(*args), folder, devices).as_text()
    return Program(text), Interconnect(found, mesh)


M, D, F, BLOCK = 4096, 512, 256, 128


def three_products(x, w, block_expert, g, *, shards, platform):
    out, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, block_expert, implementation(platform)), x, w)
    return out, *pull(g)


@pytest.mark.slow
@pytest.mark.parametrize("machine", TPUS + GPUS)
def test_no_product_runs_over_all_experts(machine, tmp_path):
    """Forward, gradient of the rows, gradient of the weights: every row is multiplied once whatever the number of experts,
    and nothing as large as all rows of all experts is held."""
    for E in (8, 64):
        shapes = [((M, D), jnp.bfloat16), ((E, D, F), jnp.bfloat16), ((M // BLOCK,), jnp.int32), ((M, F), jnp.bfloat16)]
        program, wires = compiled_for(machine, {}, three_products, (P(),) * 4, shapes, tmp_path / str(E))
        work = Roofline(program, wires).step()
        assert not work.silent
        assert work.flops == pytest.approx(3 * 2 * M * D * F, rel=0.01)
        largest = max(shape.bytes for scope in program.computations.values() for i in scope.values() for shape in i.shapes)
        # The most that any form needs: an outer product of each block, or of each expert, in float32.
        assert largest <= max(M // BLOCK, E) * D * F * 4
    assert E * D * F * 4 < E * M * F * 2 / 2, "a dense expansion would be larger than what is allowed here"


def exchanged(x, chosen, gates, gate_up, down, *, shards, platform):
    def total(variables):
        x, gates, *weights = variables
        return jnp.sum(
            transport.routed(x, chosen, gates, tuple(weights), shards, platform, "ragged_all_to_all").astype(jnp.float32)
        )

    gradients = jax.grad(total)((x, gates, gate_up, down))
    return jax.lax.psum(sum(jnp.sum(g.astype(jnp.float32)) for g in gradients), "expert")


@pytest.mark.slow
@pytest.mark.parametrize("machine", TPUS[:1] + GPUS[:1])
def test_ragged_exchange_compiles(machine, tmp_path):
    """XLA has no CPU implementation, so only the program can be looked at: rows and results travel by the operation itself,
    there and back, forward and in the gradient."""
    N, K, E = 4 * 512, 4, 16
    rows = P("expert")
    shapes = [
        ((N, D), jnp.bfloat16),
        ((N, K), jnp.int32),
        ((N, K), jnp.float32),
        ((E, D, 2 * F), jnp.bfloat16),
        ((E, F, D), jnp.bfloat16),
    ]
    program, _ = compiled_for(machine, {"data": 1, "expert": 4}, exchanged, (rows,) * 5, shapes, tmp_path)
    ops = [i for scope in program.computations.values() for i in scope.values() if i.kind.startswith("ragged-all-to-all")]
    assert len(ops) >= 4


def test_ragged_exchange_on_a_cpu_is_one_sentence():
    cfg = with_(small(expert=2), "train", transport="ragged_all_to_all")
    with pytest.raises(ConfigError, match="ragged_all_to_all does not exist on cpu"):
        check_mesh(cfg, make_mesh(cfg.mesh, jax.devices()[:2]))
