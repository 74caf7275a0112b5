"""What calibrated baselines know of the data: per expert, the second moments of its inputs and how many tokens it saw.

The caller runs the unquantised model and reports, per MoE layer, the tokens that enter the experts, which experts they
go to and with which gates; see train/expert_inputs.py. Inputs of the down projection follow from the weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from configs.param_spec import ParamSpec


@dataclass(frozen=True)
class GridSpec:
    """How a layer's experts [E, ...] are read as matrices [E, O, I]: position of the input axis, stored shape without
    layers."""

    inputs: int
    shape: tuple[int, ...]

    @classmethod
    def of(cls, spec: ParamSpec) -> GridSpec:
        return cls(spec.axis(spec.matrix.rows[0]) - 1, spec.shape[1:])


def expert_matrices(w: Float[Array, "E ..."], at: GridSpec) -> Float[Array, "E O I"]:
    """One layer's experts, inputs last, all output axes flattened in stored order."""
    return jnp.moveaxis(w, at.inputs, -1).reshape(w.shape[0], -1, w.shape[at.inputs])


def restore_matrices(m: Float[Array, "E O I"], at: GridSpec) -> Float[Array, "E ..."]:
    """The inverse; also for scales, whose last axis is shorter."""
    outer = [n for i, n in enumerate(at.shape) if i != at.inputs]
    return jnp.moveaxis(m.reshape(*outer, m.shape[-1]), -1, at.inputs)


@dataclass(frozen=True)
class ExpertInputs:
    """One MoE layer of one batch: tokens x [N, D], chosen experts [N, K], gate weights [N, K] (0 for padding)."""

    layer: int
    x: Float[Array, "N D"]
    experts: Int[Array, "N K"]
    gates: Float[Array, "N K"]


@dataclass
class Calibration:
    """hessians   path -> [layers][E, I, I], sums of x xT; counts  [layers, E] tokens seen"""

    hessians: dict[str, list[Array]] = field(default_factory=dict)
    counts: np.ndarray | None = None

    def summary(self) -> str:
        """One sentence about how evenly the experts were seen."""
        c = np.asarray(self.counts)
        return (
            f"calibrated on {int(c.sum(-1).max()):,} routed tokens per layer; experts saw between {int(c.min())} and "
            f"{int(c.max())}, median {int(np.median(c))}, {int((c == 0).sum())} none"
        )


@partial(jax.jit, static_argnums=4)
def _moments(x, experts, gates, gate_up, num_experts):
    """([E, D, D] of the tokens, [E, F, F] of the gated hidden values, [E] counts) of one batch."""

    def one(e):
        gate = jnp.sum(jnp.where(experts == e, gates, 0), axis=-1)
        mine = jnp.where(jnp.any(experts == e, axis=-1) & (gate > 0), 1.0, 0.0)
        rows = x * mine[:, None]
        up = jnp.einsum("nd,dgf->gnf", rows, gate_up[e])
        # Weighted by the gate: it scales the expert's output, and so its error.
        hidden = jax.nn.silu(up[0]) * up[1] * gate[:, None]
        return rows.T @ rows, hidden.T @ hidden, jnp.sum(mine)

    return jax.lax.map(one, jnp.arange(num_experts))


def calibrate(
    inputs: Iterable[ExpertInputs], gate_up: Float[Array, "L E D 2 F"], gate_up_path: str, down_path: str
) -> Calibration:
    """Sum up any number of batches; `gate_up` are the unquantised weights."""
    layers, experts = gate_up.shape[:2]
    sums: dict[int, list[Array]] = {}
    for batch in inputs:
        new = _moments(batch.x.astype(jnp.float32), batch.experts, batch.gates, gate_up[batch.layer].astype(jnp.float32), experts)
        old = sums.get(batch.layer)
        sums[batch.layer] = list(new) if old is None else [a + b for a, b in zip(old, new)]
    missing = [layer for layer in range(layers) if layer not in sums]
    if missing:
        raise ValueError(f"the calibration data reached no tokens of MoE layers {missing}")
    return Calibration(
        {gate_up_path: [sums[i][0] for i in range(layers)], down_path: [sums[i][1] for i in range(layers)]},
        np.stack([np.asarray(sums[i][2]) for i in range(layers)]),
    )
