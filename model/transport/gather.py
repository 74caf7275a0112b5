"""All tokens of the group to every device, reduce-scatter back: no buffers to balance, and every device moves the same."""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
from jaxtyping import Array

from model import experts
from model.grouped_matmul import grouped_matmul
from model.shards import Shards
from model.transport import rounds

AXIS = ("expert",)


PIECES = 4
"""At most, of a device's tokens: experts work on one while the next is on its way to them and the last on its way back."""

ROWS_FOR_A_WEIGHT = 1024
"""Rows of an expert below which a piece would read weights for too little work."""


def all_gather(x_ND: Array, experts_NK: Array, gates_NK: Array, weights: experts.Weights, shards: Shards, platform: str) -> Array:
    """See model/transport/. In pieces where collectives run beside other work, which they do on TPUs."""
    count = pieces(*experts_NK.shape, len(weights[1]), platform)
    parts = zip(*(jnp.split(a, count) for a in (x_ND, experts_NK, gates_NK)))
    return jnp.concatenate([_piece(*part, weights, shards, platform) for part in parts])


def pieces(N: int, K: int, held: int, platform: str) -> int:
    """Into how many pieces N tokens are cut whose N * K pairs, and as many of every other device, meet `held` experts here."""
    wanted = min(PIECES, N * K // held // ROWS_FOR_A_WEIGHT) if platform == "tpu" else 1
    return max(n for n in range(1, max(wanted, 1) + 1) if N % n == 0)


def _piece(x_ND: Array, experts_NK: Array, gates_NK: Array, weights: experts.Weights, shards: Shards, platform: str) -> Array:
    """Here N grows to the tokens of all `expert` devices; the pairs that concern this device's experts go through a buffer of
    SLACK * N * K rows, in rounds that other devices need not have."""
    ways, held, (N, K) = shards.size(*AXIS), len(weights[1]), experts_NK.shape
    x, chosen, gates = (shards.gather_axis(a, AXIS, 0) for a in (x_ND, experts_NK, gates_NK))
    chosen = chosen - shards.index(*AXIS) * held
    mine = (chosen >= 0) & (chosen < held)
    lines = rounds.queues(jnp.where(mine, 0, 1), 1)
    worst = ways * N * min(K, held)
    capacity = rounds.room(N * K, worst)
    count = 1 if capacity == worst else -(-lines.count[0] // capacity)
    one_round = partial(_round, capacity=capacity, filled=min(N * K / capacity, 1.0), platform=platform)
    found = rounds.total(one_round, count, (x, gates, weights), (lines, chosen))
    return shards.scatter_axis(found, AXIS, 0)


def _round(number, variables, constants, *, capacity: int, filled: float, platform: str) -> Array:
    """[tokens, D]: what the experts here add, for one buffer of pairs. Tokens are copied straight into their experts' slots,
    and rows added to their tokens, not collected per token: that would be K rows for every token of the group. Padding gets
    some token's row, with gate 0. A token has few rows here, so they are added in the compute dtype, like the devices'
    results afterwards."""
    (x, gates, weights), (lines, chosen) = variables, constants
    window = lines.window(number, capacity, platform)
    expert, gate = (window.fill(a, otherwise)[:, None] for a, otherwise in ((chosen, len(weights[1])), (gates, 0.0)))
    to = experts.slots(expert, weights, platform)
    token_of = jnp.append(window.token_of, len(x))[to.token_of]

    def first(gate_up, to, name):
        return grouped_matmul(jnp.take(x, token_of, axis=0, mode="clip"), gate_up, to.block_expert, name)

    out = experts.in_slots(first, gate, weights, to, platform, filled)
    return jnp.zeros(x.shape, out.dtype).at[token_of].add(out, mode="drop")
