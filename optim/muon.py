"""Muon as three optax transforms over a flat dict of arrays: momentum, orthogonal factor, shape factor.

One step for a matrix W with gradient G (Jordan 2024; Liu et al., "Muon is Scalable for LLM Training", arXiv
2502.16982):

    M <- mu M + (1 - mu) G
    N  = mu M + (1 - mu) G      (Nesterov; else N = M)
    W <- W - lr (scale * NewtonSchulz(N) + decay * W)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Num

from configs.param_spec import ParamSpec, Specs
from optim.matrices import MatrixLayout, is_expert
from optim.orthogonalize import orthogonalize_tree
from optim.plan import Group


class MomentumState(NamedTuple):
    momentum: dict[str, Array]
    """Shape and sharding of the weights, so that it can be restored on any mesh."""


def scale_by_momentum(decay: float, nesterov: bool, dtype=jnp.float32) -> optax.GradientTransformationExtraArgs:
    """Exponential mean of the gradients, stored in `dtype`, computed and returned in float32. Where `finite` is false the
    stored one stays.

    No bias correction: the orthogonal factor does not depend on the size of its input. (optax corrects the two terms
    of its Nesterov sum with different exponents, which turns the direction of the first ten steps; we do as torch.)
    """

    def init(params):
        return MomentumState({path: jnp.zeros(p.shape, dtype) for path, p in params.items()})

    def update(grads, state, params=None, *, finite=True, **_):
        grads = {path: g.astype(jnp.float32) for path, g in grads.items()}
        new = {
            path: (decay * state.momentum[path].astype(jnp.float32) + (1 - decay) * g).astype(dtype) for path, g in grads.items()
        }
        # Without the barrier XLA computes both results from the old momentum, and then has to copy it: the new one
        # is written over the old one. For the same reason the old one must not be asked for behind it.
        new = lax.optimization_barrier({path: jnp.where(finite, m, state.momentum[path]) for path, m in new.items()})
        stored = {path: m.astype(jnp.float32) for path, m in new.items()}
        ahead = {path: decay * stored[path] + (1 - decay) * g for path, g in grads.items()} if nesterov else stored
        return ahead, MomentumState(new)

    return optax.GradientTransformationExtraArgs(init, update)


def orthogonalize(
    plan: tuple[Group, ...], dtype, *, mesh: Mesh | None = None, shardings: Mapping[str, NamedSharding] | None = None
) -> optax.GradientTransformation:
    """Every matrix replaced by its orthogonal factor. Arrays are cast to `dtype` before anything moves, which on
    accelerators halves the bytes on the network."""

    def update(updates, state, params=None):
        cast = {path: u.astype(dtype) for path, u in updates.items()}
        done = orthogonalize_tree(cast, plan, mesh=mesh, shardings=shardings)
        if jnp.dtype(dtype).itemsize < 4:
            # Without the barrier XLA for GPUs turns the factors to the layout of the weights in float32, and keeps them so.
            done = {path: lax.optimization_barrier(factor) for path, factor in done.items()}
        return done, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def matrix_scale(rule: str, m: int, n: int) -> float:
    """Factor on the orthogonal update of a matrix with m inputs (rows) and n outputs (columns).

    match_rms  0.2 * sqrt(max(m, n)): a full-rank update has RMS 0.2, that of AdamW (Moonlight, Kimi K2).
    keller     sqrt(max(1, n / m)); torch writes it with rows as outputs.
    unit_rms   sqrt(n / m): operator norm 1 from RMS to RMS (Bernstein).
    """
    factors = {"match_rms": 0.2 * math.sqrt(max(m, n)), "keller": math.sqrt(max(1.0, n / m)), "unit_rms": math.sqrt(n / m)}
    return factors[rule]


def scale_vector(spec: ParamSpec, layout: MatrixLayout, rule: str) -> float | Array:
    """One factor for the array, or one per column where the blocks of a split differ, shaped to broadcast."""
    factors = [matrix_scale(rule, m, n) for _, m, n in layout.matrices(spec.shape)]
    if len(set(factors)) == 1:
        return factors[0]
    vector = np.repeat(np.array(factors, np.float32), layout.splits)
    shape = [1] * len(spec.shape)
    shape[layout.cols[-1]] = vector.size
    return jnp.asarray(vector.reshape(shape))


def scale_by_matrix_shape(specs: Specs, rule: str, split_kv_a: bool = True) -> optax.GradientTransformation:
    """Times `matrix_scale` of the logical matrix, never of the stored array; float32 from here on."""

    def update(updates, state, params=None):
        layouts = {path: MatrixLayout.of(specs[path], split_kv_a) for path in updates}
        scaled = {path: u.astype(jnp.float32) * scale_vector(specs[path], layouts[path], rule) for path, u in updates.items()}
        return scaled, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def leave_idle_experts(specs: Specs) -> optax.GradientTransformationExtraArgs:
    """No direction for an expert that no token of the step's batch reached. Its gradient is zero, and what is left of its
    momentum says little, but has the size of any other once it is orthogonal: it would go on in its old direction for some
    1,500 steps, until float32 has no smaller number. Momentum and weight decay go on."""

    def update(updates, state, params=None, *, expert_counts: Num[Array, "L E"] | None = None, **_):
        experts = [path for path in updates if is_expert(specs[path])] if expert_counts is not None else []
        owners = sorted({layer for path in experts for layer in specs[path].layers})
        busy = {}
        for path in experts:
            spec, rows = specs[path], [owners.index(layer) for layer in specs[path].layers]
            of_layers = expert_counts if len(rows) == len(owners) else expert_counts[jnp.array(rows)]
            shape = [n if axis in ("layers", "experts") else 1 for n, axis in zip(spec.shape, spec.axes)]
            busy[path] = (of_layers > 0).reshape(shape)
        return updates | {path: jnp.where(busy[path], updates[path], 0.0) for path in experts}, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
