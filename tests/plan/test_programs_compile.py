"""What verbs run besides the train step, compiled for chips that are not here. Needs the extras plan-tpu and plan-gpu."""

import dataclasses
import importlib.util
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from configs.presets import preset
from configs.schema import MeshConfig
from model import token_loss
from model.decode import generate
from model.decode.sampling import Budget, Sampling
from model.transformer import param_specs
from optim.apply import apply_updates
from optim.build import build_optimizer
from optim.metrics import update_metrics
from quant.coverage import group_axis
from quant.resident import Int4Weight
from quant.served import Serving
from train import compat, held_out, probe
from train.mesh import batch_sharding, make_mesh, param_shardings, platform
from train.plan.aot import compile_step
from train.plan.census import census
from train.plan.hlo import Program
from train.plan.topology import topology
from train.step import BATCH

pytestmark = pytest.mark.slow
MODEL = dataclasses.replace(preset("moonlight_16b").model, num_hidden_layers=3)
SPECS = param_specs(MODEL)
TPU = pytest.param("v6e-1", marks=pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs plan-tpu"))
GPU = pytest.param("h200-1", marks=pytest.mark.skipif(not importlib.util.find_spec("jax_plugins"), reason="needs plan-gpu"))

array = jax.ShapeDtypeStruct


def integers(*shape):
    return array(shape, jnp.int32)


def weights(dtype, packed: bool) -> dict:
    """As served: experts of an INT4 directory stay packed."""
    out = {}
    for path, spec in SPECS.items():
        if packed and spec.on_grid:
            axis = group_axis(spec)
            scales = list(spec.shape)
            scales[axis] //= 32
            out[path] = Int4Weight(array(spec.shape, jnp.int4), array(tuple(scales), jnp.bfloat16), axis, 32)
        else:
            out[path] = array(spec.shape, jnp.float32 if spec.update == "router_bias" else dtype)
    return out


def compiled(machine: str, function, *arrays, **settings):
    """The program of a jitted function on trees of abstract arrays, for the first device of a machine."""
    device = topology(machine).devices()[0]
    place = lambda a: a.update(sharding=SingleDeviceSharding(device)) if isinstance(a, array) else a  # noqa: E731
    with jax.default_device(device):  # Triton asks which device it is for
        return compat.compile_with(function.lower(*jax.tree.map(place, arrays), **settings), {})


def kind(machine: str) -> str:
    return platform(make_mesh(MeshConfig(data=1), topology(machine).devices()[:1]))


def loop(machine, params, rows):
    """The program of replies to some rows, and the cache that it is given."""
    program = generate.Program(MODEL, "bfloat16", kind(machine), True)
    cache = array((3, rows, 1024, MODEL.kv_lora_rank + MODEL.qk_rope_head_dim), jnp.bfloat16)
    logits = array((rows, MODEL.vocab_size), jnp.float32)
    given = params, logits, cache, integers(rows), integers(rows), integers(1), Sampling(), Budget()
    return compiled(machine, generate._loop, *given, room=16, program=program), cache


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("machine", [TPU, GPU])
def test_generating(machine, packed):
    """A prompt, and the loop of replies, whose cache is written where it lies."""
    program, params = generate.Program(MODEL, "bfloat16", kind(machine), True), weights(jnp.bfloat16, packed)
    assert compiled(machine, generate._prefill, params, integers(4, 512), integers(4), cache_len=1024, program=program)
    found, cache = loop(machine, params, 4)
    assert found.memory_analysis().alias_size_in_bytes >= cache.size * 2


def written(program):
    """Shape and name of every array that a program writes to memory."""
    kinds = "fusion", "fusion-done", "custom-call", "dot", "copy", "dynamic-slice"
    apart = [c for name, c in program.computations.items() if "fused" not in name and "triton" not in name]
    return [(shape, i.name) for c in apart for i in c.values() if i.kind in kinds for shape in i.shapes]


CODES = MODEL.n_routed_experts * MODEL.hidden_size * MODEL.moe_intermediate_size // 2
QUERY = 2 * MODEL.hidden_size * MODEL.num_attention_heads * MODEL.qk_head_dim


@pytest.mark.parametrize("rows, least", [(1, QUERY), (4, QUERY), (16, CODES)])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("machine", [GPU])
def test_what_a_token_writes(machine, packed, rows, least):
    """Of a layer's experts, which kernels pick from those of all layers, there is no copy, not even of their codes, and for a few
    tokens none of the large matrices. The products of a single row stay products: XLA would multiply elementwise and write as
    much as there are weights."""
    found, cache = loop(machine, weights(jnp.bfloat16, packed), rows)
    arrays = [(s.bytes, name) for s, name in written(Program(found.as_text())) if s.dims[-2:] != cache.shape[-2:]]
    assert len(arrays) > 50 and max(arrays)[0] < least, max(arrays)


@pytest.mark.parametrize("machine", [GPU])
def test_masters_of_experts_stay_in_their_stack(machine):
    """The grid's kernel reads a layer's among those of all layers, in both passes of a training step."""
    cfg = preset("moonlight_16b_h200_1")
    train = dataclasses.replace(cfg.train, batch_size=4, accumulate=1)
    program = compile_step(dataclasses.replace(cfg, model=MODEL, train=train), topology(machine)).program
    parts = [(1, *spec.shape[1:]) for spec in SPECS.values() if spec.on_grid]
    arrays = [(shape.dims, name) for shape, name in written(program)]
    assert len(arrays) > 300 and not [named for named in arrays if named[0] in parts]


@pytest.mark.parametrize("machine", [GPU])
@pytest.mark.parametrize("name, kept, rows", [("one_gpu", "hidden", 4), ("moonlight_16b_h200_1", "names", 5)])
def test_no_product_twice_and_no_sum_copied(machine, name, kept, rows):
    """Forward two products of experts, backward the gradients of both, and with remat names the first of the two once more; what
    is kept of it is not computed twice. Gradients of a layer's experts are added to their sums, in float32 or in bfloat16, where
    these lie among those of all layers, and there is one array of those."""
    cfg = preset(name)
    assert cfg.train.remat == kept
    model = dataclasses.replace(cfg.model, num_hidden_layers=3)
    train = dataclasses.replace(cfg.train, batch_size=4, accumulate=2)
    found = compile_step(dataclasses.replace(cfg, model=model, train=train), topology(machine))
    program, experts = found.program, [spec for spec in param_specs(model).values() if spec.on_grid]
    names = [i.op_name for scope in program.computations.values() for i in scope.values() if i.kind == "custom-call"]
    assert [sum(f"/{kernel}/" in name for name in names) for kernel in ("experts_rows", "experts_weights")] == [rows, 2]
    layer = {(1, *spec.shape[1:]) for spec in experts}
    arrays = [(shape.dims, name) for shape, name in written(program)]
    assert len(arrays) > 300 and not [named for named in arrays if named[0] in layer]
    largest = [array.shape.partition("[")[2] for array in found.memory.largest]
    assert [largest.count(f"{','.join(map(str, spec.shape))}]") for spec in experts] == [1, 1]


@pytest.mark.parametrize("machine", [TPU, GPU])
def test_the_probe_of_an_export(machine):
    layer = {
        path: jax.tree.map(lambda a: array((1, *a.shape[1:]), a.dtype), w)
        for path, w in weights(jnp.float32, True).items()
        if path.startswith("moe.")
    }
    assert compiled(
        machine,
        probe._run,
        layer,
        array((2, 32, MODEL.hidden_size), jnp.float32),
        model=MODEL,
        platform=kind(machine),
        part="moe",
    )


@pytest.mark.parametrize("machine", [GPU])
def test_the_loss_of_a_step(machine):
    """Three products with the head, its gradient summed where it lies: besides results, one array of logits in float32, one of
    their gradients in bfloat16, the head in bfloat16, and hidden and its gradient filled up to whole tiles."""
    N, (D, V) = 32768, SPECS["head"].shape  # in ten tiles of 3328, 26 of 128
    run = jax.jit(jax.value_and_grad(lambda *x: token_loss.with_gradients(*x)[0], (0, 1)))
    scalar = array((), jnp.float32)
    given = array((N, D), jnp.bfloat16), array((D, V), jnp.float32), integers(N), array((N,), jnp.float32)
    program = compiled(machine, run, *given, scalar, scalar)
    tokens, workspace = 10 * 3328, 2**26  # of cuBLAS, and what is there per token
    assert census(program.as_text()).flops == 3 * 2 * tokens * D * V < 1.02 * 3 * 2 * N * D * V
    assert program.memory_analysis().temp_size_in_bytes < 6 * 3328 * V + 2 * D * V + 2 * 2 * tokens * D + workspace


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="needs plan-tpu")
def test_the_held_out_loss_of_several_devices():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2), topology("v6e-4").devices())
    params = {path: array(SPECS[path].shape, jnp.float32, sharding=place) for path, place in param_shardings(SPECS, mesh).items()}
    rows = {name: array((8, 1024), dtype, sharding=batch_sharding(mesh)) for name, dtype in BATCH.items()}
    setting = held_out.Setting(MODEL, Serving.of(MODEL, preset("moonlight_16b").quant), "bfloat16", "tpu", 2, mesh=mesh)
    program = held_out.sums.lower(params, rows, array((), jnp.float32), setting).compile()
    memory = program.memory_analysis()  # the compiler copies the experts into another layout; a layer of them is gathered
    assert memory.temp_size_in_bytes < 1.5 * memory.argument_size_in_bytes


@pytest.mark.skipif(not importlib.util.find_spec("jax_plugins"), reason="needs plan-gpu")
def test_updates_are_not_kept_in_float32():
    """With bfloat16 weights the largest array is there twice more at most, in bfloat16: what Newton-Schulz makes of the
    momentum, and that in the layout of the weights. In float32 it would be the peak of all of Moonlight on one H200."""
    cfg = preset("moonlight_16b_h200_1")
    mesh = make_mesh(MeshConfig(data=1), topology("h200-1").devices()[:1])
    optimizer = build_optimizer(SPECS, cfg.optim, cfg.train.steps, mesh=mesh, shardings=param_shardings(SPECS, mesh))

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(params, state, grads, max_logits, counts, key):
        updates, state = optimizer.update(grads, state, params, max_logits=max_logits, expert_counts=counts)
        metrics = update_metrics(SPECS, cfg.optim, updates, state)
        return apply_updates(params, updates, jax.random.wrap_key_data(key)), state, metrics

    params = weights(jnp.bfloat16, False)
    measured = array((3, MODEL.num_attention_heads), jnp.float32), array((2, MODEL.n_routed_experts), jnp.float32)
    state = jax.eval_shape(optimizer.init, params)
    program = compiled("h200-1", update, params, state, params, *measured, array((2,), jnp.uint32))
    largest = max(spec.size for spec in SPECS.values() if spec.on_grid)
    assert 2 * largest < program.memory_analysis().temp_size_in_bytes < 5 * largest
