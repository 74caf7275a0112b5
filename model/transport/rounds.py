"""Work on more rows than a buffer holds: in rounds, as many as this batch's routing needs.

A buffer for the worst routing would be up to `expert` times as large as the usual one. Buffers here have room for SLACK
times the mean, and what does not fit goes in further rounds of the same shape: usually there are none, a skewed router
makes a step slower, and nothing is ever dropped. A loop of unknown length has no gradient of its own, so the backward
pass is written as what it is: the sum of the rounds' gradients, each with its forward pass repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

SLACK = 1.25
"""Room in a buffer over the mean load of a device. A device holds several experts, whose loads even out."""

OVERFLOW = "overflow"
"""Name scope of the loop over all rounds but the first: who counts operations in a program reads it as not run."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Window:
    """The pairs of one round. slot_of: their slots among destinations * capacity, or that number for pairs of other
    rounds. pair_of: the pair in each slot, in order of tokens and choices; token_of: its token. Free slots have pair 0
    and token N. platform: as in model/dispatch.py."""

    slot_of: Int[Array, "N K"]
    token_of: Int[Array, "M"]
    pair_of: Int[Array, "M"]
    taken: Bool[Array, "M"]
    platform: str = field(metadata={"static": True})
    in_order: ClassVar[bool] = False

    def fill(self, values_NK: Array, otherwise) -> Array:
        """The pairs' values in their slots."""
        return jnp.where(self.taken, values_NK.reshape(-1)[self.pair_of], otherwise)


class Queues(NamedTuple):
    """(token, choice) pairs in line for each of a few destinations. order: pairs by destination; start, count: where each
    destination's lie in it; rank: a pair's place in its line, negative for pairs that go nowhere."""

    order: Int[Array, "N*K"]
    start: Int[Array, "P"]
    count: Int[Array, "P"]
    destination: Int[Array, "N K"]
    rank: Int[Array, "N K"]

    def window(self, number: Int[Array, ""], capacity: int, platform: str) -> Window:
        """Places number * capacity ... of every line."""
        first, ways, K = number * capacity, len(self.count), self.rank.shape[1]
        inside = (self.rank >= first) & (self.rank < first + capacity)
        slot_of = jnp.where(inside, self.destination * capacity + self.rank - first, ways * capacity)
        place = first + jnp.arange(capacity)
        taken = (place < self.count[:, None]).reshape(-1)
        at = jnp.where(taken, (self.start[:, None] + place).reshape(-1), 0)
        pair_of = jnp.where(taken, self.order[at], 0)
        return Window(slot_of, jnp.where(taken, pair_of // K, len(self.rank)), pair_of, taken, platform)


def queues(destination_NK: Int[Array, "N K"], ways: int) -> Queues:
    """Lines in order of tokens; destination `ways` stands for nowhere."""
    flat = destination_NK.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    count = jnp.zeros(ways + 1, jnp.int32).at[flat].add(1)
    start = jnp.cumsum(count) - count
    rank = jnp.zeros(flat.size, jnp.int32).at[order].set(jnp.arange(flat.size), unique_indices=True) - start[flat]
    rank = jnp.where(flat < ways, rank, -1)
    return Queues(order, start[:ways], count[:ways], destination_NK, rank.reshape(destination_NK.shape))


def room(mean: float, worst: int) -> int:
    """Capacity of a buffer with this mean load: SLACK more, a multiple of 8, at most the worst case."""
    return min(max(-(-int(mean * SLACK) // 8) * 8, 8), worst)


def total(one_round: Callable[[Array, Any, Any], Array], count: Int[Array, ""] | int, variables: Any, constants: Any) -> Array:
    """sum of one_round(r, variables, constants) over r < count. `count` 1 is known not to need a loop. Where one_round
    communicates, all devices must agree on the count."""
    if isinstance(count, int):
        return one_round(jnp.int32(0), variables, constants)
    return _total(one_round, count, variables, constants)


def _sum(of_round: Callable[[Array], Any], count: Array) -> Any:
    def more(state):
        number, so_far = state
        return number + 1, jax.tree.map(jnp.add, so_far, of_round(number))

    first = of_round(jnp.int32(0))
    with jax.named_scope(OVERFLOW):
        return lax.while_loop(lambda state: state[0] < count, more, (jnp.int32(1), first))[1]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(one_round, count, variables, constants):
    return _sum(lambda number: one_round(number, variables, constants), count)


def _forward(one_round, count, variables, constants):
    return _total(one_round, count, variables, constants), (count, variables, constants)


def _backward(one_round, saved, g):
    count, variables, constants = saved

    def gradient(number):
        return jax.vjp(lambda v: one_round(number, v, constants), variables)[1](g)[0]

    return None, _sum(gradient, count), None


_total.defvjp(_forward, _backward)
