"""The optimizer of a run: Muon for matrices, AdamW for the rest, the router-bias rule, and QK-Clip after them all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from configs.param_spec import Specs
from configs.schema import ConfigError, OptimConfig
from optim import muon
from optim.adamw import scale_by_adam
from optim.form import carrier_dtype, platform_of
from optim.newton_schulz import coefficients
from optim.plan import Group, make_plan
from optim.qk_clip import QKClipState, qk_clip
from optim.router_bias import router_bias_updates
from optim.routing import fingerprint, rules
from optim.schedules import learning_rate
from optim.transforms import add_decayed_weights, clip_to, scale_by_rate


class OptimizerState(NamedTuple):
    """layout: fingerprint of the routing table. step: updates applied; TrainState.step counts skipped
    steps as well."""

    layout: Int[Array, ""]
    step: Int[Array, ""]
    muon: Any
    adamw: Any
    qk_clip: QKClipState


def plan_of(
    specs: Specs,
    cfg: OptimConfig,
    platform: str,
    compute_dtype: str = "float32",
    *,
    mesh: Mesh | AbstractMesh | None = None,
    shardings: Mapping[str, NamedSharding] | None = None,
) -> tuple[Group, ...]:
    """What `build_optimizer` follows on a mesh of that platform; to print it, an abstract mesh will do."""
    paths = [path for path, rule in rules(specs, cfg).items() if rule == "muon"]
    coeffs = coefficients(cfg.newton_schulz, cfg.newton_schulz_steps)
    return make_plan(specs, paths, coeffs, platform, compute_dtype, split_kv_a=cfg.split_kv_a, mesh=mesh, shardings=shardings)


def build_optimizer(
    specs: Specs,
    cfg: OptimConfig,
    total_steps: int,
    compute_dtype: str = "float32",
    *,
    mesh: Mesh | None = None,
    shardings: Mapping[str, NamedSharding] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer over flat dicts with the keys of `specs`.

    update(grads, state, params, *, max_logits, expert_counts, finite=True) -> (updates, state)
        grads          any float dtype; those of router biases are ignored and may be missing
        max_logits     float32 [num_hidden_layers, H], the step's maximum; None only without QK-Clip
        expert_counts  [num_moe_layers, E], tokens of the whole global batch; None only without router biases, and then
                       experts that no token reached are not left in their place
        finite         scalar; where it is false the updates are zero and the state is the old one
        updates        float32, to be added to the weights (optim/apply.py)

    Call it once per optimizer step, on the gradient accumulated over all microbatches. `mesh` and `shardings` let the
    planner place the matrix work; without them everything runs on one device. `compute_dtype`: of the run, in which a CPU
    multiplies matrices here too.
    """
    rule_of = rules(specs, cfg)
    group = {rule: [path for path, r in rule_of.items() if r == rule] for rule in ("muon", "adamw", "router_bias")}
    if (mesh is None) != (shardings is None):
        raise ConfigError("build_optimizer needs the mesh and the shardings together, or neither")
    rate = learning_rate(cfg, total_steps)
    plan = plan_of(specs, cfg, platform_of(mesh), compute_dtype, mesh=mesh, shardings=shardings)
    carrier = jnp.dtype(carrier_dtype(platform_of(mesh), compute_dtype))

    matrices = optax.chain(
        muon.scale_by_momentum(cfg.momentum, cfg.nesterov, jnp.dtype(cfg.momentum_dtype)),
        muon.orthogonalize(plan, carrier, mesh=mesh, shardings=shardings),
        muon.scale_by_matrix_shape(specs, cfg.matrix_scale, cfg.split_kv_a),
        muon.leave_idle_experts(specs),
        add_decayed_weights(specs, cfg.weight_decay),
        scale_by_rate(rate),
    )
    vectors = optax.chain(
        scale_by_adam(cfg.adam_b1, cfg.adam_b2, cfg.adam_eps),
        add_decayed_weights(specs, cfg.weight_decay),
        scale_by_rate(lambda step: cfg.adam_lr_ratio * rate(step)),
    )
    clip = qk_clip(specs, cfg.qk_clip_tau) if cfg.qk_clip_tau is not None else None
    layout = fingerprint(specs, cfg)

    def check(tree: Mapping[str, Array], what: str, optional: list[str]) -> None:
        unknown, missing = set(tree) - set(specs), set(specs) - set(tree) - set(optional)
        if unknown or missing:
            raise ConfigError(f"{what} and the parameter table differ: without spec {sorted(unknown)}, missing {sorted(missing)}")

    def pick(tree: Mapping[str, Array], rule: str) -> dict[str, Array]:
        return {path: tree[path] for path in group[rule]}

    def init(params):
        check(params, "the parameters", [])
        return OptimizerState(
            jnp.asarray(layout, jnp.int32),
            jnp.zeros((), jnp.int32),
            matrices.init(pick(params, "muon")),
            vectors.init(pick(params, "adamw")),
            QKClipState(jnp.zeros((), jnp.int32), jnp.ones((), jnp.float32)),
        )

    def update(grads, state, params, *, max_logits=None, expert_counts=None, finite=True, **_):
        check(grads, "the gradients", group["router_bias"])
        grads = {path: grads[path] for path in group["muon"] + group["adamw"]}
        if cfg.clip_norm and cfg.clip == "all":
            grads = clip_to(grads, cfg.clip_norm)
        small = pick(grads, "adamw")
        if cfg.clip_norm and cfg.clip == "adamw":
            small = clip_to(small, cfg.clip_norm)

        updates, muon_state = matrices.update(
            pick(grads, "muon"), state.muon, pick(params, "muon"), step=state.step, finite=finite, expert_counts=expert_counts
        )
        adam_updates, adam_state = vectors.update(small, state.adamw, pick(params, "adamw"), step=state.step)
        updates = updates | adam_updates
        if group["router_bias"]:
            if expert_counts is None:
                raise ConfigError("the router bias follows the experts' loads; pass expert_counts to update")
            updates |= router_bias_updates(specs, group["router_bias"], cfg.router_bias_rate, cfg.router_bias_rule, expert_counts)
        clip_state = state.qk_clip
        if clip is not None:
            if max_logits is None:
                raise ConfigError("QK-Clip needs max_logits; pass them to update or set optim.qk_clip_tau to None")
            updates, clip_state = clip.update(updates, clip_state, params, max_logits=max_logits)
        updates = {path: jnp.where(finite, u, -0.0) for path, u in updates.items()}  # adding 0.0 would change a weight of -0.0
        new = state.step + 1, adam_state, clip_state
        step, adam_state, clip_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), new, (state.step, state.adamw, state.qk_clip)
        )
        return updates, OptimizerState(state.layout, step, muon_state, adam_state, clip_state)

    return optax.GradientTransformationExtraArgs(init, update)


def check_state(state: OptimizerState, specs: Specs, cfg: OptimConfig) -> None:
    """ConfigError if a restored state belongs to another layout version, other arrays or another routing."""
    if int(state.layout) != fingerprint(specs, cfg):
        raise ConfigError(
            "the optimizer state was written with another layout version or another routing of "
            "parameters; resume with the configuration it was written with, or start from its weights "
            "alone (train.init_from)"
        )


def state_shardings(state: Any, mesh: Mesh, shardings: Mapping[str, NamedSharding]) -> Any:
    """Sharding of every array in an optimizer state (or its shapes): moments lie where their weights lie, all else
    is on every device."""
    everywhere = NamedSharding(mesh, PartitionSpec())

    def of(path, _):
        key = getattr(path[-1], "key", None)
        return shardings.get(key, everywhere)

    return jax.tree_util.tree_map_with_path(of, state)
