"""One device's part of the arrays, and what it takes to work with the rest.

Training runs the network inside `jax.shard_map` over the whole mesh (train/step.py): every array here is what one device
holds, and nothing moves unless a layer says so with one of the methods below. Their gradients are their adjoints, so the
gradient of the sum of all devices' losses comes out of plain autodiff, each device with its part:

    gather       <->  reduce-scatter          total  <->  total          exchange  <->  exchange back

On one device, and outside shard_map, all of them return their argument.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from configs.param_spec import ParamSpec
from configs.sharding import Partition, partition


@dataclass(frozen=True)
class Shards:
    """sizes: (mesh axis, devices along it), every axis of the mesh; empty on one device."""

    sizes: tuple[tuple[str, int], ...] = ()

    def size(self, *axes: str) -> int:
        """Devices along these axes together."""
        return math.prod(dict(self.sizes).get(axis, 1) for axis in axes)

    def split(self, axes: tuple[str, ...]) -> tuple[str, ...]:
        """Those of the axes along which there is more than one device."""
        return tuple(axis for axis in axes if self.size(axis) > 1)

    def index(self, *axes: str) -> Array | int:
        """This device's place along these axes, the first the major one."""
        present = self.split(axes)
        return lax.axis_index(present) if present else 0

    def stored(self, spec: ParamSpec) -> Partition:
        """The mesh axes that split each dimension of a stored parameter."""
        return partition(spec, dict(self.sizes)) if self.sizes else ((),) * len(spec.axes)

    def kept(self, spec: ParamSpec) -> Partition:
        """The same during the forward pass: heads, hidden widths and the vocabulary over tensor, experts over expert."""
        keeps = {axis: {"tensor"} for axis in spec.axes} | ({"experts": {"expert"}} if spec.on_grid else {})
        return tuple(tuple(a for a in axes if a in keeps[axis]) for axis, axes in zip(spec.axes, self.stored(spec)))

    def gather(self, w: Array, spec: ParamSpec, joined: bool = False) -> Array:
        """A parameter's part as the forward pass needs it; leading stacked axes of the spec may be sliced away.

        `joined`: the last two axes as one, of which the first is never stored in parts. A TPU copies what it joins, so that
        is done to the part, before it moves. Where the last axis is stored in parts, its pieces are gathered one by one.
        """
        moves = [tuple(a for a in stored if a not in kept) for stored, kept in zip(self.stored(spec), self.kept(spec))]
        if not joined:
            return self._moved(w, moves)
        del moves[-2]
        if moves[-1]:
            return jnp.concatenate([self._moved(w[..., i, :], moves) for i in range(w.shape[-2])], axis=-1)
        return self._moved(w.reshape(*w.shape[:-2], -1), moves)

    def _moved(self, w: Array, moves: list[tuple[str, ...]]) -> Array:
        """Gathered over the mesh axes that each of its last dimensions moves over."""
        for dim, over in enumerate(moves, start=w.ndim - len(moves)):
            w = self.gather_axis(w, over, dim)
        return w

    def gathers(self, spec: ParamSpec) -> bool:
        """Whether `gather` moves anything."""
        return self.stored(spec) != self.kept(spec)

    def gather_axis(self, x: Array, axes: tuple[str, ...], dim: int) -> Array:
        """The parts of all devices along these mesh axes, one behind the other on one dimension."""
        over = self.split(axes)
        return lax.all_gather(x, over, axis=dim, tiled=True) if over else x

    def scatter_axis(self, x: Array, axes: tuple[str, ...], dim: int) -> Array:
        """The sum over devices, of which each keeps its part of one dimension: the adjoint of `gather_axis`."""
        over = self.split(axes)
        return lax.psum_scatter(x, over, scatter_dimension=dim, tiled=True) if over else x

    def total(self, x: Array, axes: tuple[str, ...]) -> Array:
        """The sum over devices."""
        over = self.split(axes)
        return lax.psum(x, over) if over else x

    def total_gradient(self, g: Array, spec: ParamSpec) -> Array:
        """A parameter's gradient over all devices that store the same part of it."""
        stored = {axis for axes in self.stored(spec) for axis in axes}
        return self.total(g, tuple(axis for axis, _ in self.sizes if axis not in stored))

    def total_over_tensor(self, x: Array, spec: ParamSpec) -> Array:
        """The sum of products whose inner dimension `spec` keeps in parts over tensor."""
        return self.total(x, ("tensor",)) if any("tensor" in axes for axes in self.kept(spec)) else x

    def largest(self, x: Array, axes: tuple[str, ...]) -> Array:
        """The maximum over devices; carries no gradient."""
        over = self.split(axes)
        return lax.pmax(lax.stop_gradient(x), over) if over else lax.stop_gradient(x)

    # ---- positions: a row is cut into 2 * context chunks, and device i holds chunks i and 2 * context - 1 - i, so that
    # every device has an early and a late one and causal attention is the same work on all of them.

    def own_positions(self, x: Array, dim: int) -> Array:
        """This device's two chunks of a whole row."""
        ways = self.size("context")
        if ways == 1:
            return x
        chunk, mine = x.shape[dim] // (2 * ways), self.index("context")
        early, late = (lax.dynamic_slice_in_dim(x, at * chunk, chunk, dim) for at in (mine, 2 * ways - 1 - mine))
        return jnp.concatenate([early, late], dim)

    def all_positions(self, x: Array, dim: int) -> Array:
        """The whole row from every device's two chunks, in order."""
        ways = self.size("context")
        if ways == 1:
            return x
        chunks = jnp.split(self.gather_axis(x, ("context",), dim), 2 * ways, dim)
        return jnp.concatenate(chunks[::2] + chunks[::-2], dim)


ONE_DEVICE = Shards()


def shards_of(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh | None) -> Shards:
    """ONE_DEVICE for no mesh and for a mesh of one device."""
    return ONE_DEVICE if mesh is None or mesh.size == 1 else Shards(tuple(mesh.shape.items()))
