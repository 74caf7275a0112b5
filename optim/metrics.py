"""What the optimizer did, per group, for metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array

from configs.param_spec import Specs
from configs.schema import OptimConfig
from optim.build import OptimizerState
from optim.matrices import is_expert
from optim.routing import rules
from optim.transforms import global_norm


def groups(specs: Specs, cfg: OptimConfig) -> dict[str, list[str]]:
    """Paths by what is reported of them together: experts, matrices (all others of Muon) and adamw, as far as a group has
    members."""

    def group(path: str, rule: str) -> str:
        if specs[path].matrix is None:
            return rule
        return "experts" if is_expert(specs[path]) else "matrices" if rule == "muon" else rule

    out: dict[str, list[str]] = {}
    for path, rule in rules(specs, cfg).items():
        if rule != "router_bias":
            out.setdefault(group(path, rule), []).append(path)
    return out


def gradient_metrics(specs: Specs, cfg: OptimConfig, grads: Mapping[str, Array]) -> dict[str, Array]:
    """float32 scalars: grad_norm of all and grad_norm/G of every group, before clipping."""
    out = {f"grad_norm/{name}": global_norm({path: grads[path] for path in paths}) for name, paths in groups(specs, cfg).items()}
    return out | {"grad_norm": jnp.sqrt(sum(norm**2 for norm in out.values()))}


def update_metrics(specs: Specs, cfg: OptimConfig, updates: Mapping[str, Array], state: OptimizerState) -> dict[str, Array]:
    """float32 scalars: update_rms/G of every group, of what is added to the weights, learning rate included; qk_clip/heads
    and qk_clip/gamma of the step that made `state`."""
    out = {
        f"update_rms/{name}": global_norm({path: updates[path] for path in paths})
        / math.sqrt(sum(specs[path].size for path in paths))
        for name, paths in groups(specs, cfg).items()
    }
    return out | {"qk_clip/heads": state.qk_clip.clipped.astype(jnp.float32), "qk_clip/gamma": state.qk_clip.smallest}
