"""What the gradients of a step move, from the compiled program: on which mesh axes, and how many bytes, against the
formula of docs/scale.md."""

from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.sharding import TOKEN_AXES
from model.shards import shards_of
from model.transformer import param_specs
from model.transport import rounds
from optim.build import build_optimizer
from quant.resident import bits_per_weight
from tests.scale.networks import FAST_COMPILE, RUN, batch, mesh_of, on_mesh, with_
from train.mesh import batch_sharding, param_shardings
from train.plan.census import census
from train.state import initial_state
from train.step import StepConfig, gradients, make_train_step

FLOAT = 4


def compiled_hlo(cfg) -> str:
    mesh, specs = mesh_of(cfg), param_specs(cfg.model)
    places, step = param_shardings(specs, mesh), StepConfig(cfg, "float32", "cpu", mesh_of(cfg))
    params = {path: jax.ShapeDtypeStruct(spec.shape, jnp.float32, sharding=places[path]) for path, spec in specs.items()}
    rows = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh)) for name, x in batch(cfg).items()}
    run = jax.jit(lambda p, b: gradients(p, b, jnp.float32(1), step))
    return run.lower(params, rows).compile(compiler_options=FAST_COMPILE).as_text()


def received(hlo: str, mesh) -> dict[tuple[str, ...], float]:
    """Bytes that one device receives, by the mesh axes along which its group extends."""
    out = defaultdict(float)
    places = np.arange(mesh.size).reshape(tuple(mesh.shape.values()))
    for c in census(hlo, mesh.size, causal=True).collectives:
        at = [np.argwhere(places == m)[0] for m in c.members]
        out[tuple(axis for i, axis in enumerate(mesh.shape) if len({int(x[i]) for x in at}) > 1)] += c.received * c.times
    return dict(out)


def formula(cfg) -> dict[tuple[str, ...], float]:
    """docs/scale.md, in the order of its table. No recomputation, one microbatch, all in float32."""
    model, shards, specs = cfg.model, shards_of(mesh_of(cfg)), param_specs(cfg.model)
    out = defaultdict(float)
    L, D, K = model.num_hidden_layers, model.hidden_size, model.num_experts_per_tok
    N = cfg.train.batch_size * cfg.train.seq_len // shards.size(*TOKEN_AXES)

    def add(axes, per_device_bytes):
        over = shards.split(axes)
        if over:
            out[over] += per_device_bytes * (shards.size(*over) - 1) / shards.size(*over)

    for path, spec in specs.items():
        stored, kept = shards.stored(spec), shards.kept(spec)
        here = spec.size // shards.size(*(a for dim in stored for a in dim))
        over = {a for s, k in zip(stored, kept) for a in s if a not in k}
        if over and path != "embed":
            order = tuple(a for a in dict(shards.sizes) if a in over)
            add(order, 2 * FLOAT * here * shards.size(*order))  # gathered, and its gradient scattered
        if spec.update != "router_bias":
            add(tuple(a for a in dict(shards.sizes) if not any(a in dim for dim in stored)), 2 * FLOAT * here)
    columns = tuple(a for a in dict(shards.sizes) if a in shards.stored(specs["embed"])[1])
    add(columns, 2 * FLOAT * N * D)
    add(("context",), 2 * FLOAT * L * N * shards.size("context") * (model.kv_lora_rank + model.qk_rope_head_dim))
    ways, moe = shards.size("expert"), model.num_moe_layers
    if cfg.train.transport == "all_gather":
        add(("expert",), 4 * FLOAT * moe * ways * N * D)
    else:
        add(("expert",), 5 * FLOAT * moe * ways * rounds.room(N * K / ways, N * K) * D)
    if shards.size("tensor") > 1:
        out["tensor",] += 4 * FLOAT * (2 * L + 0.5) * N * D * (shards.size("tensor") - 1) / shards.size("tensor")
    return dict(out)


WIDE = with_(with_(RUN, "model", hidden_size=128, moe_intermediate_size=64, kv_lora_rank=64), "train", seq_len=64)
"""Wide enough that integers and single numbers per token are a small part."""

MESHES = [
    ("all_to_all", dict(fsdp=2, expert=4)),
    ("all_gather", dict(data=2, expert=4)),
    ("all_gather", dict(fsdp=2, context=2, tensor=2)),
]


@pytest.mark.parametrize("transport, axes", MESHES, ids=[" x ".join(f"{k}{v}" for k, v in m.items()) for _, m in MESHES])
def test_bytes_are_those_of_the_formula(transport, axes):
    cfg = with_(on_mesh(WIDE, **axes), "train", transport=transport)
    hlo = compiled_hlo(cfg)
    found, wanted = received(hlo, mesh_of(cfg)), formula(cfg)
    assert sum(found.values()) <= 1.1 * sum(wanted.values())
    assert sum(found.values()) >= 0.95 * sum(wanted.values())  # a formula that is too large would prove nothing
    for group, moved in found.items():
        assert group in wanted or moved < 0.02 * sum(found.values()), f"{moved} bytes over {group}, which nothing asked for"


@pytest.fixture(scope="module")
def two_programs():
    """The whole train step, experts gathered in the compute dtype and packed: HLO, new state and metrics of each."""
    cfg = with_(on_mesh(WIDE, data=2, fsdp=2, expert=2), "quant", group_size=32)
    mesh, specs = mesh_of(cfg), param_specs(cfg.model)
    optimizer = build_optimizer(specs, cfg.optim, 10, mesh=mesh, shardings=param_shardings(specs, mesh))
    state = initial_state(cfg, specs, optimizer, mesh)
    rows = jax.device_put(batch(cfg), batch_sharding(mesh))
    out = []
    for settled in (False, True):
        step = make_train_step(StepConfig(cfg, "float32", "cpu", mesh, settled), specs, optimizer, lambda _: 0.1)
        compiled = jax.jit(step).lower(state, rows).compile(compiler_options=FAST_COMPILE)
        out.append((compiled.as_text(), jax.device_get(compiled(state, rows))))
    return cfg, out


def test_packed_experts_change_no_number(two_programs):
    """Loss, parameters and momenta, which after one step are the gradients: bit for bit."""
    _, ((_, plain), (_, packed)) = two_programs
    assert float(plain[1]["loss"]) > 1 and float(plain[1]["grad_norm"]) > 0
    jax.tree.map(np.testing.assert_array_equal, plain, packed)


def test_packed_experts_are_gathered_in_less_than_a_third_of_the_bytes(two_programs):
    """Everything else in the two programs is the same, so what they save tells what the experts took: 4.5 bits a weight,
    forward; float32 stood for them before, because XLA widens bf16 collectives on a CPU."""
    cfg, ((plain, _), (packed, _)) = two_programs
    specs, shards = param_specs(cfg.model), shards_of(mesh_of(cfg))
    weights = sum(s.size for s in specs.values() if s.on_grid) // shards.size("expert")

    def over_fsdp(hlo):
        found = census(hlo, 8, causal=True).collectives
        return sum(c.received * c.times for c in found if c.kind == "all-gather" and c.members == (0, 2))

    in_float32, half = FLOAT * weights, 1 / 2  # of what is gathered, a device has half
    as_codes = in_float32 - (over_fsdp(plain) - over_fsdp(packed)) / half
    assert as_codes == weights * bits_per_weight(32) / 8
    assert as_codes <= 0.30 * 2 * weights


def test_no_product_runs_over_all_experts():
    """Four times the experts, the same choices per token: the same arithmetic, forward and in both gradients."""
    flops = [census(compiled_hlo(with_(WIDE, "model", n_routed_experts=E)), causal=True).flops for E in (8, 32)]
    assert flops[1] < 1.15 * flops[0]  # the router grows, and a quarter more rows pad whole blocks
