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
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from optim import plan as plan_file
from optim.matrices import MatrixLayout
from optim.newton_schulz import newton_schulz_cut
from optim.plan import Group, Member, Strategy


def _chunk(count: int, bytes_each: int) -> int:
    """Largest divisor of `count` whose matrices fit CHUNK_BYTES, at least 1."""
    fits = max(1, plan_file.CHUNK_BYTES // max(bytes_each, 1))
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
    inner = MatrixLayout(*[tuple(a - lead + 1 for a in axes if a >= lead)
                           for axes in (layout.batch, layout.rows, layout.cols)], layout.splits)
    inner = MatrixLayout((0,) + inner.batch, inner.rows, inner.cols, inner.splits)

    def body(part: Array) -> Array:
        return inner.assemble([form(b) for form, b in zip(group.forms, inner.blocks(part))], part.shape)

    each = math.prod(shape[lead:]) * x.dtype.itemsize
    return _in_place(merged, _chunk(merged.shape[0], each), body).reshape(shape)


def _pack(x: Array, member: Member, group: Group, mesh: Mesh | None) -> Array:
    """A device's pieces as [matrices, one axis per row factor, one per column factor]."""
    layout = member.layout
    order = layout.batch + (layout.cols + layout.rows if member.flip else layout.rows + layout.cols)
    return x.transpose(order).reshape(-1, *_local_sizes(group, mesh))


def _unpack(x: Array, member: Member, shape: tuple[int, ...]) -> Array:
    layout = member.layout
    order = layout.batch + (layout.cols + layout.rows if member.flip else layout.rows + layout.cols)
    return x.reshape([shape[a] for a in order]).transpose([order.index(i) for i in range(len(order))])


def _parts(group: Group, mesh: Mesh | None, names: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[a] for a in names) if names else 1


def _local_sizes(group: Group, mesh: Mesh | None) -> list[int]:
    return [size // _parts(group, mesh, names) for size, names in group.rows + group.cols]


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
        sizes.append(size // _parts(group, mesh, names))
    order = [place[a] for a in group.axes] + [0] + locals_at
    spread = whole.reshape(sizes).transpose(order)
    return spread.reshape(group.shards, whole.shape[0], *[sizes[i] for i in locals_at])


def _whole_matrices(x: Array, group: Group) -> Array:
    """[matrices, whole factors...], orthogonalised in chunks."""
    rows, cols = len(group.rows), len(group.cols)
    layout = MatrixLayout((0,), tuple(range(1, 1 + rows)), tuple(range(1 + rows, 1 + rows + cols)), group.splits)
    return _where_it_lies(x, layout, group)


def _exchange(group: Group, arrays: list[Array], mesh: Mesh) -> list[Array]:
    packed = [_pack(x, member, group, mesh) for x, member in zip(arrays, group.members)]
    stack = jnp.concatenate(packed) if len(packed) > 1 else packed[0]
    pad = -stack.shape[0] % group.shards
    if pad:
        stack = jnp.concatenate([stack, jnp.zeros((pad, *stack.shape[1:]), stack.dtype)])
    pieces = stack.reshape(group.shards, -1, *stack.shape[1:])
    whole = _join(lax.all_to_all(pieces, group.axes, 0, 0), group, mesh)
    whole = _whole_matrices(whole, group)
    back = lax.all_to_all(_cut(whole, group, mesh), group.axes, 0, 0)
    return _separate(back.reshape(stack.shape), zip(arrays, group.members))


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
        out.append(_unpack(stack[start:start + count], member, x.shape))
        start += count
    return out


def _local(group: Group, arrays: list[Array]) -> list[Array]:
    """Small arrays are stacked into one batch; a larger one keeps the device busy by itself and is not copied."""
    pairs = list(zip(arrays, group.members))
    small = [pair for pair in pairs if pair[0].size * pair[0].dtype.itemsize <= plan_file.STACK_BYTES]
    done = {}
    if len(small) > 1:
        whole = _whole_matrices(jnp.concatenate([_pack(x, member, group, None) for x, member in small]), group)
        done = {member.path: y for (_, member), y in zip(small, _separate(whole, small))}
    return [done[member.path] if member.path in done else _where_it_lies(x, member.layout, group)
            for x, member in pairs]


def orthogonalize_tree(tree: Mapping[str, Array], plan: tuple[Group, ...], *, mesh: Mesh | None = None,
                       shardings: Mapping[str, NamedSharding] | None = None) -> dict[str, Array]:
    """Every logical matrix of `tree` replaced by its orthogonal factor; shapes, dtypes and shardings stay."""

    def body(tree: dict[str, Array]) -> dict[str, Array]:
        out = {}
        for group in plan:
            arrays = [tree[member.path] for member in group.members]
            if group.strategy is Strategy.LOCAL:
                results = _local(group, arrays)
            elif group.strategy is Strategy.TWO_DIMENSIONAL:
                results = _two_dimensional(group, arrays, mesh)
            elif group.strategy is Strategy.GATHER:
                results = _gather(group, arrays, mesh)
            else:
                results = _exchange(group, arrays, mesh)
            out.update({member.path: x for member, x in zip(group.members, results)})
        return out

    if mesh is None or mesh.size == 1:
        return body(dict(tree))
    layout = {path: shardings[path].spec for path in tree}
    return jax.shard_map(body, mesh=mesh, in_specs=(layout,), out_specs=layout, check_vma=False)(dict(tree))
