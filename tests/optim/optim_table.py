"""A small K2-shaped table of parameters, with weights, gradients and step statistics to go with it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from configs.param_spec import HFTensor, Matrix, ParamSpec

L, D, E, F, H, Q, NOPE, ROPE, V, R = 3, 32, 8, 16, 4, 24, 8, 4, 8, 16
MOE = (1, 2, 3)


def spec(shape, axes, update="muon", matrix=None, **more):
    return ParamSpec(tuple(shape), tuple(axes.split()), 0.02, update, (HFTensor("x"),), matrix=matrix, **more)


def matrix(rows, cols, split=None, by_choice=False):
    return Matrix(tuple(rows.split()), tuple(cols.split()), split, by_choice)


def k2_table():
    q, kv = ((NOPE, 0.5), (ROPE, 1.0)), ((NOPE, 0.5), (V, 0.0))
    return {
        "q_a": spec((L, D, Q), "layers embed q_lora", matrix=matrix("embed", "q_lora"), layers=MOE),
        "q_b": spec(
            (L, Q, H, NOPE + ROPE), "layers q_lora heads qk_dim", matrix=matrix("q_lora", "qk_dim"), clip_powers=q, layers=MOE
        ),
        "kv_a": spec(
            (L, D, R + ROPE), "layers embed kv_latent", matrix=matrix("embed", "kv_latent", (R, ROPE), True), layers=MOE
        ),
        "kv_b": spec(
            (L, R, H, NOPE + V),
            "layers kv_lora heads kv_dim",
            matrix=matrix("kv_lora", "kv_dim", (NOPE, V)),
            clip_powers=kv,
            layers=MOE,
        ),
        "o": spec((L, H, V, D), "layers heads v_dim embed", matrix=matrix("heads v_dim", "embed"), layers=MOE),
        "dense.o": spec((H, V, D), "heads v_dim embed", matrix=matrix("heads v_dim", "embed"), layers=(0,)),
        "dense.q_b": spec(
            (Q, H, NOPE + ROPE), "q_lora heads qk_dim", matrix=matrix("q_lora", "qk_dim"), clip_powers=q, layers=(0,)
        ),
        "gate_up": spec(
            (L, E, D, 2, F),
            "layers experts embed gate_up expert_hidden",
            matrix=matrix("embed", "expert_hidden"),
            on_grid=True,
            layers=MOE,
        ),
        "down": spec(
            (L, E, F, D), "layers experts expert_hidden embed", matrix=matrix("expert_hidden", "embed"), on_grid=True, layers=MOE
        ),
        "router": spec((L, D, E), "layers embed experts", matrix=matrix("embed", "experts"), layers=MOE),
        "router_bias": spec((L, E), "layers experts", "router_bias", layers=MOE),
        "norm": spec((L, D), "layers embed", "adamw", layers=MOE),
        "embed": spec((64, D), "vocab embed", "adamw"),
    }


def arrays(specs, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {path: jnp.asarray(scale * rng.normal(size=s.shape), jnp.float32) for path, s in specs.items()}


def statistics(seed=0):
    """max_logits [L + 1, H] around 2, and expert_counts [L, E]."""
    rng = np.random.default_rng(seed)
    return {
        "max_logits": jnp.asarray(rng.uniform(1, 3, (L + 1, H)), jnp.float32),
        "expert_counts": jnp.asarray(rng.integers(0, 50, (L, E))),
    }


AXES = ("data", "fsdp", "expert", "context", "tensor")


def mesh_of(data=1, fsdp=1, expert=1, tensor=1, explicit=False):
    kind = AxisType.Explicit if explicit else AxisType.Auto
    shape = (data, fsdp, expert, 1, tensor)
    return jax.make_mesh(shape, AXES, axis_types=(kind,) * 5, devices=jax.devices()[: int(np.prod(shape))])


CUTS = {"embed": ("fsdp",), "heads": ("tensor",), "experts": ("expert", "fsdp")}


def shardings(specs, mesh, cuts=CUTS):
    """One mesh axis at most once per array, first array axis first; an axis that does not divide is left whole."""
    out = {}
    for path, s in specs.items():
        used, entries = set(), []
        experts_cut = "experts" in s.axes and s.matrix is not None and "experts" in s.batch_axes()
        for axis, size in zip(s.axes, s.shape):
            names = tuple(a for a in cuts.get(axis, ()) if a not in used)
            if axis == "experts" and not experts_cut or axis == "embed" and experts_cut:
                names = ()
            if size % int(np.prod([mesh.shape[a] for a in names])):
                names = ()
            used |= set(names)
            entries.append(names or None)
        out[path] = NamedSharding(mesh, P(*entries))
    return out


def experts_of_k2():
    """Shapes only: 60 layers of 384 experts of 7168 x 2048."""
    return {
        "gate_up": spec(
            (60, 384, 7168, 2, 2048), "layers experts embed gate_up expert_hidden", matrix=matrix("embed", "expert_hidden")
        ),
        "down": spec((60, 384, 2048, 7168), "layers experts expert_hidden embed", matrix=matrix("expert_hidden", "embed")),
    }
