"""The state of a run, one pytree, made on its devices from the ParamSpec table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.stages import Lowered
from jaxtyping import Array, Int

from configs.param_spec import ParamSpec, Specs
from configs.schema import RunConfig
from model.decode.served_params import serve
from optim.build import state_shardings
from quant.served import Serving
from train.compat import once_options
from train.mesh import param_shardings


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """params: path -> master weights (router biases included). optimizer: of optim/build.py. skipped: steps whose
    loss or gradient was not finite and which changed nothing. teacher: path -> weights as served, frozen, of the network
    that a distilled run learns from; empty without one, and then nothing of it is compiled, moved or stored."""

    params: dict[str, Array]
    optimizer: Any
    step: Int[Array, ""]
    skipped: Int[Array, ""]
    teacher: dict[str, Array] = field(default_factory=dict)


def initial_value(spec: ParamSpec, key: Array, dtype) -> Array:
    if spec.init == "zeros" or spec.init == "ones":
        return getattr(jnp, spec.init)(spec.shape, dtype if spec.update != "router_bias" else jnp.float32)
    return (jax.random.normal(key, spec.shape, jnp.float32) * spec.init).astype(dtype)


def abstract_state(cfg: RunConfig, specs: Specs, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes and dtypes of the state, each with its sharding. Optimizer arrays that stand for a parameter live with it."""
    abstract = jax.eval_shape(lambda: _initial(cfg, specs, optimizer))
    placed = state_shardings(abstract, mesh, param_shardings(specs, mesh))
    return jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, placed)


def _initial(cfg: RunConfig, specs: Specs, optimizer: optax.GradientTransformation) -> TrainState:
    keys = jax.random.split(jax.random.key(cfg.train.seed), len(specs))
    params = {path: initial_value(spec, keys[i], cfg.optim.master_dtype) for i, (path, spec) in enumerate(specs.items())}
    teacher = as_teacher(params, cfg, specs) if cfg.quant.distill_weight else {}
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), teacher)


def as_teacher(params: dict[str, Array], cfg: RunConfig, specs: Specs) -> dict[str, Array]:
    """Masters as a bf16 checkpoint serves them, off the grid: what a distilled run keeps of the run it came from. bfloat16
    where the values are (model/decode/served_params.py), so two bytes a weight."""
    return serve(params, specs, Serving(cfg.model.dtype), 0.0, cfg.model.dtype)


def initial_state(cfg: RunConfig, specs: Specs, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Random weights and a fresh optimizer, every array born in its own sharding."""
    return initial_program(cfg, specs, optimizer, mesh).compile()()


def initial_program(cfg: RunConfig, specs: Specs, optimizer: optax.GradientTransformation, mesh: Mesh) -> Lowered:
    """What makes them, not yet compiled."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(cfg, specs, optimizer, mesh))
    options = once_options(mesh.devices.flat[0].platform)
    return jax.jit(lambda: _initial(cfg, specs, optimizer), out_shardings=shardings, compiler_options=options or None).lower()
