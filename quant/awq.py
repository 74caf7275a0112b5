"""Activation-aware scaling (AWQ, arXiv 2306.00978) for routed experts: inputs that are large get finer steps.

A scale per input channel goes into the weights, its inverse into whatever made the input. For gate and up projections
that is the norm before the block, which also feeds the router and the shared expert: those are scaled back, so one
vector serves a whole layer. For the down projection it is the expert's own up projection. Both changes cancel exactly
in real numbers; norm, router and shared expert are rounded to the served dtype again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from configs.param_spec import Specs
from quant.calibration import Calibration
from quant.codecs import CODECS, Codec
from quant.ptq import Params, Quantized, nearest

POWERS = jnp.linspace(0.0, 1.0, 11)
"""Exponents of the input size that are tried; 0 is plain rounding."""


@dataclass(frozen=True)
class BlockPaths:
    """Where the arrays of the MoE block lie in the ParamSpec table: the experts', and what else reads their input."""

    gate_up: str
    down: str
    norm: str
    router: str
    shared: str


def awq_experts(
    params: Params, specs: Specs, group: int, calibration: Calibration, *, paths: BlockPaths, codec: str = "mse"
) -> Quantized:
    """Scales searched per layer (gate and up) and per expert (down), then rounding to nearest with `codec`."""
    p = {name: params[path].astype(jnp.float32) for name, path in vars(paths).items()}
    into, powers = [], []
    for layer in range(p["gate_up"].shape[0]):
        hessians = calibration.hessians[paths.gate_up][layer]
        w = p["gate_up"][layer].reshape(*p["gate_up"].shape[1:3], -1)
        s, power = _search(w, hessians, CODECS[codec], group)
        into.append(s)
        powers.append(float(power))
    s_in = jnp.stack(into)  # [L, D]
    per_expert = jax.vmap(lambda w, h: _search(w[None], h[None], CODECS[codec], group)[0])
    s_hidden = jnp.stack([per_expert(p["down"][i], calibration.hessians[paths.down][i]) for i in range(len(into))])  # [L, E, F]
    halves = jnp.stack([jnp.ones_like(s_hidden), 1 / s_hidden], axis=-2)  # only up is scaled back
    factors = {paths.gate_up: s_in[:, None, :, None, None] * halves[:, :, None], paths.down: s_hidden[..., None]}
    scaled = {paths.gate_up: p["gate_up"] * factors[paths.gate_up], paths.down: p["down"] * factors[paths.down]}
    rounded = nearest(scaled, {path: specs[path] for path in scaled}, group, codec)
    folded = {
        paths.norm: p["norm"] / s_in,
        paths.router: p["router"] * s_in[..., None],
        paths.shared: p["shared"] * s_in[:, :, None, None],
    }
    note = f"input scales are powers {', '.join(f'{x:.1f}' for x in powers)} of the input size, layer by layer"
    undo = {path: 1 / factor for path, factor in factors.items()}
    return Quantized(rounded.codes, rounded.scales, group, folded, undo, (calibration.summary(), note))


@partial(jax.jit, static_argnums=(2, 3))
def _search(
    w: Float[Array, "E I O"], hessians: Float[Array, "E I I"], codec: Codec, group: int
) -> tuple[Float[Array, "I"], Float[Array, ""]]:
    """One vector of input scales for all matrices: the power of the inputs' size with the least output error."""
    size = jnp.sqrt(jnp.einsum("eii->i", hessians))
    size = jnp.where(size > 0, size, 1.0)
    size = size / jnp.exp(jnp.mean(jnp.log(size)))

    def error(power):
        s = jnp.clip(size**power, 1e-3, 1e3)[None, :, None]
        difference = codec.fake(w * s, -2, group) / s - w
        return jnp.einsum("eio,eij,ejo->", difference, hessians, difference)

    best = POWERS[jnp.argmin(jax.lax.map(error, POWERS))]
    return jnp.clip(size**best, 1e-3, 1e3), best
