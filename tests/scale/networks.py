"""A small run, its weights and a batch: the same numbers on every mesh, so that only the mesh can make a difference."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from configs.schema import MeshConfig, ModelConfig, OptimConfig, QuantConfig, RunConfig, TrainConfig
from model.call import ModelAux
from model.transformer import param_specs
from optim.build import build_optimizer, state_shardings
from optim.qk_clip import QKClipState
from quant.coverage import require_whole_groups
from tests.model.networks import random_params
from train.mesh import batch_sharding, check_mesh, make_mesh, param_shardings
from train.step import StepConfig, gradients

MODEL = ModelConfig(
    vocab_size=96,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    intermediate_size=48,
    moe_intermediate_size=16,
    n_routed_experts=8,
    num_experts_per_tok=3,
    dtype="float32",
)

RUN = RunConfig(
    model=MODEL,
    optim=OptimConfig(lr=0.1, warmup_steps=1, newton_schulz_steps=3, qk_clip_tau=2.0, adam_eps=1e-2),
    quant=QuantConfig(grid="int4", group_size=8),
    train=TrainConfig(batch_size=32, seq_len=16, z_loss=1e-3, balance_loss=1e-2, compute_dtype="float32"),
)


def with_(cfg: RunConfig, section: str, **fields) -> RunConfig:
    return dataclasses.replace(cfg, **{section: dataclasses.replace(getattr(cfg, section), **fields)})


def on_mesh(cfg: RunConfig, **axes: int) -> RunConfig:
    return with_(cfg, "mesh", **{"data": 1, **axes})


def weights(cfg: RunConfig, bias: float = 0.1) -> dict[str, np.ndarray]:
    return jax.device_get(random_params(cfg.model, std=0.15, bias=bias))


def batch(cfg: RunConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Two documents of other lengths in every row, then padding; one row has padding only."""
    rng, shape = np.random.default_rng(seed), (cfg.train.batch_size, cfg.train.seq_len)
    segments = np.zeros(shape, np.int32)
    positions = np.zeros(shape, np.int32)
    for row in range(1, shape[0]):
        first, end = sorted(rng.choice(np.arange(2, shape[1] + 1), 2, replace=False))
        segments[row, :first], segments[row, first:end] = 1, 2
        positions[row, :first], positions[row, first:end] = np.arange(first), np.arange(end - first)
    tokens, targets = rng.integers(0, cfg.model.vocab_size, (2, *shape), np.int32)
    trained = (segments > 0) & (rng.random(shape) < 0.8)
    return {
        "tokens": tokens,
        "targets": targets,
        "positions": positions,
        "segments": segments,
        "weights": (trained * rng.uniform(0.5, 1.5, shape)).astype(np.float32),
    }


def mesh_of(cfg: RunConfig):
    """The config's mesh on as many of the devices as it needs."""
    sizes = dataclasses.asdict(cfg.mesh if cfg.mesh != MeshConfig() else on_mesh(cfg).mesh)
    return make_mesh(MeshConfig(**sizes), jax.devices()[: int(np.prod(list(sizes.values())))])


FAST_COMPILE = {"xla_backend_optimization_level": 0}
"""These programs are compiled once and run once."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one optimizer step computes, on the host."""

    loss: np.ndarray
    gradients: dict[str, np.ndarray]
    updates: dict[str, np.ndarray]
    aux: ModelAux
    clipped: QKClipState


def take_step(cfg: RunConfig, params: dict[str, np.ndarray], rows: dict[str, np.ndarray]) -> Measured:
    """Loss, gradients, updates (router biases among them), measurements and QK-Clip's factors on the config's mesh."""
    compiled, places, optimizer = compile_step(cfg)
    mesh = mesh_of(cfg)
    placed = jax.device_put(params, places)
    state = jax.jit(optimizer.init, out_shardings=state_shardings(jax.eval_shape(optimizer.init, placed), mesh, places))(placed)
    return Measured(*jax.device_get(compiled(placed, state, jax.device_put(rows, batch_sharding(mesh)))))


def compile_step(cfg: RunConfig):
    """The program of `take_step`, the parameters' shardings and the optimizer."""
    mesh, specs = mesh_of(cfg), param_specs(cfg.model)
    check_mesh(cfg, mesh)
    places = param_shardings(specs, mesh)
    require_whole_groups(specs, places, cfg.quant)
    optimizer = build_optimizer(specs, cfg.optim, 10, mesh=mesh, shardings=places)
    step = StepConfig(cfg, "float32", "cpu", mesh)
    amount = jnp.float32(0 if cfg.quant.grid == "none" else 1)

    def run(params, state, rows):
        loss, grads, aux = gradients(params, rows, amount, step)
        updates, state = optimizer.update(
            grads, state, params, max_logits=aux.attention.max_logit, expert_counts=aux.moe.expert_counts
        )
        return loss, grads, updates, aux, state.qk_clip

    params = {path: jax.ShapeDtypeStruct(spec.shape, jnp.float32, sharding=places[path]) for path, spec in specs.items()}
    state = jax.eval_shape(optimizer.init, params)
    state = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, state_shardings(state, mesh, places)
    )
    rows = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh)) for name, x in batch(cfg).items()}
    return jax.jit(run).lower(params, state, rows).compile(compiler_options=FAST_COMPILE), places, optimizer
