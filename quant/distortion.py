"""What quantisation did to every expert, and what it did to the routing and the predictions after them.

Average losses hide the damage: it sits in experts that few tokens visit and grows with the position in a text. Both
models run on the same tokens; the functions of experts are compared on the reference's own inputs, so that each
expert answers for itself only.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from quant.calibration import ExpertInputs


@dataclass(frozen=True)
class ExpertRow:
    """One expert. Errors are relative: norm of the difference over norm of the reference. `function_error` is NaN for
    an expert that no token visited."""

    layer: int
    expert: int
    tokens: int
    weight_error: float
    function_error: float


@dataclass(frozen=True)
class RoutingRow:
    """One MoE layer. overlap: mean Jaccard index of the chosen sets; first_choice: share of tokens whose strongest
    expert is the same; load_kl: KL of the two distributions of tokens over experts."""

    layer: int
    overlap: float
    first_choice: float
    load_kl: float


@dataclass(frozen=True)
class Distortion:
    """`kl_by_position` is the mean KL(reference || other) of the next-token distributions, per position."""

    experts: tuple[ExpertRow, ...]
    routing: tuple[RoutingRow, ...]
    kl_by_position: tuple[float, ...]

    def summary(self) -> dict[str, float]:
        """Means, the 99th percentile over experts, and two slopes: of the function error per tenfold tokens (negative
        where rare experts suffer more), of the KL per tenfold position."""
        seen = [r for r in self.experts if r.tokens]
        errors = np.array([r.function_error for r in seen])
        kl = np.array(self.kl_by_position)
        reached = np.flatnonzero(np.isfinite(kl))
        return {
            "weight_error": float(np.mean([r.weight_error for r in self.experts])),
            "function_error": float(errors.mean()),
            "function_error_p99": float(np.percentile(errors, 99)),
            "function_error_per_decade_of_tokens": _slope(np.log10([r.tokens for r in seen]), errors),
            "overlap_first_layer": self.routing[0].overlap,
            "overlap_last_layer": self.routing[-1].overlap,
            "kl": float(kl[reached].mean()),
            "kl_per_decade_of_position": _slope(np.log10(reached + 1), kl[reached]),
            "experts_without_tokens": float(len(self.experts) - len(seen)),
        }

    def to_json(self) -> dict[str, Any]:
        return {"summary": self.summary(), **asdict(self)}


def _slope(x, y) -> float:
    x = np.asarray(x, np.float64)
    return float(np.polyfit(x, y, 1)[0]) if np.ptp(x) > 0 else 0.0


@dataclass(frozen=True)
class ExpertWeights:
    """All routed experts, float32, as served: gate_up [L, E, D, 2, F], down [L, E, F, D]."""

    gate_up: Float[Array, "L E D 2 F"]
    down: Float[Array, "L E F D"]


def measure(
    reference: ExpertWeights,
    other: ExpertWeights,
    inputs: list[ExpertInputs],
    other_inputs: list[ExpertInputs],
    kl: Float[Array, "S"],
) -> Distortion:
    """Compare two sets of weights in the same basis (`Quantized.effective` undoes AWQ's scaling).

    `inputs` and `other_inputs` have one entry per MoE layer, of the same tokens, in order; tokens with all gates 0 are
    padding. `kl` comes from `kl_by_position`.
    """
    experts, routing = [], []
    for mine, theirs in zip(inputs, other_inputs, strict=True):
        layer = mine.layer
        tokens, errors = _function_errors(
            mine.x,
            mine.experts,
            mine.gates,
            *(w[layer].astype(jnp.float32) for w in (reference.gate_up, reference.down, other.gate_up, other.down)),
        )
        weight_errors = _weight_errors(*(w[layer] for w in (reference.gate_up, reference.down, other.gate_up, other.down)))
        experts += [
            ExpertRow(layer, e, int(tokens[e]), float(weight_errors[e]), float(errors[e]) if tokens[e] else float("nan"))
            for e in range(len(tokens))
        ]
        routing.append(_routing(mine, theirs, len(tokens)))
    return Distortion(tuple(experts), tuple(routing), tuple(np.asarray(kl).tolist()))


@jax.jit
def kl_by_position(
    logits: Float[Array, "B S V"], other: Float[Array, "B S V"], positions: Int[Array, "B S"], valid: Bool[Array, "B S"]
) -> Float[Array, "S"]:
    """Mean KL(softmax(logits) || softmax(other)) in nats over the valid tokens at each position of their document; NaN
    at positions that no document reaches."""
    p, q = jax.nn.log_softmax(logits.astype(jnp.float32)), jax.nn.log_softmax(other.astype(jnp.float32))
    kl = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    sums, counts = (jnp.zeros(logits.shape[1]).at[positions].add(jnp.where(valid, x, 0)) for x in (kl, 1.0))
    return sums / counts


@jax.jit
def _weight_errors(gate_up, down, other_gate_up, other_down):
    def squares(a, b):
        return jnp.sum(jnp.square(a.astype(jnp.float32)).reshape(len(a), -1), -1) + jnp.sum(
            jnp.square(b.astype(jnp.float32)).reshape(len(b), -1), -1
        )

    return jnp.sqrt(squares(gate_up - other_gate_up, down - other_down) / squares(gate_up, down))


def _expert(x, gate_up, down):
    gate, up = jnp.einsum("nd,dgf->gnf", x, gate_up)
    return (jax.nn.silu(gate) * up) @ down


@jax.jit
def _function_errors(x, experts, gates, gate_up, down, other_gate_up, other_down):
    x = x.astype(jnp.float32)

    def one(e):
        mine = jnp.any((experts == e) & (gates > 0), axis=-1)
        want, got = _expert(x, gate_up[e], down[e]), _expert(x, other_gate_up[e], other_down[e])
        ratio = jnp.linalg.norm(got - want, axis=-1) / jnp.maximum(jnp.linalg.norm(want, axis=-1), 1e-30)
        return jnp.sum(mine), jnp.sum(jnp.where(mine, ratio, 0)) / jnp.maximum(jnp.sum(mine), 1)

    return jax.lax.map(one, jnp.arange(len(gate_up)))


@partial(jax.jit, static_argnums=2)
def _chosen(experts, gates, count):
    return jnp.any(jax.nn.one_hot(experts, count, dtype=bool) & (gates > 0)[..., None], axis=1)


def _routing(mine: ExpertInputs, theirs: ExpertInputs, count: int) -> RoutingRow:
    a, b = (np.asarray(_chosen(t.experts, t.gates, count)) for t in (mine, theirs))
    valid = a.any(-1)
    a, b = a[valid], b[valid]
    overlap = ((a & b).sum(-1) / (a | b).sum(-1)).mean()
    first = [
        np.take_along_axis(np.asarray(t.experts), np.asarray(t.gates).argmax(-1)[:, None], 1)[valid, 0] for t in (mine, theirs)
    ]
    # Half a token everywhere: an expert that one model never uses would make the KL infinite.
    load = [(x.sum(0) + 0.5) / (x.sum() + 0.5 * count) for x in (a, b)]
    return RoutingRow(
        mine.layer, float(overlap), float((first[0] == first[1]).mean()), float((load[0] * np.log(load[0] / load[1])).sum())
    )
