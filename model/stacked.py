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

Body = Callable[[Array, Any, Any], tuple[Array, Any]]
"""(x, layer, setting) -> (x, measured)."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sums:
    """layers: as the stacked layers, the sums so far. add(sum, gradient, seed, index) -> their sum, in the sum's
    dtype; every layer of every array has an index of its own."""

    layers: Any
    seed: Any
    add: Callable = field(metadata={"static": True})


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def run(body: Body, unroll: bool, x: Array, layers: Any, sums: Sums, setting: Any) -> tuple[Array, Any]:
    """lax.scan of `body` over `layers`. In place of a gradient of `layers` there is none; the "gradient" of `sums.layers` is
    sums.layers with it added."""
    return lax.scan(lambda x, layer: body(x, layer, setting), x, layers, unroll=unroll)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Saved:
    """kept: what the backward pass of every layer needs besides its weights, stacked. tree: how to put both together;
    weights: for each leaf, which array of the layer it is, None where it is kept."""

    kept: list[Array]
    layers: Any
    sums: Sums
    tree: Any = field(metadata={"static": True})
    weights: tuple[int | None, ...] = field(metadata={"static": True})


def _forward(body, unroll, x, layers, sums, setting):
    found = {}

    def step(x, layer):
        arrays = jax.tree.leaves(layer)
        out, pull = jax.vjp(lambda layer, x: body(x, layer, setting), layer, x)
        leaves, found["tree"] = jax.tree.flatten(pull)
        # A layer's weights are among what its backward pass needs: they are there already, and must not be stacked again.
        found["weights"] = tuple(next((i for i, w in enumerate(arrays) if leaf is w), None) for leaf in leaves)
        return out[0], (out[1], [leaf for leaf, at in zip(leaves, found["weights"]) if at is None])

    x, (measured, kept) = lax.scan(step, x, layers, unroll=unroll)
    return (x, measured), _Saved(kept, layers, sums, found["tree"], found["weights"])


def _backward(body, unroll, saved, gradients):
    def step(carry, of_layer):
        dx, totals = carry
        layer, kept, measured, index = of_layer
        arrays, rest = jax.tree.leaves(layer), iter(kept)
        pull = saved.tree.unflatten([next(rest) if at is None else arrays[at] for at in saved.weights])
        of_weights, dx = pull((dx, measured))

        tree = jax.tree.structure(totals)

        def into(number, total, gradient):
            mine = saved.sums.add(
                lax.dynamic_index_in_dim(total, index, keepdims=False),
                gradient,
                saved.sums.seed,
                index * tree.num_leaves + number,
            )
            return lax.dynamic_update_index_in_dim(total, mine, index, 0)

        return (dx, jax.tree.map(into, tree.unflatten(range(tree.num_leaves)), totals, of_weights)), None

    dx, measured = gradients
    count = len(jax.tree.leaves(saved.layers)[0])
    (dx, totals), _ = lax.scan(
        step, (dx, saved.sums.layers), (saved.layers, saved.kept, measured, jnp.arange(count)), reverse=True, unroll=unroll
    )
    return dx, None, Sums(totals, None, saved.sums.add), None


run.defvjp(_forward, _backward)
