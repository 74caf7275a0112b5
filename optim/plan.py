"""Where every Newton-Schulz runs: a static decision per group of equal matrices, made from shapes and shardings only.

An array whose matrix axes are whole on every device is worked on where it lies (LOCAL; experts split over the expert
axis are of this kind and move no byte). Where a mesh axis cuts rows or columns, pieces of many matrices are exchanged
so that every device holds a few whole ones, and exchanged back (ALL_TO_ALL: two collectives, whatever the number of
arrays; groups of different shapes share them, each with owners of its own, where that fills the devices better, see
optim/packing.py). A few long matrices would leave most devices with zeros: their short side is made whole, the
long side stays cut, and only squares of the short side are summed (TWO_DIMENSIONAL). A single matrix that is not long
has nothing to exchange with: its pieces are gathered and every device does the same work (GATHER), which moves half
of what two exchanges padded with zeros would.

The plan is not state: momentum keeps the weights' shape and sharding, so a checkpoint moves between plans freely.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from configs.param_spec import Specs
from configs.schema import ConfigError
from optim.form import Form, carrier_dtype, choose_form
from optim.matrices import MatrixLayout
from optim.newton_schulz import Coefficients
from optim.packing import Load, owners, share_exchanges

Factor = tuple[int, tuple[str, ...]]
"""Size of an array axis and the mesh axes that cut it, outermost first."""


CHUNK_BYTES = {"cpu": 4 * 2**20}
ACCELERATOR_CHUNK_BYTES = 64 * 2**20
"""Matrices worked on at a time on one device of a platform; a single larger slice of the leading axis is worked on whole.
On a CPU about what its caches hold, which is faster too; elsewhere two of Kimi K2's experts, one for each core of a chip."""

STACK_BYTES = 2**20
"""Arrays up to this size are stacked with others of their group where they lie; more would only be copied."""

CHUNK_COPIES = 6
"""Arrays of a chunk's size that the iteration keeps at once, in its products and their transposes."""


LONG = 4
"""Columns over rows from which keeping the long side cut can pay: the work on the short side is not divided."""

FLOPS_PER_BYTE = 2000
"""Matrix FLOPs a chip does while one byte arrives, to weigh work against transfer. 1000 to 10000 on today's chips."""


class Strategy(Enum):
    LOCAL = "local"
    ALL_TO_ALL = "all-to-all"
    TWO_DIMENSIONAL = "two-dimensional"
    GATHER = "gather"


@dataclass(frozen=True)
class Member:
    """One stored array of a group. `flip`: its columns take the place of the group's rows."""

    path: str
    layout: MatrixLayout
    shape: tuple[int, ...]
    flip: bool
    count: int
    count_per_device: int


@dataclass(frozen=True)
class Group:
    """Equal matrices that are moved and orthogonalised together.

    rows, cols   the array axes that form rows and columns after flipping, with the mesh axes that cut them
    splits       blocks of the last column axis, each a matrix of its own
    forms        how each block is orthogonalised where it is whole
    chunk        bytes of whole matrices worked on at a time
    axes         mesh axes that cut rows or columns, in mesh order
    shards       devices along those axes
    exchange     of ALL_TO_ALL: groups of the same number travel together
    first, owners  of ALL_TO_ALL: the places along `axes` of the devices that own its matrices meanwhile
    """

    strategy: Strategy
    rows: tuple[Factor, ...]
    cols: tuple[Factor, ...]
    splits: tuple[int, ...]
    axes: tuple[str, ...]
    shards: int
    members: tuple[Member, ...]
    forms: tuple[Form, ...]
    coeffs: Coefficients
    chunk: int
    exchange: int = 0
    first: int = 0
    owners: int = 1

    @property
    def row_axes(self) -> tuple[str, ...]:
        """Mesh axes that cut the rows, in the order of `axes`."""
        cut = {name for _, names in self.rows for name in names}
        return tuple(a for a in self.axes if a in cut)

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """(m, n) of each block of a stored matrix."""
        m = math.prod(size for size, _ in self.rows)
        outer = math.prod(size for size, _ in self.cols[:-1])
        return [(m, outer * size) for size in self.splits]

    @property
    def count(self) -> int:
        """Logical matrices of the group, over all devices."""
        return sum(member.count for member in self.members) * len(self.splits)

    @property
    def held(self) -> int:
        """Stored matrices of which a device holds at least a piece."""
        return sum(member.count_per_device for member in self.members)

    @property
    def count_per_device(self) -> int:
        """Stored matrices each device, or each owner, orthogonalises, padding included."""
        return -(-self.held // self.owners) if self.strategy is Strategy.ALL_TO_ALL else self.held

    @property
    def elements(self) -> int:
        return sum(m * n for m, n in self.blocks)

    @property
    def flops_per_matrix(self) -> int:
        """Of one stored matrix, all its blocks."""
        return sum(form.flops(m, n) for form, (m, n) in zip(self.forms, self.blocks))

    @property
    def flops_per_device(self) -> int:
        if self.strategy is Strategy.TWO_DIMENSIONAL:
            (m, n), steps = self.blocks[0], len(self.coeffs)
            return self.count_per_device * steps * (2 * m**3 + 4 * m * m * n // self.shards)
        return self.count_per_device * self.flops_per_matrix

    def memory_per_device(self, itemsize: int) -> int:
        """Bound on temporary bytes: the matrices to orthogonalise (overwritten in place), two more copies of them
        while they are exchanged, and the workspace of a chunk."""
        held = self.count_per_device * self.elements * itemsize
        largest = max(math.prod(m.shape) // m.count * self._slice(m) for m in self.members) * itemsize
        copies = 1 if self.strategy is Strategy.LOCAL else 3
        return copies * held + CHUNK_COPIES * min(held, max(self.chunk, largest))

    @staticmethod
    def _slice(member: Member) -> int:
        """Matrices in one index of the leading batch axes, the least that can be worked on at a time."""
        return math.prod(member.shape[a] for a in member.layout.batch if a >= member.layout.lead)

    def bytes_per_device(self, itemsize: int) -> int:
        """Received over the network by one device in one step."""
        if self.strategy is Strategy.ALL_TO_ALL:
            return 2 * self.count_per_device * self.elements * itemsize * (self.shards - 1) // self.shards
        if self.strategy is Strategy.TWO_DIMENSIONAL:
            m, others = self.blocks[0][0], (self.shards - 1) / self.shards
            moved = 2 * self.elements * itemsize // self.shards if self.row_axes else 0
            return round(self.count_per_device * (moved + 2 * others * len(self.coeffs) * m * m * 4))
        if self.strategy is Strategy.GATHER:
            return self.count_per_device * self.elements * itemsize * (self.shards - 1) // self.shards
        return 0


def _mesh_axes(sharding: NamedSharding | None, ndim: int) -> list[tuple[str, ...]]:
    """The mesh axes that cut each array axis; mesh axes of size one cut nothing."""
    if sharding is None:
        return [()] * ndim
    out = []
    for entry in tuple(sharding.spec) + (None,) * (ndim - len(sharding.spec)):
        names = () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        out.append(tuple(a for a in names if sharding.mesh.shape[a] > 1))
    return out


def _merge(factors: list[Factor]) -> tuple[Factor, ...]:
    """An uncut axis inside of another is part of it: [heads cut by t, value] is [heads * value cut by t]."""
    merged: list[Factor] = []
    for size, axes in factors:
        if merged and not axes:
            merged[-1] = (merged[-1][0] * size, merged[-1][1])
        else:
            merged.append((size, axes))
    return tuple(merged)


def make_plan(
    specs: Specs,
    paths: list[str],
    coeffs: Coefficients,
    platform: str,
    compute_dtype: str = "float32",
    *,
    split_kv_a: bool = True,
    mesh: Mesh | AbstractMesh | None = None,
    shardings: Mapping[str, NamedSharding] | None = None,
) -> tuple[Group, ...]:
    """Groups of the matrices at `paths`. ConfigError if an array has no sharding on the mesh or does not divide."""
    found: dict[tuple, list[Member]] = defaultdict(list)
    for path in paths:
        spec = specs[path]
        if mesh is not None and shardings is not None and path not in shardings:
            raise ConfigError(f"{path} has no sharding on the mesh; give every parameter one")
        cut = _mesh_axes(shardings[path] if shardings is not None else None, len(spec.shape))
        for axis, size, names in zip(spec.axes, spec.shape, cut):
            parts = math.prod(mesh.shape[a] for a in names) if names else 1
            if size % parts:
                raise ConfigError(
                    f"{path}: axis {axis} of size {size} cannot be cut into {parts} equal parts over mesh axes {names}"
                )
        layout = MatrixLayout.of(spec, split_kv_a)
        rows = [(spec.shape[a], cut[a]) for a in layout.rows]
        cols = [(spec.shape[a], cut[a]) for a in layout.cols]
        flip = False
        if len(layout.splits) == 1:
            rows, cols = _merge(rows), _merge(cols)
            flip = math.prod(s for s, _ in rows) > math.prod(s for s, _ in cols)
            rows, cols = (cols, rows) if flip else (rows, cols)
        splits = (cols[-1][0],) if flip or len(layout.splits) == 1 else layout.splits
        count = math.prod(spec.shape[a] for a in layout.batch)
        held = count // math.prod(mesh.shape[n] for a in layout.batch for n in cut[a]) if mesh is not None else count
        key = (tuple(rows), tuple(cols), splits)
        found[key].append(Member(path, layout, spec.shape, flip, count, held))

    groups = []
    for (rows, cols, splits), members in found.items():
        used = {name for _, names in rows + cols for name in names}
        axes = tuple(a for a in mesh.axis_names if a in used) if mesh is not None else ()
        shards = math.prod(mesh.shape[a] for a in axes) if axes else 1
        held = sum(member.count_per_device for member in members)
        strategy = Strategy.LOCAL if shards == 1 else Strategy.GATHER if held == 1 else Strategy.ALL_TO_ALL
        chunk = CHUNK_BYTES.get(platform, ACCELERATOR_CHUNK_BYTES)
        group = Group(strategy, rows, cols, splits, axes, shards, tuple(members), (), coeffs, chunk)
        forms = tuple(choose_form(m, n, coeffs, platform, compute_dtype) for m, n in group.blocks)
        itemsize = np.dtype(carrier_dtype(platform, compute_dtype)).itemsize
        groups.append(_two_dimensional_if_cheaper(replace(group, owners=shards, forms=forms), itemsize))
    return _with_owners(groups)


def _with_owners(groups: list[Group]) -> tuple[Group, ...]:
    """Exchanged groups over the same mesh axes put together, and the devices divided among them."""
    out, number = list(groups), 0
    for axes in {g.axes: None for g in groups if g.strategy is Strategy.ALL_TO_ALL}:
        at = [i for i, g in enumerate(groups) if g.strategy is Strategy.ALL_TO_ALL and g.axes == axes]
        loads = [Load(groups[i].held, groups[i].elements) for i in at]
        devices = groups[at[0]].shards
        for members in share_exchanges(loads, devices):
            first = 0
            for k, count in zip(members, owners([loads[k] for k in members], devices)):
                out[at[k]] = replace(groups[at[k]], exchange=number, first=first, owners=count)
                first += count
            number += 1
    return tuple(out)


def _two_dimensional_if_cheaper(group: Group, itemsize: int) -> Group:
    """Keep the long side cut if there are fewer matrices than devices and work and transfer together shrink."""
    if group.strategy is Strategy.LOCAL or len(group.rows) + len(group.cols) > 2 or len(group.splits) > 1:
        return group
    m, n = group.blocks[0]
    if n < LONG * m or 2 * group.held > group.shards or (group.row_axes and (n // group.shards) * group.shards != n):
        return group
    other = replace(group, strategy=Strategy.TWO_DIMENSIONAL)
    work, other_work = (g.flops_per_device + FLOPS_PER_BYTE * g.bytes_per_device(itemsize) for g in (group, other))
    return other if other_work < work else group


COLUMNS = ("matrices", "arrays", "where", "form", "per device", "FLOPs a device", "bytes a device", "memory a device")


def plan_rows(plan: tuple[Group, ...], itemsize: int) -> list[tuple[str, ...]]:
    """The plan as table cells under COLUMNS. `itemsize`: bytes per element on the network, 2 on accelerators."""
    rows = []
    for group in plan:
        shapes = " + ".join(f"{m}x{n}" for m, n in group.blocks)
        where = group.strategy.value + (f" over {'*'.join(group.axes)}={group.shards}" if group.axes else "")
        if group.strategy is Strategy.ALL_TO_ALL:
            where += f", exchange {group.exchange}: {group.owners} own {group.count_per_device}"
        rows.append(
            (
                f"{group.count} x {shapes}",
                ", ".join(member.path for member in group.members),
                where,
                " / ".join(form.describe() for form in group.forms),
                str(group.count_per_device),
                f"{group.flops_per_device:.3g}",
                f"{group.bytes_per_device(itemsize):.3g}",
                f"{group.memory_per_device(itemsize):.3g}",
            )
        )
    return rows


def exchanges(plan: tuple[Group, ...]) -> list[list[Group]]:
    """The groups of ALL_TO_ALL that travel together."""
    together: dict[int, list[Group]] = defaultdict(list)
    for group in plan:
        if group.strategy is Strategy.ALL_TO_ALL:
            together[group.exchange].append(group)
    return list(together.values())


def device_flops(plan: tuple[Group, ...]) -> int:
    """Of the busiest device in one step: in an exchange a device owns matrices of one group."""
    rest = sum(g.flops_per_device for g in plan if g.strategy is not Strategy.ALL_TO_ALL)
    return rest + sum(max(g.flops_per_device for g in together) for together in exchanges(plan))


def device_bytes(plan: tuple[Group, ...], itemsize: int) -> int:
    """Received over the network by one device in one step; every device receives what the fullest owner does."""
    rest = sum(g.bytes_per_device(itemsize) for g in plan if g.strategy is not Strategy.ALL_TO_ALL)
    return rest + sum(max(g.bytes_per_device(itemsize) for g in together) for together in exchanges(plan))


def total_flops(plan: tuple[Group, ...]) -> int:
    """Of every logical matrix once, over all devices: what the step would cost without copies and padding."""
    return sum(sum(member.count for member in group.members) * group.flops_per_matrix for group in plan)
