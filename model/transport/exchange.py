"""Every (token, expert) pair to the device of its expert, and its result back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from configs.sharding import AXES
from model import dispatch, experts
from model.shards import Shards
from model.transport import rounds

AXIS = "expert"


def all_to_all(x_ND: Array, experts_NK: Array, gates_NK: Array, weights: experts.Weights, shards: Shards, platform: str) -> Array:
    """See model/transport/. A round moves [expert, capacity] rows out and back, the padding with them."""
    return _transport(_padded, x_ND, experts_NK, gates_NK, weights, shards, platform)


def ragged_all_to_all(
    x_ND: Array, experts_NK: Array, gates_NK: Array, weights: experts.Weights, shards: Shards, platform: str
) -> Array:
    """See model/transport/. The same buffers; only rows that are there move. Not on CPU, where XLA has none."""
    return _transport(_ragged, x_ND, experts_NK, gates_NK, weights, shards, platform)


def _padded(x: Float[Array, "P C D"], send: Int[Array, "P"], receive: Int[Array, "P"], shards: Shards) -> Array:
    """Part p to device p; what comes from device p is part p of the result."""
    return lax.all_to_all(x, AXIS, 0, 0, tiled=True)


def _ragged(x: Float[Array, "P C D"], send: Int[Array, "P"], receive: Int[Array, "P"], shards: Shards) -> Array:
    """The same, of the first `send[p]` rows of part p; `receive[p]` rows come from device p, the rest is zero."""
    ways, capacity, D = x.shape
    starts = capacity * jnp.arange(ways, dtype=jnp.int32)
    landing = jnp.full(ways, capacity * shards.index(AXIS), jnp.int32)
    flat = x.reshape(-1, D)
    out = lax.ragged_all_to_all(flat, jnp.zeros_like(flat), starts, send, landing, receive, axis_name=AXIS)
    return out.reshape(x.shape)


def _transport(exchange: Callable, x_ND, experts_NK, gates_NK, weights: experts.Weights, shards: Shards, platform: str):
    ways, held, (N, K) = shards.size(AXIS), len(weights[1]), experts_NK.shape
    lines = rounds.queues(experts_NK // held, ways)
    worst = N * min(K, held)
    capacity = rounds.room(N * K / ways, worst)
    # Every device goes as many rounds as the fullest line anywhere needs: all of them take part in every exchange.
    count = 1 if capacity == worst else -(-shards.largest(jnp.max(lines.count), AXES) // capacity)
    one_round = partial(_round, capacity=capacity, exchange=exchange, shards=shards, platform=platform)
    return rounds.total(one_round, count, (x_ND, gates_NK, weights), (lines, experts_NK % held))


def _round(number, variables, constants, *, capacity: int, exchange: Callable, shards: Shards, platform: str) -> Array:
    (x, gates, weights), (lines, local) = variables, constants
    ways, D = len(lines.count), x.shape[-1]
    window = lines.window(number, capacity, platform)
    send = jnp.clip(lines.count - number * capacity, 0, capacity)
    receive = lax.all_to_all(send, AXIS, 0, 0, tiled=True)
    gate, expert = (
        lax.all_to_all(a.reshape(ways, capacity), AXIS, 0, 0, tiled=True).reshape(-1, 1)
        for a in (window.fill(gates, 0.0), window.fill(local, len(weights[1])))
    )
    rows = exchange(dispatch.to_slots(x, window).reshape(ways, capacity, D), send, receive, shards).reshape(-1, D)
    filled = min(lines.rank.size / (ways * capacity), 1.0)
    out = experts.apply(rows, expert, gate, weights, platform, filled)
    back = exchange(out.reshape(ways, capacity, D), receive, send, shards).reshape(-1, D)
    return dispatch.from_slots(back, window)
