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


def optimizer_metrics(specs: Specs, cfg: OptimConfig, grads: Mapping[str, Array], updates: Mapping[str, Array],
                      state: OptimizerState) -> dict[str, Array]:
    """float32 scalars: grad_norm/G and update_rms/G for G in experts, matrices (all others of Muon) and adamw, as far
    as a group has members; the global grad_norm; qk_clip/heads and qk_clip/gamma of the step that made `state`.

    `grads` before clipping; the RMS is that of what is added to the weights, learning rate included.
    """
    def group(path: str, rule: str) -> str:
        if rule == "router_bias" or specs[path].matrix is None:
            return rule
        return "experts" if is_expert(specs[path]) else "matrices" if rule == "muon" else rule

    groups: dict[str, list[str]] = {}
    for path, rule in rules(specs, cfg).items():
        if rule != "router_bias":
            groups.setdefault(group(path, rule), []).append(path)
    out = {}
    for name, paths in groups.items():
        out[f"grad_norm/{name}"] = global_norm({path: grads[path] for path in paths})
        size = sum(specs[path].size for path in paths)
        out[f"update_rms/{name}"] = global_norm({path: updates[path] for path in paths}) / math.sqrt(size)
    out["grad_norm"] = jnp.sqrt(sum(out[f"grad_norm/{name}"] ** 2 for name in groups))
    out["qk_clip/heads"] = state.qk_clip.clipped.astype(jnp.float32)
    out["qk_clip/gamma"] = state.qk_clip.smallest
    return out
