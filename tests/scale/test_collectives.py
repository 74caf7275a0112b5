"""What the gradients of a step move, from the compiled program: on which mesh axes, and how many bytes, against the
formula of docs/scale.md."""

from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.sharding import TOKEN_AXES
from model import rounds
from model.shards import shards_of
from model.transformer import param_specs
from optim.census import census
from tests.scale.networks import FAST_COMPILE, RUN, batch, mesh_of, on_mesh, with_
from train.mesh import batch_sharding, param_shardings
from train.step import StepConfig, gradients

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

MESHES = [("all_to_all", dict(fsdp=2, expert=4)), ("all_gather", dict(data=2, expert=4)),
          ("all_gather", dict(fsdp=2, context=2, tensor=2))]


@pytest.mark.parametrize("transport, axes", MESHES, ids=[" x ".join(f"{k}{v}" for k, v in m.items()) for _, m in MESHES])
def test_bytes_are_those_of_the_formula(transport, axes):
    cfg = with_(on_mesh(WIDE, **axes), "train", transport=transport)
    hlo = compiled_hlo(cfg)
    found, wanted = received(hlo, mesh_of(cfg)), formula(cfg)
    assert sum(found.values()) <= 1.1 * sum(wanted.values())
    assert sum(found.values()) >= 0.95 * sum(wanted.values())  # a formula that is too large would prove nothing
    for group, moved in found.items():
        assert group in wanted or moved < 0.02 * sum(found.values()), f"{moved} bytes over {group}, which nothing asked for"


def test_no_product_runs_over_all_experts():
    """Four times the experts, the same choices per token: the same arithmetic, forward and in both gradients."""
    flops = [census(compiled_hlo(with_(WIDE, "model", n_routed_experts=E)), causal=True).flops for E in (8, 32)]
    assert flops[1] < 1.15 * flops[0]  # the router grows, and a quarter more rows pad whole blocks
