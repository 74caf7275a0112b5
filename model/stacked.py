"""The stacked layers as a loop whose gradient is added, layer by layer, to sums that are kept elsewhere.

Autodiff of `lax.scan` returns the gradients of all layers as one new array, to be added to the sum of earlier microbatches:
two copies of every gradient. Here the backward loop adds a layer's gradient to its place in the sum as soon as it has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

Body = Callable[[Array, Any, Array, Any], tuple[Array, Any]]
"""(x, layer, its number, setting) -> (x, measured). A setting has no gradient."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sums:
    """layers: as the stacked layers, the sums so far. add(sum, gradient, seed, index) -> their sum, in the sum's
    dtype, all [1, ...]; every layer of every array has an index of its own."""

    layers: Any
    seed: Any
    add: Callable = field(metadata={"static": True})


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def run(body: Body, unroll: bool, x: Array, layers: Any, sums: Sums, setting: Any) -> tuple[Array, Any]:
    """lax.scan of `body` over `layers`. In place of a gradient of `layers` there is none; the "gradient" of `sums.layers` is
    sums.layers with it added."""
    return lax.scan(lambda x, numbered: body(x, *numbered, setting), x, numbered(layers), unroll=unroll)


def numbered(layers: Any) -> tuple[Any, Array]:
    """Stacked layers and their numbers, for a loop over both."""
    return layers, jnp.arange(len(jax.tree.leaves(layers)[0]))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Saved:
    """kept: what the backward pass of every layer needs besides its weights and the setting, stacked. tree: how to put all
    together; there: for each leaf, which array of the layer and the setting it is, None where it is kept."""

    kept: list[Array]
    layers: Any
    setting: Any
    sums: Sums
    tree: Any = field(metadata={"static": True})
    there: tuple[int | None, ...] = field(metadata={"static": True})


def _forward(body, unroll, x, layers, sums, setting):
    found = {}

    def step(x, layer_and_number):
        layer, number = layer_and_number
        arrays = jax.tree.leaves((layer, setting))
        out, pull = jax.vjp(lambda layer, x: body(x, layer, number, setting), layer, x)
        leaves, found["tree"] = jax.tree.flatten(pull)
        # Weights and setting are among what a layer's backward pass needs: they are there already, and must not be stacked again.
        found["there"] = tuple(next((i for i, a in enumerate(arrays) if leaf is a), None) for leaf in leaves)
        return out[0], (out[1], [leaf for leaf, at in zip(leaves, found["there"]) if at is None])

    x, (measured, kept) = lax.scan(step, x, numbered(layers), unroll=unroll)
    return (x, measured), _Saved(kept, layers, setting, sums, found["tree"], found["there"])


def _backward(body, unroll, saved, gradients):
    def step(carry, of_layer):
        dx, totals = carry
        (layer, index), kept, measured = of_layer
        arrays, rest = jax.tree.leaves((layer, saved.setting)), iter(kept)
        pull = saved.tree.unflatten([next(rest) if at is None else arrays[at] for at in saved.there])
        of_weights, dx = pull((dx, measured))

        tree = jax.tree.structure(totals)

        def into(number, total, gradient):
            # The layer's axis stays, because of the same shape XLA reads, adds and writes in one pass; it copies the layer
            # first where the shapes differ.
            place = index * tree.num_leaves + number
            mine = saved.sums.add(lax.dynamic_slice_in_dim(total, index, 1), gradient[None], saved.sums.seed, place)
            return lax.dynamic_update_slice_in_dim(total, mine, index, 0)

        return (dx, jax.tree.map(into, tree.unflatten(range(tree.num_leaves)), totals, of_weights)), None

    dx, measured = gradients
    of_layers = numbered(saved.layers), saved.kept, measured
    (dx, totals), _ = lax.scan(step, (dx, saved.sums.layers), of_layers, reverse=True, unroll=unroll)
    return dx, None, Sums(totals, None, saved.sums.add), None


run.defvjp(_forward, _backward)
