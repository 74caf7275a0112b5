"""All tokens of the group to every device, reduce-scatter back: no buffers to balance, and every device moves the same."""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from jaxtyping import Array

from model import experts
from model.shards import Shards
from model.transport import rounds

AXIS = ("expert",)


def all_gather(x_ND: Array, experts_NK: Array, gates_NK: Array, weights: experts.Weights, shards: Shards, platform: str
               ) -> Array:
    """See model/transport/. Here N grows to the tokens of all `expert` devices; the pairs that concern this device's
    experts go through a buffer of SLACK * N * K rows, in rounds that other devices need not have."""
    ways, held, (N, K) = shards.size(*AXIS), len(weights[1]), experts_NK.shape
    x, chosen, gates = (shards.gather_axis(a, AXIS, 0) for a in (x_ND, experts_NK, gates_NK))
    chosen = chosen - shards.index(*AXIS) * held
    mine = (chosen >= 0) & (chosen < held)
    lines = rounds.queues(jnp.where(mine, 0, 1), 1)
    worst = ways * N * min(K, held)
    capacity = rounds.room(N * K, worst)
    count = 1 if capacity == worst else -(-lines.count[0] // capacity)
    one_round = partial(_round, capacity=capacity, platform=platform)
    found = rounds.total(one_round, count, (x, gates, weights), (lines, chosen))
    return shards.scatter_axis(found.astype(x_ND.dtype), AXIS, 0)


def _round(number, variables, constants, *, capacity: int, platform: str) -> Array:
    """float32 [tokens, D]: what the experts here add, for one buffer of pairs. Rows are added to their tokens, not
    collected per token: that would be K rows for every token of the group."""
    (x, gates, weights), (lines, chosen) = variables, constants
    window = lines.window(number, capacity)
    rows = jnp.take(x, window.token_of, axis=0, mode="fill", fill_value=0)
    expert, gate = window.fill(chosen, len(weights[1]) - 1), window.fill(gates, 0.0)
    out = experts.apply(rows, expert[:, None], gate[:, None], weights, platform)
    return jnp.zeros(x.shape, jnp.float32).at[window.token_of].add(out.astype(jnp.float32), mode="drop")
