"""Newton-Schulz over a tree of sharded arrays, as the plan says.

The body runs per device inside `jax.shard_map`, so the collectives in the compiled program are the ones written
here: none for LOCAL, one `all_to_all` out and one back for ALL_TO_ALL, and so on. Nothing is left to the partitioner,
and Auto and Explicit meshes compile to the same program.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from optim.matrices import MatrixLayout
from optim.newton_schulz import newton_schulz_cut
from optim.plan import STACK_BYTES, Group, Member, Strategy, exchanges


def _chunk(count: int, bytes_each: int, limit: int) -> int:
    """Largest divisor of `count` whose matrices fit the limit, at least 1."""
    fits = max(1, limit // max(bytes_each, 1))
    return max(d for d in range(1, min(count, fits) + 1) if count % d == 0)


def _in_place(x: Array, chunk: int, body: Callable[[Array], Array]) -> Array:
    """body over slices of the leading axis, each result written over its input: one buffer in all."""
    if chunk == x.shape[0]:
        return body(x)

    def step(i, x):
        start = i * chunk
        return lax.dynamic_update_slice_in_dim(x, body(lax.dynamic_slice_in_dim(x, start, chunk)), start, 0)

    return lax.fori_loop(0, x.shape[0] // chunk, step, x)


def _where_it_lies(x: Array, layout: MatrixLayout, group: Group) -> Array:
    """One array with whole matrices, in chunks over its leading batch axes (merging them is free on one device)."""
    lead = layout.lead
    shape = x.shape
    merged = x.reshape(math.prod(shape[:lead]), *shape[lead:])
    inner = MatrixLayout(
        *[tuple(a - lead + 1 for a in axes if a >= lead) for axes in (layout.batch, layout.rows, layout.cols)], layout.splits
    )
    inner = MatrixLayout((0,) + inner.batch, inner.rows, inner.cols, inner.splits)

    def body(part: Array) -> Array:
        return inner.assemble([form(b) for form, b in zip(group.forms, inner.blocks(part))], part.shape)

    each = math.prod(shape[lead:]) * x.dtype.itemsize
    return _in_place(merged, _chunk(merged.shape[0], each, group.chunk), body).reshape(shape)


def _pack(x: Array, member: Member, group: Group, mesh: Mesh | None) -> Array:
    """A device's pieces as [matrices, one axis per row factor, one per column factor]."""
    layout = member.layout
    order = layout.batch + (layout.cols + layout.rows if member.flip else layout.rows + layout.cols)
    return x.transpose(order).reshape(-1, *_local_sizes(group, mesh))


def _unpack(x: Array, member: Member, shape: tuple[int, ...]) -> Array:
    layout = member.layout
    order = layout.batch + (layout.cols + layout.rows if member.flip else layout.rows + layout.cols)
    return x.reshape([shape[a] for a in order]).transpose([order.index(i) for i in range(len(order))])


def _parts(mesh: Mesh | None, names: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[a] for a in names) if names else 1


def _local_sizes(group: Group, mesh: Mesh | None) -> list[int]:
    return [size // _parts(mesh, names) for size, names in group.rows + group.cols]


def _join(pieces: Array, group: Group, mesh: Mesh) -> Array:
    """[shards, matrices, local factors...] with the sender first, to [matrices, whole factors...]."""
    factors = group.rows + group.cols
    spread = pieces.reshape(*[mesh.shape[a] for a in group.axes], *pieces.shape[1:])
    first = len(group.axes)
    order = [first]
    for i, (_, names) in enumerate(factors):
        order += [group.axes.index(a) for a in names] + [first + 1 + i]
    return spread.transpose(order).reshape(pieces.shape[1], *[size for size, _ in factors])


def _cut(whole: Array, group: Group, mesh: Mesh) -> Array:
    """Inverse of `_join`."""
    factors = group.rows + group.cols
    sizes, place, at = [whole.shape[0]], {}, 1
    locals_at = []
    for size, names in factors:
        for a in names:
            place[a], at = at, at + 1
            sizes.append(mesh.shape[a])
        locals_at.append(at)
        at += 1
        sizes.append(size // _parts(mesh, names))
    order = [place[a] for a in group.axes] + [0] + locals_at
    spread = whole.reshape(sizes).transpose(order)
    return spread.reshape(group.shards, whole.shape[0], *[sizes[i] for i in locals_at])


def _whole_matrices(x: Array, group: Group) -> Array:
    """[matrices, whole factors...], orthogonalised in chunks."""
    rows, cols = len(group.rows), len(group.cols)
    layout = MatrixLayout((0,), tuple(range(1, 1 + rows)), tuple(range(1 + rows, 1 + rows + cols)), group.splits)
    return _where_it_lies(x, layout, group)


def _exchange(groups: list[Group], arrays: list[list[Array]], mesh: Mesh) -> list[list[Array]]:
    """Pieces of all matrices to their owners, whole matrices orthogonalised there, and pieces back: two all-to-alls.

    Row d of what a device sends goes to device d. The owners of a group are neighbours, each row is filled with zeros up
    to what the fullest owner receives, and an owner works on its own group only.
    """
    first = groups[0]
    stacks = [
        jnp.concatenate([_pack(x, member, group, mesh) for x, member in zip(xs, group.members)])
        for group, xs in zip(groups, arrays)
    ]
    width = max(group.count_per_device * stack[0].size for group, stack in zip(groups, stacks))
    rows = [
        _filled(stack, group.owners * group.count_per_device).reshape(group.owners, -1) for group, stack in zip(groups, stacks)
    ]
    send = _filled(jnp.concatenate([_filled(row, width, axis=1) for row in rows]), first.shards)

    def own(group: Group, stack: Array) -> Callable[[Array], Array]:
        def work(received: Array) -> Array:
            used = group.count_per_device * stack[0].size
            pieces = received[:, :used].reshape(group.shards, group.count_per_device, *stack.shape[1:])
            whole = _whole_matrices(_join(pieces, group, mesh), group)
            return _filled(_cut(whole, group, mesh).reshape(group.shards, used), width, axis=1)

        return work

    branches = [own(group, stack) for group, stack in zip(groups, stacks)]
    received = lax.all_to_all(send, first.axes, 0, 0)
    if len(groups) == 1:
        done = branches[0](received)
    else:
        idle = first.shards - sum(group.owners for group in groups)
        of_place = np.repeat(np.arange(len(groups) + 1), [*(group.owners for group in groups), idle])
        mine = jnp.asarray(of_place)[lax.axis_index(first.axes)]
        done = lax.switch(mine, [*branches, lambda nothing: nothing], received)
    back = lax.all_to_all(done, first.axes, 0, 0)
    out = []
    for group, stack, xs in zip(groups, stacks, arrays):
        mine = back[group.first : group.first + group.owners, : group.count_per_device * stack[0].size]
        out.append(_separate(mine.reshape(-1, *stack.shape[1:])[: len(stack)], zip(xs, group.members)))
    return out


def _filled(x: Array, size: int, axis: int = 0) -> Array:
    """Zeros appended along an axis up to `size`."""
    return jnp.pad(x, [(0, size - n if a == axis else 0) for a, n in enumerate(x.shape)])


def _gather(group: Group, arrays: list[Array], mesh: Mesh) -> list[Array]:
    (x,), (member,) = arrays, group.members
    pieces = lax.all_gather(_pack(x, member, group, mesh), group.axes)
    whole = _whole_matrices(_join(pieces, group, mesh), group)
    mine = _cut(whole, group, mesh)[lax.axis_index(group.axes)]
    return [_unpack(mine, member, x.shape)]


def _two_dimensional(group: Group, arrays: list[Array], mesh: Mesh) -> list[Array]:
    """[matrices, m / p, n / q] to whole rows and columns cut p * q ways, the iteration there, and back."""
    packed = [_pack(x, member, group, mesh) for x, member in zip(arrays, group.members)]
    stack = jnp.concatenate(packed) if len(packed) > 1 else packed[0]
    over = group.row_axes
    x = lax.all_to_all(stack, over, 2, 1, tiled=True) if over else stack
    x = newton_schulz_cut(x, group.coeffs, group.axes, x.dtype)
    x = lax.all_to_all(x, over, 1, 2, tiled=True) if over else x
    return _separate(x, zip(arrays, group.members))


def _separate(stack: Array, members: Iterable[tuple[Array, Member]]) -> list[Array]:
    """The results of a stack, back in the shapes of the arrays it was made of."""
    out, start = [], 0
    for x, member in members:
        count = x.size // math.prod(stack.shape[1:])
        out.append(_unpack(stack[start : start + count], member, x.shape))
        start += count
    return out


def _local(group: Group, arrays: list[Array]) -> list[Array]:
    """Small arrays are stacked into one batch; a larger one keeps the device busy by itself and is not copied."""
    pairs = list(zip(arrays, group.members))
    small = [pair for pair in pairs if pair[0].size * pair[0].dtype.itemsize <= STACK_BYTES]
    done = {}
    if len(small) > 1:
        whole = _whole_matrices(jnp.concatenate([_pack(x, member, group, None) for x, member in small]), group)
        done = {member.path: y for (_, member), y in zip(small, _separate(whole, small))}
    return [done[member.path] if member.path in done else _where_it_lies(x, member.layout, group) for x, member in pairs]


def orthogonalize_tree(
    tree: Mapping[str, Array],
    plan: tuple[Group, ...],
    *,
    mesh: Mesh | None = None,
    shardings: Mapping[str, NamedSharding] | None = None,
) -> dict[str, Array]:
    """Every logical matrix of `tree` replaced by its orthogonal factor; shapes, dtypes and shardings stay."""

    def body(tree: dict[str, Array]) -> dict[str, Array]:
        out = {}

        def done(group: Group, results: list[Array]) -> None:
            out.update({member.path: x for member, x in zip(group.members, results)})

        def arrays(group: Group) -> list[Array]:
            return [tree[member.path] for member in group.members]

        for together in exchanges(plan):
            for group, results in zip(together, _exchange(together, list(map(arrays, together)), mesh)):
                done(group, results)
        for group in plan:
            if group.strategy is Strategy.LOCAL:
                done(group, _local(group, arrays(group)))
            elif group.strategy is Strategy.TWO_DIMENSIONAL:
                done(group, _two_dimensional(group, arrays(group), mesh))
            elif group.strategy is Strategy.GATHER:
                done(group, _gather(group, arrays(group), mesh))
        return out

    if mesh is None or mesh.size == 1:
        return body(dict(tree))
    layout = {path: shardings[path].spec for path in tree}
    return jax.shard_map(body, mesh=mesh, in_specs=(layout,), out_specs=layout, check_vma=False)(dict(tree))
